"""The page about a run, from the files in the run's folder."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spairkit import __version__
from spairkit.config_values import to_toml
from spairkit.errors import InputError
from spairkit.metrics import NAMES, PROTOCOLS
from spairkit.report.curves import chart, line
from spairkit.storage import durable
from spairkit.storage.runs import Run

_PICTURE = re.compile(r"step-(\d{1,10})\.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PICTURE_BYTES = 32 << 20
_MAX_TEST_BYTES = 16 << 20
_SHARES = ("ap", "ap_spair", "count_accuracy")
_INTERVALS = ("interval_coverage", "interval_width")


class Picture(NamedTuple):
    """A picture drawn at a validation."""

    step: int
    data: str | None
    """Its bytes in base 64; None if the file cannot be used."""


class Curve(NamedTuple):
    """A chart and its title."""

    title: str
    svg: Markup


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into a run's folder, from whatever is there by now.

    Shows the figures of `test.json` (a `Report.to_json()`), where there is one, else of the last
    validation; the curves of `metrics.jsonl`; the first, the middle and the last picture of
    `pictures/`; and the config. Lines and pictures that cannot be read are passed over.

    Args:
        run_folder: the run, finished or not.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder holds no run, `test.json` is no report, or the page cannot be
            written.
    """
    run = Run.open(run_folder)
    records = run.metrics()
    steps = [record for record in records if record.get("kind") == "step"]
    validations = [record for record in records if record.get("kind") == "validation"]
    test = _test(run.path / "test.json")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    page = environment.get_template("page.html.j2").render(
        name=run.path.resolve().name,
        config=run.config,
        toml=to_toml(run.config),
        version=__version__,
        step=max((record["step"] for record in records), default=0),
        validation=validations[-1] if validations else None,
        test=test,
        names=NAMES,
        shown=_shown(test),
        protocols=PROTOCOLS,
        curves=_curves(steps, validations),
        test_curve=_test_curve(test),
        pictures=_pictures(run.path / "pictures"),
    )
    path = run.path / "report.html"
    durable.write_text(path, page)
    return path


def _curves(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[Curve]:
    losses = [line(steps, name, name) for name in ("total", "reconstruction")]
    kls = [line(steps, f"kl_{name}", name) for name in ("where", "what", "depth", "pres")]
    boxes = [line(validations, key, NAMES[key]) for key in _SHARES]
    elbo = [line(validations, "elbo", "ELBO")]
    criteria = ("ap", "count_accuracy", "count_error")
    search = [line(steps, key, NAMES[key], x="threshold") for key in criteria]
    in_nats = partial(chart, x_label="updates", y_label="nats per image")
    drawn = {
        "Training loss": in_nats(losses),
        "KL terms": in_nats(kls),
        "Validation: boxes and counts": chart(
            boxes, x_label="updates", y_label="share", share=True
        ),
        "Validation: ELBO": in_nats(elbo),
        "Threshold search": chart(search, x_label="threshold", y_label="on training images"),
    }
    return [Curve(title, svg) for title, svg in drawn.items() if svg is not None]


def _test_curve(test: Mapping[str, Any] | None) -> Curve | None:
    """Figures over the number of objects."""
    groups = test["by_objects"] if test else {}
    records = [{"objects": n, **groups[str(n)]} for n in sorted(map(int, groups))]
    lines = [line(records, key, NAMES[key], x="objects") for key in _SHARES]
    svg = chart(lines, x_label="objects in the image", y_label="share", share=True)
    return Curve("By number of objects", svg) if svg is not None else None


def _shown(test: Mapping[str, Any] | None) -> dict[str, str]:
    """The figures of a test and their names, without intervals of counts where there are none."""
    overall = test["overall"] if test else {}
    return {
        key: name
        for key, name in NAMES.items()
        if key not in _INTERVALS or overall.get(key) is not None
    }


def _test(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    advice = "evaluate the run again, or remove the file"
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TEST_BYTES:
            raise InputError(f"{path}: not a file of figures; {advice}")
        test = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON; {advice}") from None
    groups = test.get("by_objects") if isinstance(test, dict) else None
    figures = [test.get("overall"), *groups.values()] if isinstance(groups, dict) else [None]
    if not all(isinstance(item, dict) for item in figures) or not all(
        number.isdecimal() and len(number) < 10 for number in groups or {}
    ):
        raise InputError(f"{path}: not the figures of a detector; {advice}")
    report: dict[str, Any] = test
    return report


def _pictures(folder: Path) -> list[Picture]:
    """The first, the middle and the last."""
    if not folder.is_dir():
        return []
    matches = [(_PICTURE.fullmatch(path.name), path) for path in folder.iterdir()]
    found = sorted((int(match[1]), path) for match, path in matches if match)
    chosen = sorted({0, len(found) // 2, len(found) - 1}) if found else []
    return [Picture(found[i][0], _embedded(found[i][1])) for i in chosen]


def _embedded(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_PICTURE_BYTES:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    return base64.b64encode(data).decode() if data.startswith(_PNG) else None


def _figure(value: Any) -> str:
    """A figure of a table; a dash for what is not there or says nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:z.3f}"
