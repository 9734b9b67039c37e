"""Random search over settings, in many processes."""
