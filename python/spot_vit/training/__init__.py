"""Training: the loop, objectives, losses, parameter groups, checkpoints."""
