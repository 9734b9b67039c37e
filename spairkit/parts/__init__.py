"""Many images as parts that any process can compute."""
