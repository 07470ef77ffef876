"""Training of LinGen (Wang et al., CVPR 2025, arXiv 2412.09856) and of its DiT baseline, stage by stage."""
