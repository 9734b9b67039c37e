"""Random search over settings with Optuna, in one process or many."""

from importlib.util import find_spec

from spairkit.errors import InputError

if find_spec("optuna") is None:
    raise InputError(
        "a sweep needs Optuna, which is not installed: run pip install '.[search]' in "
        "spairkit's folder"
    )
