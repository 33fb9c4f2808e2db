# Table 1 of the paper, global ablation, k = 2: 400,000 updates x 24 sequences x 256 tokens = 2.46 billion tokens
ablation = "global"
k_attn = 2
k_mlp = 2
