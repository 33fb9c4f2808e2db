# A first run without a GPU, on the corpus of `python prepare.py toy`: three minutes on 2 CPU cores.
# 1,200 updates x 8 sequences x 128 tokens = 1.2 million tokens; 0.5 GB of memory.
data = "data/toy"
k_attn = 4
k_mlp = 4
n_layer = 2
n_head = 3
n_embd = 96
block_size = 128
batch_size = 8
max_iters = 1200
learning_rate = 2e-3
eval_interval = 200
log_interval = 50
