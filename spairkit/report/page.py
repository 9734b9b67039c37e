"""The page about a run, from the files in the run's folder."""

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from spairkit import __version__
from spairkit.config_values import to_toml
from spairkit.errors import InputError
from spairkit.images import read_image
from spairkit.metrics import NAMES, PROTOCOLS
from spairkit.report.curves import chart, histogram, line
from spairkit.report.drawing import encoded, reduced
from spairkit.report.objects import Objects, picture_path, read_objects
from spairkit.report.signs import has_failed
from spairkit.storage import durable
from spairkit.storage.runs import Run

_PICTURE = re.compile(r"step-(\d{1,10})\.png")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_PICTURE_BYTES = 32 << 20
_MAX_PLAIN_BYTES = 1 << 20  # larger pictures are reduced
_MAX_SIDE = 1000  # pixels, of those
_SMALL = 100  # pixels; more images of this length fit beside each other
_MAX_TEST_BYTES = 16 << 20
_MAX_SIGNS_BYTES = 1 << 20
_MAX_WARNINGS = 20
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

    Shows first the objects (`objects/`, see `spairkit.report.objects`), with warnings (the strings
    under `warnings` in `signs.json`) and the next commands; then the figures of `test.json` (a
    `Report.to_json()`), where there is one, else of the last validation. The curves of
    `metrics.jsonl`, the first, the middle and the last picture of `pictures/`, and the config are
    folded. Lines and pictures that cannot be read are passed over, and large pictures are reduced.

    Args:
        run_folder: the run, finished or not.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder holds no run, `test.json`, `signs.json` or `objects/found.json` is
            damaged, or the page cannot be written.
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
    found = read_objects(run.path)
    failed = has_failed(run.path)
    page = environment.get_template("page.html.j2").render(
        name=run.path.resolve().name,
        config=run.config,
        toml=to_toml(run.config),
        version=__version__,
        step=max((record["step"] for record in records), default=0),
        restarts=_restarts(records),
        validation=validations[-1] if validations else None,
        found=found,
        headline=None if found is None else _headline(found),
        notes=[] if found is None else _notes(found),
        images=[] if found is None else _shown_images(run, found),
        small=found is not None and max(max(image.size) for image in found.images) <= _SMALL,
        counts=None if found is None else _counts(found),
        groups=[] if found is None else _groups(run, found),
        warnings=_warnings(run.path / "signs.json"),
        failed=failed,
        commands=() if failed else _commands(run, found, has_truth=test is not None),
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


def next_commands(run: Run, image: Path, *, has_truth: bool) -> tuple[str, str]:
    """Two commands to copy: `viz` of an image; and `eval`, or `detect` without ground truth."""
    path, folder = shlex.quote(str(run.path)), shlex.quote(run.config.data.path)
    told = f" --count {run.config.data.max_objects}" if run.config.model.count_is_given else ""
    second = "eval" if has_truth else f"detect {folder} --out found.json"
    return (
        f"spairkit viz {shlex.quote(str(image))} --checkpoint {path}{told}",
        f"spairkit {second} --checkpoint {path}",
    )


def _restarts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was given up before this training, a sentence each."""
    sentences = []
    for record in records:
        changed = record.get("changed")
        if record.get("kind") != "restart" or not isinstance(changed, dict):
            continue
        words = ", ".join(f"{key} = {value}" for key, value in changed.items())
        sentences.append(
            f"Started again after {record.get('after')} updates: {record.get('reason')}. "
            f"Since then {words}."
        )
    return sentences


def _headline(found: Objects) -> str:
    """`231 objects in 4 images`."""
    seen, available = len(found.images), found.available
    objects = f"{found.count:,} object{'s' * (found.count != 1)} in"
    if any(image.part is not None for image in found.images):
        objects += " the middle of"
    if seen < available:
        return f"{objects} the first {seen} of {available:,} images"
    return f"{objects} {seen} image{'s' * (seen != 1)}"


def _notes(found: Objects) -> list[str]:
    """Sentences on the counts."""
    notes = []
    if found.interval is not None:
        low, high = found.interval
        sure = "" if found.has_interval else "; this is too sure, as the model is not calibrated"
        notes.append(f"With 90 % confidence there are {low:,} to {high:,}{sure}.")
    counts = [image.count for image in found.images]
    if len(counts) > 1:
        mean = sum(counts) / len(counts)
        notes.append(f"{mean:.1f} in an image on average, {min(counts):,} to {max(counts):,}.")
    true = [image.true_count for image in found.images if image.true_count is not None]
    if len(true) == len(counts):
        notes.append(f"In truth there are {sum(true):,}.")
    if any(image.part is not None for image in found.images):
        notes.append("Of larger images, the middle was looked at.")
    return notes


def _shown_images(run: Run, found: Objects) -> list[dict[str, Any]]:
    """Pictures with their captions."""
    shown = []
    for image in found.images:
        if image.picture is None:
            continue
        height, width = image.size
        words = f"{image.count:,} found"
        if image.interval is not None and image.interval[0] < image.interval[1]:
            low, high = image.interval
            words += f", {low:,} to {high:,} at 90 %"
        if image.true_count is not None:
            words += f"; {image.true_count:,} there"
        if image.floor_count is not None:
            words += f"; watershed: {image.floor_count:,}"
        size = f"{width:,} × {height:,} px"
        if image.part is not None:
            size = f"middle {image.part[1]:,} × {image.part[0]:,} of {size}"
        data = _embedded(picture_path(run.path, image.picture))
        shown.append({"name": image.name, "words": words, "size": size, "data": data})
    return shown


def _counts(found: Objects) -> Markup | None:
    counts = [image.count for image in found.images]
    if len(counts) == 1:
        return None
    return histogram(counts, x_label="objects in an image", y_label="images")


def _groups(run: Run, found: Objects) -> list[dict[str, Any]]:
    """Pictures of groups with their captions."""
    return [
        {
            "words": f"{group.count:,} object{'s' * (group.count != 1)}, {group.side:.0f} px",
            "data": _embedded(picture_path(run.path, group.picture)),
        }
        for group in found.groups
    ]


def _commands(run: Run, found: Objects | None, *, has_truth: bool) -> tuple[str, ...]:
    """The next commands, if the run has found something."""
    data = run.config.data
    if found is None:
        return ()
    is_folder = data.name == "folder"
    image = run.path / "example.png"
    if is_folder:  # of which one image may be all
        folder = Path(data.path)
        image = folder if folder.is_file() else folder / found.images[0].name
    return next_commands(run, image, has_truth=has_truth)


def _warnings(path: Path) -> list[str]:
    """The warnings of a training."""
    advice = "remove the file, or train again"
    signs = _read_json(path, _MAX_SIGNS_BYTES, "a list of warnings", advice)
    if signs is None:
        return []
    warnings = signs.get("warnings") if isinstance(signs, dict) else None
    if not isinstance(warnings, list) or not all(isinstance(item, str) for item in warnings):
        raise InputError(f"{path}: not a list of warnings; {advice}")
    return warnings[:_MAX_WARNINGS]


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
    found = [line(steps, "found", "training"), line(validations, "found", "validation")]
    drawn = {
        "Objects found": chart(found, x_label="updates", y_label="objects in an image"),
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
    records = [{**groups[str(n)], "objects": n} for n in sorted(map(int, groups))]
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
    advice = "evaluate the run again, or remove the file"
    test = _read_json(path, _MAX_TEST_BYTES, "a file of figures", advice)
    if test is None:
        return None
    groups = test.get("by_objects") if isinstance(test, dict) else None
    figures = [test.get("overall"), *groups.values()] if isinstance(groups, dict) else [None]
    if not all(isinstance(item, dict) for item in figures) or not all(
        number.isdecimal() and len(number) < 10 for number in groups or {}
    ):
        raise InputError(f"{path}: not the figures of a detector; {advice}")
    report: dict[str, Any] = test
    return report


def _read_json(path: Path, max_bytes: int, kind: str, advice: str) -> Any:
    """The content of a JSON file, None if there is no file. Raises InputError."""
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            raise InputError(f"{path}: not {kind}; {advice}")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON; {advice}") from None


def _pictures(folder: Path) -> list[Picture]:
    """The first, the middle and the last."""
    if not folder.is_dir():
        return []
    matches = [(_PICTURE.fullmatch(path.name), path) for path in folder.iterdir()]
    found = sorted((int(match[1]), path) for match, path in matches if match)
    chosen = sorted({0, len(found) // 2, len(found) - 1}) if found else []
    return [Picture(found[i][0], _embedded(found[i][1])) for i in chosen]


def _embedded(path: Path) -> str | None:
    """A PNG in base 64, reduced if it is large; None if it cannot be used."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_PICTURE_BYTES:
            return None
        data = path.read_bytes()
        if data.startswith(_PNG) and len(data) > _MAX_PLAIN_BYTES:
            data = encoded(reduced(read_image(path), _MAX_SIDE))
    except (OSError, InputError):
        return None
    return base64.b64encode(data).decode() if data.startswith(_PNG) else None


def _figure(value: Any) -> str:
    """A figure of a table; a dash for what is not there or says nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:z.3f}"
