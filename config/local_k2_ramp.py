# Local ablation, k = 2, by the recipe that RESULTS.md recommends in place of the paper's: a gate with
# a constant T, and an ablated loss that comes in after 30 % of the run.
# Updates, tokens and memory are those of local_k2.
from config.local_k2 import *

gate = "constant"
ramp_start, ramp_end = 0.3, 0.8
