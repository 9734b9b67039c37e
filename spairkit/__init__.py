"""Find, box and count many small things in images, without labels: SPAIR and its baselines.

Read in this order: `detections` and `boxes` (the values and their conventions), `rendering` and
`presence` (the two operators with fast kernels), `models/spair`, `training/loop`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spairkit.models.loading import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only once it is needed
    if name == "load":
        from spairkit.models.loading import load

        return load
    raise AttributeError(f"module 'spairkit' has no attribute {name!r}")
