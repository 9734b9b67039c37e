"""Runs that were copied without their links, moved, edited, or made by strangers."""

import json
import os
import re
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from spairkit.cli.main import main
from spairkit.config_values import load_toml
from spairkit.images import write_png
from spairkit.storage.checkpoints import best_step, load_checkpoint
from spairkit.storage.runs import Run, recorded_data

if TYPE_CHECKING:
    from conftest import Ended

# SPAIR of a few weights, which trains in a blink
TINY = """
preset = "quick"
[data]
image_height = 24
image_width = 24
validation_images = 4
[prepare]
contrast = "none"
[model]
background = "black"
backbone_channels = [4, 4, 4]
features = 4
hidden = 4
passthrough = 2
what = 2
encoder_hidden = [4]
decoder_hidden = [4]
[search]
mode = "off"
[train]
batch_size = 2
validation_every = 2
training_wheels = 0
select = "ap"
"""


Runner = Callable[..., "Ended"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in a folder with tiny.toml and `cells/`: annotated images."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("cells").mkdir()
    images, annotations = [], []
    for n in range(4):
        image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(n)) / 4
        image[:, 4 : 12 + n, 6:14] = 1.0
        write_png(f"cells/{n}.png", image)
        images.append({"id": n, "file_name": f"{n}.png", "width": 24, "height": 24})
        box = {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [6, 4, 8, 8 + n]}
        annotations.append(box | {"area": 64, "iscrowd": 0})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    Path("cells/annotations.json").write_text(json.dumps(truth))

    return in_process


def trained(run: Runner, steps: int = 4, out: str = "run") -> Path:
    words = ["--config", "tiny.toml", "--data", "cells", "--steps", steps, "--quiet"]
    ended = run("train", *words, "--out", out)
    assert ended.status == 0, ended.err
    return Path(out)


def followed(source: Path, target: Path) -> None:
    """As by `cp -L`."""
    shutil.copytree(source, target)


def zipped(source: Path, target: Path) -> None:
    """A zip of the files, without links."""
    with zipfile.ZipFile("run.zip", "w") as archive:
        for path in source.rglob("*"):
            if path.is_file() and not {"best", "last"} & set(path.relative_to(source).parts):
                archive.write(path, path.relative_to(source))
    zipfile.ZipFile("run.zip").extractall(target)


def flattened(source: Path, target: Path) -> None:
    """As some archivers do: links become files with the name of the target."""
    zipped(source, target)
    for name in ("best", "last"):
        (target / name).write_text(os.readlink(source / name))


COPIES = [followed, zipped, flattened]


@pytest.mark.parametrize("copied", COPIES)
def test_copy_without_links_evaluates_and_goes_on(
    run: Runner, copied: Callable[[Path, Path], None]
) -> None:
    whole = trained(run)
    copied(whole, Path("copy"))
    assert not any(Path("copy", name).is_symlink() for name in ("best", "last"))
    for name in ("", "best", "last"):
        figures = [
            json.loads(run("eval", "--checkpoint", Path(where, name), "--json").out)
            for where in ("run", "copy")
        ]
        assert figures[0]["overall"] == figures[1]["overall"]
        assert figures[0]["step"] == figures[1]["step"]
    # the learning rate is that of more steps, in both
    for where in ("run", "copy"):
        ended = run("train", "--resume", where, "--steps", 8, "--quiet")
        assert ended.status == 0, ended.err
    for name in ("best", "last"):
        one, other = (load_checkpoint(Path(w, name), with_optimiser=True) for w in ("run", "copy"))
        assert one.sha256 == other.sha256
    assert Path("copy/last").is_symlink()


@pytest.mark.parametrize("copied", COPIES)
def test_copy_without_links_keeps_its_best_checkpoint(
    tmp_path: Path, run: Runner, copied: Callable[[Path, Path], None]
) -> None:
    whole = Run.open(trained(run))
    latest = whole.latest()
    assert latest is not None
    assert latest.optimiser is not None

    def save(made: Run, step: int, *, is_best: bool = False) -> None:
        assert latest is not None
        assert latest.optimiser is not None
        made.save(
            step=step,
            model=latest.model,
            optimiser=latest.optimiser,
            metrics={},
            environment={},
            is_best=is_best,
        )

    save(whole, 5, is_best=True)
    save(whole, 6)
    save(whole, 7)
    copied(whole.path, tmp_path / "copy")
    copy = Run.open(tmp_path / "copy")
    for step in (8, 9, 10):
        save(copy, step)
        assert load_checkpoint(copy.path).step == 5
        assert best_step(copy.path) == 5
    assert [step for step, _ in copy.checkpoints] == [10, 9, 5]
    save(copy, 11, is_best=True)
    assert [step for step, _ in copy.checkpoints] == [11, 10]
    assert load_checkpoint(copy.path / "best").step == 11
    assert os.readlink(copy.path / "best") == "checkpoints/step-11"


def test_links_are_not_needed(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT and some cloud drives."""

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    path = trained(run)
    assert not os.path.lexists(path / "last")
    assert load_checkpoint(path / "last").step == 4
    assert not [name for name in os.listdir(path) if "tmp" in name]


def test_moved_images_are_named_anew(run: Runner) -> None:
    path = trained(run)
    os.rename("cells", "moved")
    for words in (["train", "--resume", path, "--steps", 6], ["eval", "--checkpoint", path]):
        ended = run(*words)
        assert ended.status == 2
        assert ended.err.splitlines()[-1].endswith(
            "/cells: the images of the run are not there; if they have moved, give them with --data"
        )
    ended = run("eval", "--checkpoint", path, "--data", "moved", "--json")
    assert ended.status == 0
    assert "including the training images" in json.loads(ended.out)["measured_on"]
    ended = run("train", "--resume", path, "--steps", 6, "--data", "moved", "--quiet")
    assert ended.status == 0, ended.err
    assert "changed" not in ended.err
    assert load_toml(path / "config.toml")["data"]["path"].endswith("/moved")
    assert load_checkpoint(path / "last").config.data.path.endswith("/moved")
    assert load_checkpoint(path / "last").step == 6
    assert run("eval", "--checkpoint", path).status == 0
    ended = run("train", "--resume", path, "--data", "moved", "--set", "data.seed=1")
    assert ended.status == 2
    assert "a run keeps its settings, but these differ: data.seed: 0 -> 1; leave" in ended.err


def test_moved_images_give_the_same_bits(run: Runner) -> None:
    for name in ("whole", "cut"):
        trained(run, 4, name)
    shutil.copytree("cells", "moved")
    assert run("train", "--resume", "whole", "--steps", 8, "--quiet").status == 0
    ended = run("train", "--resume", "cut", "--steps", 8, "--data", "moved", "--quiet")
    assert ended.status == 0, ended.err
    one, other = (load_checkpoint(Path(w, "last"), with_optimiser=True) for w in ("whole", "cut"))
    assert all(torch.equal(one.model[k], other.model[k]) for k in one.model)
    assert Path("whole/metrics.jsonl").read_bytes() == Path("cut/metrics.jsonl").read_bytes()


SHARED = {
    "compare": (
        *("compare", "--out", "shared", "--models", "spair,conncomp", "--seeds", 1),
        *("--budget", 4, "--search", "off", "--set", "prepare.contrast=none"),
        *("--set", "data.image_height=24", "--set", "data.image_width=24"),
        *("--set", "data.validation_images=2", "--set", "train.batch_size=2"),
        *("--set", "spair.model.backbone_channels=[4]", "--set", "spair.model.features=4"),
        *("--set", "spair.model.encoder_hidden=[4]", "--set", "spair.model.decoder_hidden=[4]"),
        *("--set", "conncomp.model.images=2", "--set", "conncomp.train.steps=2"),
    ),
    "sweep": (
        *("sweep", "--out", "shared", "--config", "tiny.toml", "--trials", 2),
        *("--set", "train.steps=4"),
    ),
}
RESUMED = {
    "compare": ("compare", "--out", "shared", "--quiet"),
    "sweep": ("sweep", "--out", "shared", "--trials", 2, "--quiet"),
}


@pytest.mark.parametrize("command", SHARED)
def test_moved_images_of_a_comparison_or_a_sweep_are_named_anew(
    run: Runner, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Ends the process at once."""

    save, resumed = Run.save, RESUMED[command]

    def save_and_die(self: Run, **values: Any) -> Path:
        save(self, **values)
        raise KilledError

    words = [*map(str, SHARED[command]), "--data", "cells", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", save_and_die)
        with pytest.raises(KilledError):
            main(words)
    os.rename("cells", "moved")
    files = [path for path in Path("shared").rglob("*") if path.suffix in (".json", ".toml")]
    before = {path: path.read_bytes() for path in files}
    ended = run(*resumed)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        f"spairkit: {Path.cwd()}/cells: the images of the run are not there; if they have moved, "
        "give them with --data"
    )
    shutil.copytree("moved", "others")
    write_png("others/1.png", torch.zeros(3, 24, 24))
    os.remove("others/2.png")
    ended = run(*resumed, "--data", "others")
    assert ended.status == 2
    assert ended.err.splitlines() == [
        f"spairkit: {Path.cwd()}/others: not the images of shared: 1 changed (1.png), 1 missing "
        "(2.png); pass another --out"
    ]
    assert before == {path: path.read_bytes() for path in files}, "nothing is written"
    ended = run(*resumed, "--data", "moved")
    assert ended.status == 0, ended.err
    assert "changed" not in ended.err
    assert run(*resumed).status == 0, "the new place is remembered"
    trained = next(path for path in Path("shared").rglob("last") if "conncomp" not in str(path))
    resumed_bits = load_checkpoint(trained).model
    # the result is that of a sweep or a comparison whose images never moved
    os.rename("moved", "cells")
    os.rename("shared", "resumed")
    whole = run(*SHARED[command], "--data", "cells", "--quiet")
    assert whole.status == 0, whole.err
    whole_bits = load_checkpoint(trained).model
    assert all(torch.equal(resumed_bits[name], whole_bits[name]) for name in whole_bits)


def test_training_on_other_images_is_not_resumed(run: Runner) -> None:
    path = trained(run)
    os.mkdir("others")
    for index in range(4):
        write_png(f"others/{index}.png", torch.full((3, 24, 24), 0.2 * index))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    ended = run("train", "--resume", path, "--data", "others", "--steps", 6, "--quiet")
    assert ended.status == 2
    assert ended.err.splitlines() == [
        f"spairkit: --resume {path}: none of the files in {Path.cwd()}/others is one that the run "
        "was trained on; if these have moved, give their new place with --data, or start a new run"
    ]
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.filterwarnings("always")
def test_run_records_its_images_and_says_when_they_changed(run: Runner) -> None:
    path = trained(run)
    recorded = recorded_data(path)
    assert recorded is not None
    assert sorted(recorded) == ["0.png", "1.png", "2.png", "3.png", "annotations.json"]
    ended = run("train", "--resume", path, "--steps", 5, "--quiet")
    assert "changed" not in ended.err
    write_png("cells/1.png", torch.zeros(3, 24, 24))
    os.rename("cells/2.png", "cells/2b.png")
    truth = json.loads(Path("cells/annotations.json").read_text())
    truth["images"][2]["file_name"] = "2b.png"
    Path("cells/annotations.json").write_text(json.dumps(truth))
    said = "2 changed (1.png, annotations.json), 1 missing (2.png), 1 new (2b.png)"
    ended = run("train", "--resume", path, "--steps", 6, "--quiet")
    assert ended.status == 0
    assert (
        f"{path}: the data have changed since the run began, so the result will differ: {said}"
        in (ended.err)
    )
    assert f"the data have changed since the run began: {said}" in (
        run("eval", "--checkpoint", path).err
    )
    assert recorded_data(path) == recorded


@pytest.mark.parametrize("content", ["{", "[]", '{"0.png": 1}'])
def test_damaged_record_of_the_images_is_refused(run: Runner, content: str) -> None:
    path = trained(run, 1)
    (path / "data.json").write_text(content)
    ended = run("train", "--resume", path, "--steps", 2, "--quiet")
    assert ended.status == 2
    assert ended.err == (
        f"spairkit: {path}/data.json: not a list of hashes; remove it to record the data anew\n"
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("batch_size = 2", "batch_size = 4", "train.batch_size: 2 -> 4"),
        ("what = 2", "what = 3", "model.what: 2 -> 3"),
        ("seed = 0", "seed = 1", "data.seed: 0 -> 1; train.seed: 0 -> 1"),
    ],
)
def test_edited_config_is_refused_by_what_differs(
    run: Runner, before: str, after: str, said: str
) -> None:
    path = trained(run)
    config = (path / "config.toml").read_text()
    (path / "config.toml").write_text(config.replace(before, after))
    files = sorted(path.rglob("*"))
    ended = run("train", "--resume", path, "--steps", 8)
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == (
        f"spairkit: {path}/config.toml: was edited, and differs from the checkpoint of step 4: "
        f"{said}; undo this, or start a new run"
    )
    assert sorted(path.rglob("*")) == files
    assert load_checkpoint(path / "last").step == 4
    (path / "config.toml").write_text(config)
    assert run("train", "--resume", path, "--steps", 5, "--quiet").status == 0


def aim(name: str, path: Path) -> Path:
    """Links what stands at `name` in a run elsewhere; returns the target."""
    target = Path("elsewhere").resolve()
    target.mkdir()
    link = path / name
    if link.is_dir():
        target = target / "folder"
        os.rename(link, target)
    else:
        target = target / "file"
        target.write_text("the user's")
        link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    os.symlink(target, link)
    return target


@pytest.mark.parametrize(
    "name",
    [
        "report.html",
        "checkpoints",
        "checkpoints/step-4",
        "checkpoints/step-4/manifest.json",
        "config.toml",
        "data.json",
        "metrics.jsonl",
        "objects",
        "objects/objects.json",
        "pictures",
        "pictures/step-6.png",
        "signs.json",
        "test.json",
        ".lock",
        ".owner",
        "new",
    ],
)
def test_nothing_follows_a_link_out_of_a_run(run: Runner, name: str) -> None:
    path = trained(run)
    target = aim(name, path)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    for words in (["train", "--resume", path, "--steps", 6], ["report", path]):
        ended = run(*words)
        assert ended.status == 2
        message = ended.err.splitlines()[-1]
        assert message.startswith(f"spairkit: {path / name}: is a link, and spairkit follows none")
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert target.exists()


def test_best_and_last_are_not_followed(run: Runner) -> None:
    path, other = trained(run), trained(run, out="other")
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    for name in ("best", "last"):
        (path / name).unlink()
        os.symlink(other.resolve() / "checkpoints" / "step-4", path / name)
    assert run("train", "--resume", path, "--steps", 8, "--quiet").status == 0
    assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file()} == before
    assert os.readlink(path / "last") == "checkpoints/step-8"
    # a folder that is no checkpoint is not deleted
    (path / "last").unlink()
    (path / "last").mkdir()
    (path / "last" / "thesis.tex").touch()
    ended = run("train", "--resume", path, "--steps", 9, "--quiet")
    assert ended.status == 2
    assert "last: no checkpoint, which spairkit writes here; move it away" in ended.err
    assert (path / "last" / "thesis.tex").exists()


def test_leftovers_of_killed_processes_are_swept_everywhere(run: Runner) -> None:
    path = trained(run)
    for place in ("", "checkpoints", "checkpoints/step-4", "pictures", "objects"):
        (path / place / ".spairkit-tmp-1").write_text("half")
        (path / place / ".spairkit-tmp-2").mkdir()
        (path / place / ".spairkit-tmp-2" / "x").touch()
    assert run("train", "--resume", path, "--steps", 5, "--quiet").status == 0
    assert not list(path.rglob(".spairkit-tmp-*"))


@pytest.mark.parametrize("name", ["figure.png", "runs", "runs/watershed-seed-0", "settings.json"])
def test_nothing_follows_a_link_out_of_a_comparison(run: Runner, name: str) -> None:
    words = ["compare", "--out", "compared", "--quiet"]
    assert run(*words, "--data", "cells", "--models", "watershed,conncomp").status == 0
    target = aim(name, Path("compared"))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    ended = run(*words)
    assert ended.status == 2
    message = f"spairkit: compared/{name}: is a link, and spairkit follows none"
    assert ended.err.splitlines()[-1].startswith(message)
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert target.exists()


@pytest.mark.parametrize("name", ["sweep.json", "sweep.png", "trial-0000", ".lock"])
def test_nothing_follows_a_link_out_of_a_sweep(run: Runner, name: str) -> None:
    words = ["sweep", "--out", "swept", "--trials", 1, "--quiet"]
    sets = ["--config", "tiny.toml", "--data", "cells", "--set", "train.steps=2"]
    ended = run(*words, *sets)
    assert ended.status == 0, ended.err
    target = aim(name, Path("swept"))
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    ended = run(*words)
    assert ended.status == 2
    message = f"spairkit: swept/{name}: is a link, and spairkit follows none"
    assert ended.err.splitlines()[-1].startswith(message)
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    assert target.exists()


@pytest.mark.parametrize("name", ["config.toml", "data.json", "checkpoints/step-4/manifest.json"])
def test_figures_do_not_replace_files_of_the_run(run: Runner, name: str) -> None:
    path = trained(run)
    before = (path / name).read_bytes()
    ended = run("eval", "--checkpoint", path, "--out", path / name)
    assert ended.status == 2
    assert f"--out run/{name}: is an input" in ended.err
    assert (path / name).read_bytes() == before
    assert run("eval", "--checkpoint", path, "--out", path / "figures.json").status == 0
    assert run("eval", "--checkpoint", path, "--out", path / "figures.json").status == 0


def test_full_disk_keeps_the_previous_checkpoint(run: Runner) -> None:
    path = trained(run)
    before = load_checkpoint(path / "last", with_optimiser=True)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
        ended = run("train", "--resume", path, "--steps", 8, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ended.status == 2
    assert re.fullmatch(
        r"spairkit: cannot write run/\S+: File too large; the system limits the size of files here",
        ended.err.splitlines()[-1],
    )
    after = load_checkpoint(path / "last", with_optimiser=True)
    assert after.sha256 == before.sha256
    assert not list(path.rglob(".spairkit-tmp-*"))
    assert run("train", "--resume", path, "--steps", 8, "--quiet").status == 0
