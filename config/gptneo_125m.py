# GPT-Neo 125M's geometry with local self-ablation: a model that takes several GPUs days.
#     torchrun --nproc_per_node=8 train.py config/gptneo_125m.py --data=data/FOLDER
# 36,000 updates x 256 sequences x 2,048 tokens = 19 billion tokens; TinyStories has 0.5.
# Memory: about 16 GB on each GPU (arithmetic, not measured).
data = "data/web"
n_layer, n_head, n_embd = 12, 12, 768
k_attn, k_mlp = 8, 32
block_size, attention_layers, window_size = 2048, "global,local", 256
batch_size, grad_accum, max_iters = 256, 8, 36_000
learning_rate, warmup_iters = 6e-4, 2000
weight_decay, beta2 = 0.1, 0.95
