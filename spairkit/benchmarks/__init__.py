"""Speed and memory of the operators and of training, compared with plain torch."""
