# Table 1 of the paper, local ablation, k = 8.
# 400,000 updates x 24 sequences x 256 tokens = 2.46 billion tokens.
# Memory: 1.8 GB on a CPU beside PyTorch's own 0.4 (measured), about 4 GB on a GPU (not measured).
ablation = "local"
k_attn = 8
k_mlp = 8
