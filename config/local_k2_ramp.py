# Local ablation, k = 2, by the recipe that we recommend instead of the paper's: a gate with
# constant T, and an ablated loss that sets in after 30 % of the run (RESULTS.md).
# Updates, tokens and memory are those of local_k2.
from config.local_k2 import *

gate = "constant"
ramp_start, ramp_end = 0.3, 0.8
