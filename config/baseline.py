# Table 1 of the paper, the plain GPT-Neo.
# 400,000 updates x 24 sequences x 256 tokens = 2.46 billion tokens.
# Memory: 0.7 GB on a CPU beside PyTorch's own 0.4 (measured), about 2 GB on a GPU (not measured).
ablation = "none"
