"""The paper's experiments, each at a stated scale, beside the figures that it published."""
