"""The training loop and what it stands on: `loop` is where to begin."""
