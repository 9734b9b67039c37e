"""The squash of `spairkit.models.densities`, a sigmoid of clipped logits, for compiled kernels."""

import numpy as np

from spairkit.kernels.elementary_cpu import exp
from spairkit.kernels.threads import inlined

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_LOGIT_LIMIT = np.float32(10.0)  # as in spairkit.models.densities


@inlined
def clip(logit):
    """To [-10, 10], beyond which a squashed logit is constant."""
    if logit > _LOGIT_LIMIT:
        logit = _LOGIT_LIMIT
    elif logit < -_LOGIT_LIMIT:
        logit = -_LOGIT_LIMIT
    return logit


@inlined
def squash(logit):
    """1 / (1 + e^-logit) of the clipped logit."""
    return _ONE / (_ONE + exp(-clip(logit)))


@inlined
def clip_backward(logit, grad):
    """The gradient of a logit from that of the clipped one."""
    return grad if abs(logit) <= _LOGIT_LIMIT else _ZERO


@inlined
def slope(logit, squashed):
    """The derivative of `squash`; the squashed logit cannot tell whether the logit was clipped."""
    return clip_backward(logit, squashed * (_ONE - squashed))
