# A first run without a GPU: about three minutes on 2 CPU cores, on the corpus of `python prepare.py toy`.
# 900 updates x 16 sequences x 128 tokens = 1.8 million tokens
data = "data/toy"
k_attn = 4
k_mlp = 8
n_layer = 3
n_head = 4
n_embd = 64
block_size = 128
batch_size = 16
max_iters = 900
learning_rate = 3e-3
eval_interval = 100
log_interval = 50
