# GPT-Neo 1.3B's geometry with local self-ablation, sharded, as it does not fit one small GPU.
#     torchrun --nproc_per_node=8 train.py config/gptneo_1p3b.py --data=data/FOLDER
# Memory (arithmetic, not measured): about 18 GB on each of the eight GPUs, 4 of them weights and
# optimizer, which alone are 29 GB unsharded; 50 GB in all on one CPU process with --fsdp=False
# --grad_accum=256.
fsdp = True
data = "data/web"
n_layer, n_head, n_embd = 24, 16, 2048
k_attn, k_mlp = 16, 64
block_size, attention_layers, window_size = 2048, "global,local", 256
batch_size, grad_accum, max_iters = 256, 32, 36_000
learning_rate, warmup_iters = 2e-4, 2000
weight_decay, beta2 = 0.1, 0.95
