"""The picture of a sweep: a dot for every trial, and nothing where there is none."""

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


def test_every_trial_is_a_dot_in_every_panel_and_the_best_is_orange() -> None:
    values = [{"model.beta": 0.5, "model.kind": w} for w in ("a", "b", "c")]
    one = colours(trials_chart(values, [1.0, 3.0, 2.0], "ap"))
    fewer = colours(trials_chart(values[:2], [1.0, 3.0], "ap"))
    assert near(one, ORANGE) == near(fewer, ORANGE) > 100
    assert near(one, BLUE) > 1.2 * near(fewer, BLUE) > 100


def test_lists_words_and_logarithms_can_be_drawn() -> None:
    values: list[dict[str, Any]] = [
        {"a": [1, 2], "b": True, "c": 1e-5, "d": "$x$ and more of it"},
        {"a": [3], "b": False, "c": 1e-1, "d": "y"},
    ]
    assert colours(trials_chart(values, [1.0, 2.0], "elbo", frozenset({"c"}))).shape[1] > 1000


def test_there_is_no_picture_of_nothing() -> None:
    assert trials_chart([], [], "elbo") is None
    assert trials_chart([{"a": 1}], [float("nan")], "elbo") is None
