# The plain GPT-Neo beside config/demo.py, the same but for the gates.
from config.demo import *

ablation = "none"
