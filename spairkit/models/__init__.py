"""The models, and what they are made of: read `spair` first, then `networks` and `latents`."""
