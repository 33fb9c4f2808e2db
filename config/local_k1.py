# Table 1 of the paper, local ablation, k = 1: 400,000 updates x 24 sequences x 256 tokens = 2.46 billion tokens
ablation = "local"
k_attn = 1
k_mlp = 1
