# GPT-Neo 1.3B's geometry with local self-ablation, sharded: weights, gradients and optimizer do not fit one small GPU.
#     torchrun --nproc_per_node=8 train.py config/gptneo_1p3b.py --data=data/FOLDER
fsdp = True
data = "data/web"
k_attn = 16
k_mlp = 64
n_layer = 24
n_head = 16
n_embd = 2048
block_size = 2048
attention_layers = "global,local"
window_size = 256
batch_size = 256
grad_accum = 32
max_iters = 36_000
learning_rate = 2e-4
warmup_iters = 2000
weight_decay = 0.1
beta2 = 0.95
