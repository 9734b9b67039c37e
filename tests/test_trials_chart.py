"""The chart of a sweep: a dot for every trial, and no chart without trials."""

import io
from typing import Any

import numpy as np
from PIL import Image

from spairkit.report.trials import trials_chart


def colours(png: bytes | None) -> Any:
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(picture: Any, colour: tuple[int, int, int]) -> int:
    return int((abs(picture - np.array(colour)).sum(-1) < 20).sum())


ORANGE, BLUE = (213, 94, 0), (102, 170, 209)  # blue at .6 on white


def test_each_panel_has_a_dot_per_trial_and_the_best_is_orange() -> None:
    values = [{"model.beta": 0.5, "model.kind": w} for w in ("a", "b", "c")]
    trials = list(zip(values, [1.0, 3.0, 2.0], strict=True))
    one = colours(trials_chart(trials, "ap"))
    fewer = colours(trials_chart(trials[:2], "ap"))
    assert near(one, ORANGE) == near(fewer, ORANGE) > 100
    assert near(one, BLUE) > 1.2 * near(fewer, BLUE) > 100


def test_chart_draws_lists_words_and_log_axes() -> None:
    values: list[dict[str, Any]] = [
        {"a": [1, 2], "b": True, "c": 1e-5, "d": "$x$ and more of it"},
        {"a": [3], "b": False, "c": 1e-1, "d": "y"},
    ]
    trials = list(zip(values, [1.0, 2.0], strict=True))
    assert colours(trials_chart(trials, "elbo", {"c"})).shape[1] > 1000


def test_chart_without_trials_is_none() -> None:
    assert trials_chart([], "elbo") is None
    assert trials_chart([({"a": 1}, float("nan"))], "elbo") is None
