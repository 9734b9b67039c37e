"""The commands against pycocotools on annotated folders; annotations as programs export them."""

import contextlib
import io
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spairkit.cli.main import main
from spairkit.data import folder as folder_module

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # the command prints them

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """Runs a command in this process, in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: object) -> tuple[int, str, str]:
        folder_module._warn_once.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capfd.readouterr()

    return run_command


def blobs(folder: Path, number: int = 6, category: int = 1) -> dict[str, Any]:
    """A folder of bright discs, one to three in an image, and its annotations."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:72, :96]
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(number):
        pixels = np.zeros((72, 96), np.uint8)
        for cy, cx in np.array([(18, 18), (18, 60), (52, 40)])[: 1 + i % 3]:
            cy, cx = cy + rng.integers(-3, 4), cx + rng.integers(-3, 4)
            pixels[(y - cy) ** 2 + (x - cx) ** 2 <= 36] = 230
            box = {"bbox": [int(cx) - 6, int(cy) - 6, 13, 13], "area": 113, "iscrowd": 0}
            ids = {"id": len(boxes) + 1, "image_id": i + 1, "category_id": category}
            boxes.append(box | ids)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        images.append({"id": i + 1, "file_name": f"{i:03}.png", "width": 96, "height": 72})
    categories = [{"id": category, "name": "blob"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    save(folder, content)
    return content


def save(folder: Path, content: dict[str, Any]) -> None:
    (folder / "annotations.json").write_text(json.dumps(content))


def pycocotools_ap(folder: Path, found: Path, *, one_class: bool) -> tuple[float, float, float]:
    """AP, AP50 and AP75 of a file of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "annotations.json")
        evaluation = COCOeval(coco, coco.loadRes(str(found)), "bbox")
        evaluation.params.useCats = int(not one_class)
        evaluation.params.maxDets = [10**6]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 0].mean(1)
    return float(precision.mean()), float(precision[0]), float(precision[5])


def plain(content: dict[str, Any]) -> None:
    """One category of id 1."""


def category_7(content: dict[str, Any]) -> None:
    """Case 07 of the reported ones."""
    content["categories"][0]["id"] = 7
    for box in content["annotations"]:
        box["category_id"] = 7


def crowd(content: dict[str, Any]) -> None:
    """Case 09: a region in place of the objects of the lower half."""
    for box in content["annotations"]:
        if box["bbox"][1] > 36:
            box.update(iscrowd=1, bbox=[0, 36, 96, 36], area=96 * 36)


def odd_ids(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["id"] = image["id"] ** 7
    for number, box in enumerate(content["annotations"]):
        box.update(id=10**9 - 3 * number, image_id=box["image_id"] ** 7)


def many_categories(content: dict[str, Any]) -> None:
    content["categories"] = [{"id": n, "name": str(n)} for n in (40, 3, 90)]
    for number, box in enumerate(content["annotations"]):
        box["category_id"] = (40, 3, 90)[number % 3]


def everything(content: dict[str, Any]) -> None:
    for change in (crowd, many_categories, odd_ids):
        change(content)
    content["annotations"][0]["bbox"] = [5, 5, 20, 20]  # boxes that are near or leave the image
    content["annotations"][1]["bbox"][0] = -4


@pytest.mark.parametrize("change", [plain, category_7, crowd, odd_ids, many_categories, everything])
def test_eval_and_pycocotools_agree_on_what_detect_wrote(
    run: Command, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = Path("set")
    content = blobs(folder)
    change(content)
    save(folder, content)
    options = ("--search", "off", "--quiet")
    status, _, err = run("detect", folder, "--threshold", 0.05, "--out", "found.json", *options)
    assert status == 0
    one_class = len(content["categories"]) > 1
    assert ("compare them with useCats = 0" in err) == one_class
    status, out, _ = run("eval", "--data", folder, "--json", *options)
    assert status == 0
    figures = json.loads(out)["overall"]
    ours = tuple(figures[key] for key in ("ap_coco", "ap50", "ap75"))
    expected = pycocotools_ap(folder, Path("found.json"), one_class=one_class)
    assert ours == pytest.approx(expected, abs=1e-9)
    assert expected[1] > 0.3
    results = json.loads(Path("found.json").read_text())
    assert {result["category_id"] for result in results} == {content["categories"][0]["id"]}


def test_crowds_have_no_part_in_counts(run: Command) -> None:
    content = blobs(Path("set"))
    crowd(content)
    save(Path("set"), content)
    _, out, _ = run("eval", "--data", "set", "--json", "--quiet")
    assert abs(json.loads(out)["overall"]["count_bias"]) < 0.4  # it was .667


def fraction(content: dict[str, Any]) -> None:
    content["images"][0].update(width=96.0, height=72.0)


def null(content: dict[str, Any]) -> None:
    content["images"][0].update(width=None, height=None)


def no_categories(content: dict[str, Any]) -> None:
    content.pop("categories")


def crowd_without_box(content: dict[str, Any]) -> None:
    content["annotations"][3].update(iscrowd=1, bbox=[0, 0, 0, 0])


def absent(content: dict[str, Any]) -> None:
    content["images"].append({"id": 99, "file_name": "gone.png"})


@pytest.mark.parametrize("change", [fraction, null, no_categories, crowd_without_box, absent])
def test_annotations_as_exported_are_read(
    run: Command, change: Callable[[dict[str, Any]], None]
) -> None:
    """Case 10 of the reported ones: every command that reads the folder."""
    content = blobs(Path("set"))
    change(content)
    save(Path("set"), content)
    told = change in (crowd_without_box, absent)
    for command in (("detect", "set"), ("eval", "--data", "set"), ("viz", "set")):
        status, _, err = run(*command, "--search", "off")
        assert status == 0, err
        assert err.count("passed over") == told


def test_name_in_another_unicode_form_is_found(run: Command) -> None:
    """Case 19 of the reported ones."""
    content = blobs(Path("set"), 1)
    name = "zell\u00e9.png"
    Path("set/000.png").rename(Path("set", unicodedata.normalize("NFD", name)))
    content["images"][0].update(file_name=name, id=12)
    content["annotations"][0]["image_id"] = 12
    save(Path("set"), content)
    _, out, _ = run("detect", "set", "--quiet")
    assert {result["image_id"] for result in json.loads(out)} == {12}
    assert run("eval", "--data", "set", "--quiet")[0] == 0


def test_no_annotation_stops_detect(run: Command) -> None:
    content = blobs(Path("set"), 2)
    content["annotations"][0]["bbox"] = "none"
    save(Path("set"), content)
    status, out, err = run("detect", "set", "--quiet")
    assert status == 0
    assert {result["image_id"] for result in json.loads(out)} == {1, 2}
    (line,) = (line for line in err.splitlines() if line.startswith("spairkit: warning"))
    assert "bbox must be x, y, width and height" in line
    assert line.endswith("the annotations are left out, and ids of images count from 1")
    status, _, err = run("eval", "--data", "set", "--quiet")
    assert status == 2
    assert "bbox must be" in err


def mutated_annotations(run: Command, number: int) -> None:
    """Each gives a result, or one line and status 2; `detect` always gives a result."""
    content = blobs(Path("set"), 2)
    crowd(content)
    rng = random.Random(0)
    path = Path("set/annotations.json")
    statuses = {"detect": [0, 0, 0], "eval": [0, 0, 0]}
    for n in range(number):
        path.write_bytes(mutation(content, rng))
        for command in ("detect", "eval") if n % 4 == 0 else ("eval",):
            options = ("set", "--out", "x.json") if command == "detect" else ("--data", "set")
            status, out, err = run(command, *options, "--quiet", "--search", "off")
            assert status in (0, 2), err
            assert "Traceback" not in err
            if status == 2:
                lines = err.removesuffix("\n").split("\n")
                lines = [line for line in lines if not line.startswith("no run under")]
                assert len(lines) == 1, err
                assert lines[0].startswith("spairkit: ")
                assert lines[0].isprintable()
                assert out == ""
            statuses[command][status] += 1
    assert statuses["detect"][2] == 0
    assert min(statuses["eval"][0], statuses["eval"][2]) > number / 10, statuses


VALUES: list[Any] = [
    None, True, -1, 0, 1.0, 1.5, 1e300, float("nan"), float("inf"), 10**30, "x", "", [], {}, [1],
    [0, 0, 0, 0], [1, 2, 3, 4], [1e9, 0, 1, 1], "../000.png", "\ud800", "a\nb", "000.png",
    "x" * 5000,
]  # fmt: skip


def mutation(content: dict[str, Any], rng: random.Random) -> bytes:
    """Some bytes changed, or some values replaced by others."""
    if rng.random() < 0.4:
        data = bytearray(json.dumps(content).encode())
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789-.eE[]{},:"abc \xff')
        return bytes(data)
    changed = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 3))):
        entry = rng.choice([*changed["images"], *changed["annotations"], *changed["categories"]])
        key = rng.choice([*entry, "width", "file_name", "bbox"])
        if rng.random() < 0.2:
            entry.pop(key, None)
        else:
            entry[key] = rng.choice(VALUES)
    return json.dumps(changed).encode()


def test_mutated_annotations_give_a_result_or_one_line(run: Command) -> None:
    mutated_annotations(run, 40)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_500_mutated_annotations_give_a_result_or_one_line(run: Command) -> None:
    mutated_annotations(run, 500)
