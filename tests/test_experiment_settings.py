"""Settings of a comparison: budgets, and the config of each model."""

import pytest

from spairkit.config_values import differences
from spairkit.experiments.settings import Settings, Task, config_of, parse_budget
from spairkit.presets import resolve


def test_budget_is_updates_or_time() -> None:
    assert parse_budget(None) == (None, None)
    assert parse_budget("2000") == (2000, None)
    assert parse_budget("90s") == (None, 90.0)
    assert parse_budget("3m") == (None, 180.0)
    assert parse_budget("1.5h") == (None, 5400.0)
    for wrong in ("", "m", "0", "-3m", "3 days", "nan", "infm", "2.5", "1e9h"):
        with pytest.raises(ValueError, match=r"--budget .*: write updates, as 2000, or time"):
            parse_budget(wrong)


def test_models_share_images_and_scale_schedules_to_the_budget() -> None:
    chosen = Settings(objects=(2,), seeds=2, budget="500")
    quick = resolve("quick", {"data": {"min_objects": 2, "max_objects": 2}})
    for model in chosen.models:
        config = config_of(chosen, Task(model, 2, 1), 500)
        assert config.data == quick.data
        assert config.train.seed == 1
        assert config.model.count_is_given == (model in ("air", "dair"))
    spair = config_of(chosen, Task("spair", 2, 0), 500)
    changed = {line.split(":")[0] for line in differences(quick, spair)}
    assert changed == {
        "model.odds_decay",
        "train.steps",
        "train.training_wheels",
        "train.validation_every",
    }
    share = 500 / quick.train.steps
    assert spair.model.odds_decay == share * quick.model.odds_decay  # type: ignore[union-attr]
    assert spair.train.validation_every == 50
    longer = config_of(chosen, Task("spair", 2, 0), 10**6)
    assert longer.model == quick.model
    assert longer.train.training_wheels == quick.train.training_wheels
    assert config_of(chosen, Task("conncomp", 2, 0), 500).train.steps == 100
