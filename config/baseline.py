# Table 1 of the paper, the plain GPT-Neo: 400,000 updates x 24 sequences x 256 tokens = 2.46 billion tokens
ablation = "none"
