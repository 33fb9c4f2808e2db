# GPT-Neo 125M's geometry with local self-ablation: what a model is like that needs several GPUs to be trained in days.
# 36,000 updates x 256 sequences x 2,048 tokens = 19 billion tokens, of data that you prepare: TinyStories has 0.5.
#     torchrun --nproc_per_node=8 train.py config/gptneo_125m.py --data=data/FOLDER
data = "data/web"
k_attn = 8
k_mlp = 32
n_layer = 12
n_head = 12
n_embd = 768
block_size = 2048
attention_layers = "global,local"
window_size = 256
batch_size = 256
grad_accum = 8
max_iters = 36_000
learning_rate = 6e-4
warmup_iters = 2000
weight_decay = 0.1
beta2 = 0.95
