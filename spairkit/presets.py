"""Named configs. The docstring of each preset is its lab note.

Every preset trains on one CPU thread: where other processes keep the cores busy, a second thread
waits in a busy loop and made updates ten times slower.
"""

from collections.abc import Callable, Mapping
from typing import Any

from spairkit.config import AIRConfig, Config
from spairkit.config_values import from_dict, merge, model_kind
from spairkit.errors import InputError


def quick() -> dict[str, Any]:
    """SPAIR on 1 to 3 digits of 48 x 48 pixels, in a few minutes on a laptop's CPU.

    `spairkit train`: 2 minutes on one thread of a small two-core virtual machine (2026-11-26).
    Test AP .795, .797, .810 and counts exactly right .925, .944, .944 for seeds 0, 1, 2.

    Found by hand on the embedded digits. What mattered, in order: the gradient clipped to norm 1
    at a learning rate of 1e-3 (2e-3, or no clipping, learns worse or not at all); boxes drawn
    round what is seen (`box_contrast`); KL terms that weigh twice, so that fewer digits are found
    twice; 48 pixels rather than 32, where the cells at the right and bottom see too little to be
    used. Single runs led there, so no figures stand beside them.
    """
    return {
        "data": {"max_objects": 3, "validation_images": 256},
        "model": {
            "backbone_channels": (16, 32, 64),
            "features": 64,
            "hidden": 64,
            "passthrough": 64,
            "what": 16,
            "encoder_hidden": (128,),
            "decoder_hidden": (128,),
            "activation": "celu",
            "std_bias": -3.0,
            "size_bias": -0.9,
            "presence_bias": 3.0,
            "alpha_scale": 1.0,
            "alpha_bias": 2.0,
            "importance_floor": 0.00025,
            "temperature": 0.5,
            "odds_start": 1.0,
            "odds_end": 0.05,
            "odds_schedule": "log-linear",
            "likelihood_floor": 1e-6,
            "box_contrast": 0.05,
            "beta": 2.0,
        },
        "train": {
            "steps": 2500,
            "learning_rate": 1e-3,
            "learning_rate_end": 5e-5,
            "gradient_noise": 0.0,
            "training_wheels": 50,
            "validation_every": 250,
            "patience": 0,
            "threads": 1,
        },
    }


def laptop() -> dict[str, Any]:
    """SPAIR on 1 to 9 digits of 48 x 48 pixels, in less than half an hour of a laptop's one core.

    `spairkit train --preset laptop --data MNIST.npz`; test figures of three seeds, for each number
    of digits and without lateral connections too, are in BENCHMARKS.md. Without `--data` it trains
    on the digits that ship with spairkit, whose figures were not measured.

    The recipe of `quick` with 32 numbers for what an object looks like in place of 16, KL terms
    that weigh 1.5 times in place of twice, a learning rate half as high again and eleven times the
    updates. Chosen among ten by 1,024 validation images after 5,000 updates of one run each: the
    rate and the weight each made AP and counts better, and the 32 numbers counts.
    """
    return merge(
        quick(),
        {
            "data": {"max_objects": 9},
            "model": {"what": 32, "beta": 1.5},
            "train": {"steps": 28_000, "learning_rate": 1.5e-3, "validation_every": 1000},
        },
    )


def paper() -> dict[str, Any]:
    """SPAIR as in Table 1 and the released code: the defaults of the config, on one thread.

    Two things are not the authors': the glyphs (`--data` takes EMNIST or MNIST, and they trained
    on 1, 3, 5, 7 or 9 of them exactly), and that `best` is by the ELBO (`--select ap` is theirs).

    `spairkit train --preset paper`: some 5 updates a second on one thread of a small virtual
    machine (48 x 48, 2026-11-26), so that its 300,000 want a GPU. The score was not measured.
    """
    return {"train": {"threads": 1}}


def quick_air() -> dict[str, Any]:
    """AIR and DAIR that count: 0 to 2 digits on 50 x 50 pixels, in minutes on a laptop's CPU.

    `spairkit train --model air`; the figures of five seeds are in BENCHMARKS.md.

    What mattered, on single runs. The loss is the expectation over all counts, in place of Concrete
    draws, and log-odds of presence are clipped to 4: every object may then be missing with a chance
    of 1 in 56, so that the first one learns to explain a digit alone. Without the clip two objects
    share a single digit for 1,000 to 2,000 updates, some runs longer, as hardly any gradient is
    left to switch the second one off; with it counts are right after 750 to 1,000. Clipped to 3
    they are right sooner, and boxes fit worse. The prior of sizes is narrow and a little larger
    than a digit, so that no box takes two. That does not hold boxes back where the count is given
    and greater than one: there the prior is of smaller ones.
    """
    return {
        "data": {
            "image_height": 50,
            "image_width": 50,
            "min_objects": 0,
            "max_objects": 2,
            "validation_images": 256,
        },
        "model": {
            "count": "inferred",
            "presence": "exact",
            "presence_limit": 4.0,
            "grey": True,
            "what": 16,
            "encoder_hidden": (128,),
            "decoder_hidden": (128,),
            "activation": "celu",
            "std_bias": -2.3,
            "scale_bias": -0.7,
            "presence_bias": 1.0,
            "colour_bias": -2.0,
            "scale_prior_mean": -0.7,
            "scale_prior_std": 0.2,
            "shift_prior_std": 1.0,
            "odds_start": 1e-3,
            "odds_end": 1e-3,
            "likelihood_floor": 1e-6,
            "box_contrast": 0.05,
        },
        "train": {
            "batch_size": 64,
            "steps": 2500,
            "learning_rate": 1e-3,
            "learning_rate_end": 5e-5,
            "gradient_noise": 0.0,
            "training_wheels": 0,
            "validation_every": 250,
            "patience": 0,
            "threads": 1,
        },
    }


def paper_air() -> dict[str, Any]:
    """AIR and DAIR as the SPAIR paper compared them, the true counts given (docs/model.md 7, 8).

    Where every image has the same number of objects, 1, 3, 5, 7 or 9, the priors are those that
    the authors searched for this number (`PRIORS`); otherwise those for five. On a CPU this is
    for measuring, not for training: 300,000 updates. The score was not measured.
    """
    return {"train": {"batch_size": 64, "gradient_noise": 0.0, "training_wheels": 0, "threads": 1}}


def quick_conncomp() -> dict[str, Any]:
    """ConnComp on 1 to 3 digits of 48 x 48 pixels: 100 thresholds tried on 1,000 scenes.

    `spairkit train --model conncomp`: under a minute on one thread of a small two-core virtual
    machine (2026-11-22). Test AP .677, of single digits .938; counts exactly right .728, 1.000.
    """
    return {
        "data": {"max_objects": 3, "validation_images": 256},
        "train": {"steps": 100, "threads": 1},
    }


def paper_conncomp() -> dict[str, Any]:
    """ConnComp as in the paper: 100 thresholds from .01 to 3, on black (docs/model.md 9)."""
    return {"train": {"steps": 100, "threads": 1}}


PRIORS: dict[str, dict[int, tuple[float, float, float]]] = {
    "air": {
        1: (-2.944, 0.25, 2.0),
        3: (-1.386, 0.75, 0.5),
        5: (-2.944, 0.75, 0.5),
        7: (-1.386, 0.5, 2.0),
        9: (-2.197, 0.5, 0.5),
    },
    "dair": {
        1: (-2.944, 0.25, 2.0),
        3: (-2.944, 0.5, 1.0),
        5: (-2.197, 0.25, 1.0),
        7: (-2.944, 0.75, 1.0),
        9: (-0.405, 0.25, 2.0),
    },
}
"""Mean and std of the scale's prior and std of the shift's, by number of digits in every image.

AIR's are those of the authors' code of 22 July 2018: they lie on the grid that the authors searched
and came two days before the run in Fig. 2; the released file has others, off the grid. DAIR's are
the released file's, the only ones there are (docs/model.md 7).
"""

_PRESETS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "quick": {"spair": quick, "air": quick_air, "dair": quick_air, "conncomp": quick_conncomp},
    "laptop": {"spair": laptop},
    "paper": {"spair": paper, "air": paper_air, "dair": paper_air, "conncomp": paper_conncomp},
}
DEFAULT = "quick"


def names() -> list[str]:
    """The presets there are, the default one first."""
    return list(_PRESETS)


def resolve(preset: str, *layers: Mapping[str, Any]) -> Config:
    """The config of `preset` with `layers` of nested values laid over it, the last one on top.

    A preset has a recipe for each kind of model; `model.kind` of the layers says which.

    Raises:
        InputError: no such preset (the message lists them), or mistakes in the values, all at
            once.
    """
    if preset not in _PRESETS:
        raise InputError(f"no preset {preset!r}; there are: {', '.join(names())}")
    over = merge(*layers, {"preset": preset})
    kind = model_kind(over) or "spair"
    if kind not in _PRESETS[preset]:
        from_dict(over)  # says what is wrong with a kind that there is not
        raise InputError(
            f"preset {preset} has no recipe for {kind}; it has for: {', '.join(_PRESETS[preset])}"
        )
    recipe = _PRESETS[preset][kind]()
    config = from_dict(merge(recipe, over))
    return from_dict(merge(recipe, _fitted_to_data(config), over))


def _fitted_to_data(config: Config) -> dict[str, Any]:
    """What a recipe for AIR or DAIR takes from the numbers of objects in the images."""
    if not isinstance(config.model, AIRConfig):
        return {}
    least, most = config.data.min_objects, config.data.max_objects
    model: dict[str, Any] = {"kind": config.model.kind, "max_objects": max(most, 1)}
    if config.preset == "paper" and least == most and most in PRIORS[config.model.kind]:
        names = ("scale_prior_mean", "scale_prior_std", "shift_prior_std")
        model |= dict(zip(names, PRIORS[config.model.kind][most], strict=True))
    elif config.preset == "quick" and config.model.told and most > 1:
        # a steady pull to small boxes, where nothing else keeps one from taking several digits
        model |= {"scale_prior_mean": -1.7, "scale_prior_std": 0.25}
    return {"model": model}
