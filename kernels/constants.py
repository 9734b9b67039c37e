"""Numbers that the kernels and the plain torch versions of the library share."""

BOX = 4
"""Numbers of a box: y, x, h, w before it is placed; x1, y1, x2, y2 after."""

LOGIT_LIMIT = 10.0
"""Logits are clipped to +-10 before their sigmoid, as in the authors' code."""

STD_SCALE = 2.0
"""The standard deviation of a latent is 2 sigmoid(raw) (docs/model.md 3.3)."""

DEPTH_SCALE = 4.0
"""The authors' depth is 4 sigmoid(z), in object vectors and in importance."""

MIN_SIDE = 1e-6
"""Pixels. The renderer takes a box with a shorter side as empty."""

MIN_IMPORTANCE = 1e-30
"""A pixel whose summed importance is at most this shows the background: no division by 0."""

MIN_PROBABILITY = 1e-30
"""Probabilities in the count prior of relaxed samples are never read as less."""

IMPOSSIBLE = -1e30
"""Log-weight of a count that the samples rule out; -inf would turn a softmax into NaN."""

NEGLIGIBLE_SHARE = 2.0**-56
"""A sum of positive terms ends when those that are left are at most this share of it."""

LARGE_SUM = 2.0**500
"""Sums whose quotient is wanted are divided by this when one exceeds it."""

LOG_ROOT_TWO_PI = 0.9189385332046727
"""log sqrt(2 pi), of the normal density."""

SPLITMIX64 = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Increment and two multipliers of the random generator splitmix64 (Steele, Lea, Flood 2014)."""
