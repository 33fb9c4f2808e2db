# GPT-Neo 1.3B's geometry with local self-ablation. Every GPU holds the whole model.
#     torchrun --nproc_per_node=8 train.py config/gptneo_1p3b.py --data=data/FOLDER
# Memory (arithmetic, not measured): 29 GB of weights, gradients and optimizer on each GPU, and
# about as much for one sequence at a time.
data = "data/web"
n_layer, n_head, n_embd = 24, 16, 2048
k_attn, k_mlp = 16, 64
block_size, attention_layers, window_size = 2048, "global,local", 256
batch_size, grad_accum, max_iters = 256, 32, 36_000
learning_rate, warmup_iters = 2e-4, 2000
weight_decay, beta2 = 0.1, 0.95
