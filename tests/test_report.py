"""report.html: complete, self-contained, and free of injected markup."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter

from spairkit import metrics
from spairkit.config import Config
from spairkit.config_values import from_dict, to_toml
from spairkit.errors import InputError
from spairkit.evaluation import Figures, Report
from spairkit.images import write_png
from spairkit.report.curves import MAX_BARS, MAX_POINTS, chart, histogram, line
from spairkit.report.objects import Floor, FoundImage, Group, Objects
from spairkit.report.page import write_report

HOSTILE = "</pre><script>alert('1')</script><img src=x onerror=\"alert(2)\">"


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def make_run(folder: Path, config: Config | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config or Config()))
    return folder


def write_metrics(folder: Path, records: list[dict[str, Any]], rest: str = "") -> None:
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, rest]))


def step(number: int) -> dict[str, Any]:
    terms = ("reconstruction", "kl_where", "kl_what", "kl_depth", "kl_pres", "total")
    values = {name: 1000.0 / (number + 10) + i for i, name in enumerate(terms)}
    return {"kind": "step", "step": number, **values}


def validation(number: int) -> dict[str, Any]:
    return {
        "kind": "validation",
        "step": number,
        "elbo": -500.0 + number / 100,
        "ap": number / 2000,
        "ap_spair": number / 2500,
        "count_accuracy": number / 1500,
        "is_best": True,
    }


def write_picture(folder: Path, number: int, colour: tuple[int, int, int]) -> bytes:
    path = folder / "pictures" / f"step-{number}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path.read_bytes()


def write_objects(folder: Path, **changes: Any) -> Objects:
    """Objects of two of five images, with pictures."""
    images = (
        FoundImage(name="a.png", size=(30, 40), count=12, interval=(11, 14), picture="image-1.png"),
        FoundImage(name="b.png", size=(30, 40), count=1200, interval=(1190, 1211)),
    )
    group = Group(count=1212, side=11.6, picture="group-1.png")
    values: dict[str, Any] = {
        "available": 5,
        "images": images,
        "interval": (1201, 1224),
        "groups": (group,),
    }
    found = Objects(**values | changes)
    (folder / "objects").mkdir()
    (folder / "objects" / "objects.json").write_bytes(TypeAdapter(Objects).dump_json(found))
    for name in ("image-1.png", "group-1.png"):
        Image.new("RGB", (8, 8), (9, 8, 7)).save(folder / "objects" / name)
    return found


def report(measured_on: str) -> Report:
    figures = Figures(40, 90, 0.7125, 0.61, 0.44, 0.93, 0.31, 0.875, 0.15, -0.05)
    none = Figures(8, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.25, 0.25)
    return Report(measured_on, 0.5, figures, {0: none, 2: figures, 10: figures})


def full_run(folder: Path, name: str = "digits") -> Path:
    config = from_dict({"data": {"name": "mnist", "path": name}, "preset": name})
    make_run(folder, config)
    steps = [step(n) for n in range(20, 1001, 20)]
    write_metrics(folder, [*steps, validation(500), validation(1000)])
    for number in (500, 1000):
        write_picture(folder, number, (number // 4, 0, 0))
    (folder / "test.json").write_text(json.dumps(report(name).to_json()))
    return folder


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_page_contains_figures_curves_pictures_and_config(tmp_path: Path) -> None:
    path = write_report(full_run(tmp_path / "digits-quick-1"))
    assert path == tmp_path / "digits-quick-1" / "report.html"
    page = read(path)
    assert page.open == []
    assert page.count("svg") == 5  # loss, KL, boxes and counts, ELBO, by number
    for word in ("digits-quick-1", "0.713", "0.875", "-0.050", "1000 of 300000", "cell = 12"):
        assert word in page.text
    for protocol in metrics.PROTOCOLS.values():
        assert protocol in page.text
    for title in ("reconstruction", "where", "count right", "updates"):
        assert title in page.text


def test_page_begins_with_the_objects(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    write_objects(folder)
    page = read(write_report(folder))
    assert page.open == []
    headline = page.text.index("1,212 objects in the first 2 of 5 images")
    for word in (
        "With 90 % confidence there are 1,201 to 1,224.",
        "606.0 in an image on average, 12 to 1,200.",
        "12 found, 11 to 14 at 90 %",
        "40 × 30 px",
        "1,212 objects, 12 px",
    ):
        assert word in page.text
    assert headline < page.text.index("Counts") < page.text.index("Test figures")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    data = base64.b64encode((folder / "objects" / "image-1.png").read_bytes()).decode()
    assert sources[0] == f"data:image/png;base64,{data}"
    assert len(sources) == 4
    assert page.count("svg") == 6, "the histogram, loss, KL, boxes, ELBO and by number"


def test_losses_validations_and_settings_are_folded(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    write_objects(folder)
    text = write_report(folder).read_text()
    folds = re.findall(r"<details>.*?</details>", text, re.S)
    assert "<details open" not in text
    for word in ("Training loss", "after 500 updates", "cell = 12", "How the figures are measured"):
        assert word not in re.sub(r"<details>.*?</details>", "", text, flags=re.S)
        assert any(word in fold for fold in folds)


def test_one_image_has_no_histogram(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    image = FoundImage(name="a.png", size=(30, 40), count=1, true_count=2, picture="image-1.png")
    write_objects(folder, images=(image,), available=1, interval=None, groups=())
    page = read(write_report(folder))
    assert "1 object in 1 image" in page.text
    assert "In truth there are 2." in page.text
    assert page.count("svg") == 0
    assert "Groups" not in page.text


def test_uncalibrated_intervals_and_parts_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    image = FoundImage(
        name="a.png", size=(4000, 6000), part=(1024, 1024), count=9, picture="image-1.png"
    )
    write_objects(folder, images=(image,), has_interval=False, interval=(8, 10))
    page = read(write_report(folder))
    assert "8 to 10; this is too sure, as the model is not calibrated." in page.text
    assert "Of larger images, the middle was looked at." in page.text
    assert "middle 1,024 × 1,024 of 6,000 × 4,000 px" in page.text


def test_classical_method_stands_beside_the_model(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    image = FoundImage(name="a.png", size=(30, 40), count=9, floor_count=11, picture="image-1.png")
    floor = Floor(name="watershed", count=11, agreement=0.8125)
    write_objects(folder, images=(image,), floor=floor)
    page = read(write_report(folder))
    assert "9 found" in page.text
    assert "watershed: 11" in page.text
    assert "81%" in page.text
    assert "Beside a classical method" in page.text


def test_warnings_and_next_commands_are_shown(tmp_path: Path) -> None:
    settings = from_dict({"data": {"name": "folder", "path": "/my cells"}})
    folder = make_run(tmp_path / "run", settings)
    write_objects(folder)
    (folder / "signs.json").write_text(json.dumps({"warnings": ["Every cell is on.", HOSTILE]}))
    page = read(write_report(folder))
    assert page.text.index("Every cell is on.") < page.text.index("1,212 objects")
    assert HOSTILE in page.text
    assert page.count("script") == 0
    assert f"spairkit viz '/my cells/a.png' --checkpoint {folder}" in page.text
    assert f"spairkit detect '/my cells' --out found.json --checkpoint {folder}" in page.text
    failed = {"warnings": ["Every cell is on."], "failed": True}
    (folder / "signs.json").write_text(json.dumps(failed))
    page = read(write_report(folder))
    assert page.text.index("This training failed") < page.text.index("1,212 objects")
    assert "spairkit viz" not in page.text
    (folder / "signs.json").unlink()
    assert "Warnings" not in read(write_report(folder)).text


@pytest.mark.parametrize("content", ["", "[]", '{"warnings": 3}', '{"warnings": [3]}', "[" * 99999])
def test_damaged_warnings_are_refused(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "signs.json").write_text(content)
    with pytest.raises(InputError, match=r"signs\.json: not .*; remove the file, or train again"):
        write_report(folder)


def test_hostile_names_of_images_are_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    image = FoundImage(name=HOSTILE, size=(30, 40), count=9, picture="image-1.png")
    write_objects(folder, images=(image,))
    page = read(write_report(folder))
    assert page.open == []
    assert page.count("script") == 0
    assert page.count("img") == 2
    assert HOSTILE in page.text


def test_missing_pictures_of_objects_are_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_objects(folder)
    (folder / "objects" / "image-1.png").write_bytes(b"GIF89a")
    (folder / "objects" / "group-1.png").unlink()
    page = read(write_report(folder))
    assert page.text.count("The picture cannot be read.") == 2


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "pictures").mkdir()
    noise = torch.rand(3, 1200, 1600, generator=torch.Generator().manual_seed(0))
    write_png(folder / "pictures" / "step-9.png", noise)
    page = read(write_report(folder))
    [source] = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
        assert picture.size == (1000, 750)


def test_figures_by_number_stand_over_the_number(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    text = write_report(folder).read_text()
    start = text.index("By number of objects</h3>")
    ticks = re.findall(r">(\d+)</text>", text[start : text.index("</svg>", start)])
    assert "10" in ticks, "the axis ends at ten objects"
    assert "90" not in ticks, "not at the sum of all objects"


def test_histogram_has_a_bar_for_each_range() -> None:
    def bars(counts: list[int]) -> int:
        svg = histogram(counts, x_label="objects", y_label="images")
        return svg.count("#0072b2")

    assert bars([1, 2, 2, 5]) == 3
    assert bars([7]) == 1
    assert bars(list(range(1000))) == MAX_BARS
    assert bars([0] * 5 + [10**6]) == 2


def test_curves_are_drawn_from_the_metrics(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_metrics(folder, [validation(n) for n in (100, 200, 300, 400)])
    first = write_report(folder).read_text()
    # one path of four points for each of the three lines, another for the ELBO
    assert len(re.findall(r'd="M [^"]*?L [^"]*?L [^"]*?L [^"L]*"', first)) >= 4
    write_metrics(folder, [validation(n) for n in (100, 200, 300, 900)])
    assert write_report(folder).read_text() != first


def test_box_figures_of_images_without_objects_are_dashes(tmp_path: Path) -> None:
    page = (write_report(full_run(tmp_path / "run"))).read_text()
    row = page[page.index("<td>0</td>") : page.index("<td>2</td>")]
    cells = re.findall("<td>(.*?)</td>", row)
    assert cells == ["0", "8", *["–"] * 5, "0.750", "0.250", "0.250"]


def test_intervals_of_counts_have_columns_where_they_are_measured(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    assert read(write_report(folder)).text.count("90 % holds") == 1, "the protocol only"
    figures = report("digits").to_json()
    figures["overall"] |= {"interval_coverage": 0.925, "interval_width": 1.375}
    (folder / "test.json").write_text(json.dumps(figures))
    page = read(write_report(folder))
    assert page.text.count("90 % holds") == 3, "a figure, a column and the protocol"
    assert page.text.count("0.925") == page.text.count("1.375") == 2


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = read(write_report(full_run(tmp_path / "run")))
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href") and tag != "svg":
                assert (value or "").startswith(("data:image/png;base64,", "#"))
    assert "url(http" not in (tmp_path / "run" / "report.html").read_text()


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "<script>alert(3)<\\script>", name=HOSTILE)
    page = read(write_report(folder))
    assert page.open == []
    assert page.count("script") == 0
    assert page.count("img") == 2
    assert HOSTILE in page.text
    assert "<script>alert(3)<\\script>" in page.text


def test_restarts_are_told_at_the_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    restart = {
        "kind": "restart",
        "step": 0,
        "after": 250,
        "reason": f"91% of cells are on {HOSTILE}",
    }
    hostile = {**restart, "changed": {"train.seed": HOSTILE}}
    records = [hostile, {**restart, "changed": {"train.seed": 2}}, {**restart, "changed": 3}]
    write_metrics(run, [*records, step(20)])
    page = Page(write_report(run).read_text())
    said = (
        f"Started again after 250 updates: 91% of cells are on {HOSTILE}. Since then train.seed = "
    )
    assert page.text.count(said) == 2
    assert f"{said}2." in page.text
    assert page.count("script") == 0


def test_first_middle_and_last_pictures_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    pictures = {n: write_picture(folder, n, (n // 10, n // 20, 0)) for n in range(200, 1300, 100)}
    (folder / "pictures" / "step-70.png").write_bytes(b"GIF89a no PNG at all")
    (folder / "pictures" / "notes.txt").write_text("not a picture")
    page = read(write_report(folder))
    shown = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    data = [base64.b64decode(source.split(",")[1]) for source in shown]
    assert data == [pictures[700], pictures[1200]]
    assert "after 70 updates" in page.text
    assert "The picture cannot be read." in page.text


@pytest.mark.parametrize("content", [None, "", "{\n", '[1]\n{"kind": "step"}\n{"step": "x"}\n'])
def test_run_without_metrics_has_a_page(tmp_path: Path, content: str | None) -> None:
    folder = make_run(tmp_path / "run")
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    page = read(write_report(folder))
    assert "Nothing was recorded yet." in page.text
    assert "0 of 300000 updates" in page.text
    assert page.count("svg") == 0


def test_non_numeric_metrics_are_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    odd: list[Any] = [None, "high", [1], 10**400, float("inf")]
    records = [{"kind": "step", "step": i, "total": value} for i, value in enumerate(odd)]
    records += [{"kind": "step", "step": 10**400, "total": 1.0}, {"kind": [], "step": 3}]
    write_metrics(folder, [*records, step(40)], rest='{"kind": "step", "st')
    page = read(write_report(folder))
    assert page.count("svg") == 2


def test_validation_replaces_missing_test_figures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_metrics(folder, [validation(500), validation(1000)])
    page = read(write_report(folder))
    assert "Last validation" in page.text
    assert "After 1000 updates" in page.text
    assert "-490.000" in page.text


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"overall": 3, "by_objects": {}}', '{"overall": {}}', "\x00", "[" * 100_000,
     '{"overall": {}, "by_objects": {"x": {}}}', '{"overall": {}, "by_objects": {"1": []}}'],
)  # fmt: skip
def test_invalid_test_figures_are_refused(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "test.json").write_text(content)
    with pytest.raises(InputError, match=r"test\.json: not .*; evaluate the run again"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run"):
        write_report(tmp_path)


def test_report_is_deterministic(tmp_path: Path) -> None:
    folder = full_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_objects_found_in_training_have_a_curve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_metrics(folder, [step(n) | {"found": 40.0 - n / 10} for n in (20, 40, 60)])
    page = read(write_report(folder))
    assert "Objects found" in page.text
    assert page.text.index("Objects found") < page.text.index("Training loss")
    assert page.count("svg") == 3


def test_long_curves_are_averaged() -> None:
    records = [{"step": n, "total": float(torch.tensor(n % 2))} for n in range(10 * MAX_POINTS)]
    averaged = line(records, "total", "total")
    assert len(averaged.x) == MAX_POINTS
    assert averaged.y == [0.5] * MAX_POINTS
    assert averaged.x[:2] == [4.5, 14.5]
    assert line(records, "missing", "missing").x == []
    assert chart([line([], "total", "total")], x_label="x", y_label="y") is None
