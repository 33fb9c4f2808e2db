# A self-ablated model that learns to keep the names of a story apart, without a GPU: `make demo`
# trains it beside demo_baseline, a core each, on the corpus of `python prepare.py toy`.
# 5,000 updates x 12 sequences x 64 tokens = 3.8 million tokens; 0.5 GB of memory.
data = "data/toy"
gate, ramp_start, ramp_end = "constant", 0.5, 0.9  # by 0.5 most seeds know the names
embd_std = 0.4  # from GPT-Neo's 0.02 no model of this size learns the names
n_layer, n_head, n_embd = 2, 4, 64
block_size, batch_size, max_iters = 64, 12, 5000
learning_rate, warmup_iters, beta2 = 3e-3, 100, 0.99
weight_decay = 0.1  # without it two of nine seeds do not learn the names
eval_interval, log_interval = 500, 100
