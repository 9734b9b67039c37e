"""The training loop (read `loop` first), the trainer, CUDA graphs and distributed training."""
