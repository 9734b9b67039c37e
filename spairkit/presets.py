"""Named configs. The docstring of each preset is its lab note.

Every preset trains on one CPU thread: where other processes keep the cores busy, a second thread
waits in a busy loop and made updates ten times slower.
"""

from collections.abc import Callable, Mapping
from typing import Any

from spairkit.config import AIRConfig, Config, ConnCompConfig
from spairkit.config_values import from_dict, merge, model_kind
from spairkit.errors import InputError

_LEAST_AREA = 12  # px of a component in a folder: a tenth of a disc of 12 px
_QUICK_TRAIN = {
    "steps": 2500,
    "learning_rate": 1e-3,
    "learning_rate_end": 5e-5,
    "gradient_noise": 0.0,
    "validation_every": 250,
    "patience": 0,
    "threads": 1,
}


def quick() -> dict[str, Any]:
    """SPAIR on 1 to 3 digits in 48 x 48 pixels, in a few minutes on a laptop's CPU.

    `spairkit train` takes about two minutes of CPU time on one thread of a small virtual machine;
    BENCHMARKS.md has the test figures of three seeds, with the search (`search.mode`) and without.

    The settings were tuned by hand on the embedded digits. In order of importance: clipping the
    gradient to norm 1 at a learning rate of 1e-3 (training fails or is worse at 2e-3 or without
    clipping); boxes round masks (`box_contrast`); a weight of 2 on the KL terms, so that fewer
    digits are detected twice; images of 48 pixels, as cells at the right and bottom of 32 pixels
    see too little to be used. Each was tried in single runs, so there are no figures. The height at
    which masks end (`box_contrast`) and the weight of the KL terms in the search (`search.beta`)
    were chosen on 128 to 512 validation scenes.
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
            "box_contrast": 0.03,
            "beta": 2.0,
        },
        "search": {"mode": "full"},
        "train": {**_QUICK_TRAIN, "training_wheels": 50},
    }


def laptop() -> dict[str, Any]:
    """SPAIR on 1 to 9 digits in 48 x 48 pixels, in less than half an hour on one core of a laptop.

    `spairkit train --preset laptop --data MNIST.npz`. BENCHMARKS.md has test figures of three seeds
    for each number of digits, with the search and without. Without `--data` it trains on the digits
    that ship with spairkit; that was not measured.

    It differs from `quick` in 32 appearance dimensions instead of 16, a KL weight of 1.5 instead of
    2, a learning rate 1.5 times as high and eleven times as many updates. It was the best of ten
    settings on 1,024 validation images after 5,000 updates of one run each: learning rate and KL
    weight each improved AP and counts, the 32 dimensions improved counts. Masks end lower, as the
    strokes of MNIST are fainter (`box_contrast`, chosen on 256 validation scenes).
    """
    return merge(
        quick(),
        {
            "data": {"max_objects": 9},
            "model": {"what": 32, "beta": 1.5, "box_contrast": 0.01},
            "train": {"steps": 28_000, "learning_rate": 1.5e-3, "validation_every": 1000},
        },
    )


def paper() -> dict[str, Any]:
    """SPAIR as in Table 1 and the released code: the defaults of the config, on one thread.

    It differs from the authors' code in the glyphs (they trained on exactly 1, 3, 5, 7 or 9 digits
    of EMNIST, which `--data` can load) and in choosing the best checkpoint by the ELBO (`--select
    ap` is their rule).

    `spairkit train --preset paper` makes about 5 updates a second on one thread of a small virtual
    machine (48 x 48, 2026-11-26): its 300,000 updates need a GPU. The score was not measured.
    """
    return {"train": {"threads": 1}}


def quick_air() -> dict[str, Any]:
    """AIR and DAIR that infer the count: 0 to 2 digits in 50 x 50 pixels, in minutes on a CPU.

    `spairkit train --model air`; BENCHMARKS.md has the figures of five seeds.

    In single runs, two settings mattered. The loss is the expectation over all counts instead of
    Concrete samples, and log-odds of presence are clipped to 4. Every object is then missing with a
    probability of at least 1 in 56, so the first one learns to explain a digit alone, and counts
    are right after 750 to 1,000 updates. Without the clip two objects share a digit for 1,000 to
    2,000 updates or longer, because almost no gradient is left to switch the second one off. With a
    clip of 3 counts are right sooner, but boxes fit worse. The prior of sizes is narrow and has a
    mean slightly above the size of a digit, so that no box covers two. If the count is given and
    greater than one that does not suffice, and the prior has a smaller mean.
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
        "train": {**_QUICK_TRAIN, "batch_size": 64, "training_wheels": 0},
    }


def paper_air() -> dict[str, Any]:
    """AIR and DAIR as compared in the SPAIR paper, given the true counts (docs/model.md 7, 8).

    If all images have the same number of objects, 1, 3, 5, 7 or 9, the priors are those that the
    authors found by search for this number (`PRIORS`), otherwise those for five. On a CPU 300,000
    updates take too long. The score was not measured.
    """
    return {"train": {"batch_size": 64, "gradient_noise": 0.0, "training_wheels": 0, "threads": 1}}


def quick_conncomp() -> dict[str, Any]:
    """ConnComp on 1 to 3 digits in 48 x 48 pixels: tries 100 thresholds on 1,000 scenes.

    `spairkit train --model conncomp` takes under a minute on one thread of a small two-core virtual
    machine (2026-11-22). Test AP .677 and count accuracy .728; on single digits .938 and 1.000.
    """
    return {
        "data": {"max_objects": 3, "validation_images": 256},
        "train": {"steps": 100, "threads": 1},
    }


def paper_conncomp() -> dict[str, Any]:
    """ConnComp as in the paper: 100 thresholds from .01 to 3, on black (docs/model.md 9)."""
    return {"train": {"steps": 100, "threads": 1}}


def watershed() -> dict[str, Any]:
    """Watershed, which has nothing to fit: the only step saves it. docs/own-images.md has figures.

    The constants of the model were chosen on the training images of five annotated sets.
    """
    return {
        "data": {"max_objects": 3, "validation_images": 256},
        "train": {"steps": 1, "threads": 1},
    }


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
"""Mean and std of the prior of the scale, and std of the prior of the shift, by digits per image.

Those of AIR are from the authors' code of 22 July 2018: they lie on the authors' search grid and
are two days older than the run in Fig. 2. The released file has others, off the grid. Those of DAIR
are from the released file, the only source (docs/model.md 7).
"""

_PRESETS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "quick": {
        "spair": quick,
        "air": quick_air,
        "dair": quick_air,
        "conncomp": quick_conncomp,
        "watershed": watershed,
    },
    "laptop": {"spair": laptop},
    "paper": {
        "spair": paper,
        "air": paper_air,
        "dair": paper_air,
        "conncomp": paper_conncomp,
        "watershed": watershed,
    },
}
DEFAULT = "quick"


def names() -> list[str]:
    """Names of all presets, the default first."""
    return list(_PRESETS)


def resolve(preset: str, *layers: Mapping[str, Any]) -> Config:
    """The config of `preset`, overridden by `layers` of nested values; later layers win.

    A preset has a recipe for each kind of model; `model.kind` in the layers selects it.

    Raises:
        InputError: the preset is unknown, has no recipe for the kind, or values are invalid. The
            message lists the presets, the kinds, or all invalid values.
    """
    if preset not in _PRESETS:
        raise InputError(f"unknown preset {preset!r}; choose from: {', '.join(names())}")
    over = merge(*layers, {"preset": preset})
    kind = model_kind(over) or "spair"
    if kind not in _PRESETS[preset]:
        from_dict(over)  # raises if there is no such kind
        kinds = ", ".join(_PRESETS[preset])
        raise InputError(f"preset {preset!r} has no recipe for {kind}; it supports: {kinds}")
    recipe = _PRESETS[preset][kind]()
    config = from_dict(merge(recipe, over))
    return from_dict(merge(recipe, _fitted_to_data(config), over))


def _fitted_to_data(config: Config) -> dict[str, Any]:
    """Settings of ConnComp, AIR and DAIR that depend on the images."""
    if isinstance(config.model, ConnCompConfig) and config.data.name == "folder":
        return {"model": {"kind": config.model.kind, "min_area": _LEAST_AREA}}
    if not isinstance(config.model, AIRConfig):
        return {}
    least, most = config.data.min_objects, config.data.max_objects
    model: dict[str, Any] = {"kind": config.model.kind, "max_objects": max(most, 1)}
    if config.preset == "paper" and least == most and most in PRIORS[config.model.kind]:
        names = ("scale_prior_mean", "scale_prior_std", "shift_prior_std")
        model |= dict(zip(names, PRIORS[config.model.kind][most], strict=True))
    elif config.preset == "quick" and config.model.count_is_given and most > 1:
        # nothing else keeps a box from covering several digits
        model |= {"scale_prior_mean": -1.7, "scale_prior_std": 0.25}
    return {"model": model}
