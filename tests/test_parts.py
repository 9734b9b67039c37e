"""Parts of `detect` and `count`: what is kept after kills and changes; worker processes,
shards and clusters; images of URLs."""

import fcntl
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import spairkit
from spairkit import remote
from spairkit.cli import detect as detect_command
from spairkit.detector import Detector
from spairkit.images import write_png
from spairkit.parts import plan
from spairkit.parts.plan import Item, planned
from spairkit.parts.work import Worker
from spairkit.storage.durable import write_text

if TYPE_CHECKING:
    from conftest import Ended

QUICKLY = ("--search", "off", "--device", "cpu", "--quiet")
ALL = ("--threshold", "0.01", "--format", "csv")

DEADLY = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

from spairkit.cli.detect import _Described


@dataclass(frozen=True)
class Deadly(_Described):
    def __call__(self, item, detections):
        death = Path(__file__).with_name("death")
        if item.number == 7 and not (death.exists() and death.read_text() == "once"):
            death.write_text("always" if death.exists() else "once")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item, detections)
"""

Runner = Callable[..., "Ended"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Runner) -> Runner:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    return in_process


@pytest.fixture(scope="module")
def deadly_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where processes that are started find the module `deadly`."""
    folder = tmp_path_factory.mktemp("deadly")
    (folder / "deadly.py").write_text(DEADLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        yield folder


@pytest.fixture
def deadly(deadly_module: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The process that describes image 7 is killed.

    Not if the file given holds "once"; once, after which it does, if it is absent; else always.
    """
    import deadly  # type: ignore[import-not-found]

    monkeypatch.setattr(detect_command, "_Described", deadly.Deadly)
    death = deadly_module / "death"
    death.write_text("once")
    return death


@pytest.fixture(scope="module")
def cluster(deadly_module: Path) -> Iterator[str]:
    """The address of a Dask scheduler with two worker processes, which come back when they die."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0
    ) as cluster:
        yield cluster.scheduler_address


def scenes(folder: Path, number: int) -> Path:
    """Images of two sizes, which are searched in batches of two."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        size = 48 + 2 * (i % 4 > 1)
        image = (torch.rand(3, size, size, generator=generator) > 0.9).float()
        write_png(folder / f"{i:03}.png", image)
    return folder


def damaged(folder: Path) -> Path:
    """The folder, of which one image lacks its second half."""
    data = (folder / "030.png").read_bytes()
    (folder / "030.png").write_bytes(data[: len(data) // 2])
    return folder


def parts(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).glob("*.part"))


class Stop(Exception):
    """Stands for a kill."""


def test_parts_hold_consecutive_images_within_the_bounds() -> None:
    sizes = [2304] * 70 + [65536] * 17 + [5_000_000, 10, 1 << 20, 1]
    items = [Item(str(i), i, size) for i, size in enumerate(sizes)]
    found = planned(items)
    assert [item for part in found for item in part] == items
    assert [len(part) for part in found] == [64, 21, 2, 1, 1, 1, 1]
    assert planned(items[:64]) == found[:1], "later images change nothing"
    assert planned([]) == []


@pytest.mark.parametrize("format_", ["coco", "csv", "jsonl"])
def test_detect_goes_on_where_it_was_stopped(
    run: Runner, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 4)
    words = ["detect", scenes(Path("few"), 9), "--format", format_, "--threshold", "0.01"]
    assert run(*words, "--search", "refine", "--out", "whole").status == 0
    plain, calls = Detector.detect_batch, []

    def stopping(self: Detector, images: torch.Tensor, *rest: object) -> object:
        calls.append(len(images))
        if sum(calls) > 5:
            raise Stop
        return plain(self, images, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "detect_batch", stopping)
        ended = run(*words, "--search", "refine", "--out", "found")
    assert ended.status == 1
    assert "4 images finished, kept in found.parts; the same command goes on" in ended.err
    assert not Path("found").exists()
    left: list[int] = []

    def counting(self: Detector, images: torch.Tensor, *rest: object) -> object:
        left.append(len(images))
        return plain(self, images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Detector, "detect_batch", counting)
    ended = run(*words, "--search", "refine", "--out", "found")
    assert ended.status == 0
    assert "4 images finished before, 5 left" in ended.err
    assert sum(left) == 5
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == ["few", "found", "whole"]


def test_only_what_has_not_changed_is_kept(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 1)
    folder = scenes(Path("few"), 6)
    words = ["detect", folder, "--out", "found.json", "--table", "objects.csv", *QUICKLY]

    def full(*_: object) -> None:
        raise Stop

    def kept() -> int:
        """Leaves parts of all images, and counts the images that are used of an earlier run."""
        with monkeypatch.context() as patch:
            patch.setattr(detect_command, "table_text", full)
            said = run(*words).err
        before = [line for line in said.splitlines() if "finished before" in line]
        assert bool(before) != ("starting anew" in said) or not before
        return int(before[0].split()[0]) if before else 0

    assert kept() == 0
    assert kept() == 6
    write_png(folder / "002.png", torch.ones(3, 48, 48))
    assert kept() == 5
    os.rename(folder / "001.png", folder / "001b.png")
    assert kept() == 5
    write_png(folder / "000a.png", torch.ones(3, 48, 48))
    assert kept() == 1, "those behind a new image have other numbers"
    words += ["--threshold", "0.6"]
    assert kept() == 0, "other settings"
    assert kept() == 7
    assert run(*words).status == 0
    assert not Path("found.json.parts").exists()


def test_parts_that_are_not_whole_are_done_again(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 1)
    words = ["detect", scenes(Path("few"), 6), *ALL, *QUICKLY]
    assert run(*words, "--out", "whole").status == 0
    assert run(*words, "--out", "found", "--shard", "1/1").status == 0
    files = parts("found.parts")
    assert len(files) == 6
    data = [file.read_bytes() for file in files]
    files[0].write_bytes(data[0][:-1])
    files[1].write_bytes(data[1].replace(b"few", b"fax"))
    files[2].write_bytes(b"")
    files[3].unlink()
    body = json.dumps({"versions": 3}).encode()
    files[4].write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    assert "1 image finished before, 5 left" in run(*words, "--out", "found").err
    assert Path("found").read_bytes() == Path("whole").read_bytes()


def test_folders_of_others_are_not_taken_for_parts(run: Runner) -> None:
    image = scenes(Path("few"), 1) / "000.png"
    before = image.read_bytes()
    place = Path("found.json.parts")

    def refused(reason: str) -> None:
        ended = run("detect", image, "--out", "found.json", *QUICKLY)
        assert ended.status == 2
        assert reason in ended.err.splitlines()[-1]
        assert image.read_bytes() == before
        assert not Path("found.json").exists()

    os.link(image, place)
    refused("found.json.parts: is no folder of finished parts")
    place.unlink()
    os.symlink("few", place)
    refused("found.json.parts: is no folder of finished parts")
    place.unlink()
    os.mkfifo(place)
    refused("found.json.parts: is no folder of finished parts")
    place.unlink()
    place.mkdir()
    (place / "mine.txt").write_text("x")
    refused("found.json.parts: is no folder of finished parts")
    assert (place / "mine.txt").read_text() == "x"
    (place / "mine.txt").unlink()
    (place / "x.part").symlink_to(image.resolve())
    refused("x.part: is a link")
    (place / "x.part").unlink()
    (place / "spairkit-detect.lock").unlink()
    (place / "spairkit-detect.lock").symlink_to(image.resolve())
    refused("Too many levels of symbolic links")
    (place / "spairkit-detect.lock").unlink()
    os.mkfifo(place / "x.part")
    assert run("detect", image, "--out", "found.json", *QUICKLY).status == 0, "it is never opened"
    assert not place.exists()


def test_a_broken_image_costs_no_other_result(run: Runner) -> None:
    folder = scenes(Path("mixed"), 6)
    Image.fromarray((torch.rand(72, 96) * 255).byte().numpy()).save(folder / "004.jpg")
    data = (folder / "004.jpg").read_bytes()
    (folder / "004.jpg").write_bytes(data[: len(data) // 2])
    ended = run("detect", folder, "--out", "found.jsonl", "--format", "jsonl", *QUICKLY)
    assert ended.status == 0
    assert "skipped 1 of 7: mixed/004.jpg: a damaged image" in ended.err
    assert len(Path("found.jsonl").read_text().splitlines()) == 6
    # one that is named is an error, but after the others are done
    ended = run("detect", *sorted(folder.iterdir()), "--out", "named.jsonl", "--format", "jsonl")
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("spairkit: skipped 1 of 7: mixed/004.jpg: a dam")
    assert len(Path("named.jsonl").read_text().splitlines()) == 6
    ended = run("viz", *sorted(folder.iterdir()), "--search", "off")
    assert ended.status == 2
    assert len(list(Path("viz").iterdir())) == 6


def test_full_disk_is_one_line_and_a_second_start_goes_on(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 2)
    words = ["detect", scenes(Path("few"), 6), "--format", "jsonl", "--threshold", "0", *QUICKLY]
    large = Image.fromarray((torch.rand(96, 96) * 255).byte().numpy())
    large.save("few/009.png")
    assert run(*words, "--out", "whole").status == 0
    assert run(*words, "--out", "sizes", "--shard", "1/1").status == 0
    limit = max(path.stat().st_size for path in parts("sizes.parts")) - 1
    shutil.rmtree("sizes.parts")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        ended = run(*words, "--out", "found")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert ended.status == 2
    assert "spairkit: cannot write found.parts/" in ended.err.splitlines()[-1]
    assert "File too large" in ended.err.splitlines()[-1]
    assert sorted(path.name for path in Path().iterdir()) == ["few", "found.parts", "whole"]
    ended = run(*words, "--out", "found")
    assert "finished before" in ended.err
    assert Path("found").read_bytes() == Path("whole").read_bytes()


def test_second_process_on_one_output_is_refused(run: Runner) -> None:
    folder = scenes(Path("few"), 1)
    Path("found.parts").mkdir()
    with open("found.parts/spairkit-detect.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--shard", "1/2"]):
            ended = run("detect", folder, "--out", "found", *more, *QUICKLY)
            assert ended.status == 2
            assert ended.err.endswith("found.parts: another process works on this output\n")
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run("detect", folder, "--out", "found", *QUICKLY).status == 2, "a shard is at work"
        assert run("detect", folder, "--out", "found", "--shard", "1/1", *QUICKLY).status == 0
    assert run("detect", folder, "--out", "found", *QUICKLY).status == 0
    assert sorted(os.listdir()) == ["few", "found"]


def test_shards_share_the_parts_and_the_plain_command_merges(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 2)
    words = ["detect", scenes(Path("few"), 13), *ALL, *QUICKLY]
    assert run(*words, "--out", "whole", "--table", "whole.csv").status == 0
    words += ["--out", "found", "--table", "found.csv"]
    ended = run(*words, "--shard", "3/3")
    assert ended.err.splitlines()[-1] == "shard 3/3: 4 images finished, kept in found.parts"
    assert not Path("found").exists()
    assert not Path("found.csv").exists()
    assert len(parts("found.parts")) == 2
    assert "shard 1/3: 5 images" in run(*words, "--shard", "1/3").err
    assert "4 images finished before, 0 left" in run(*words, "--shard", "3/3").err
    assert "9 images finished before, 4 left" in run(*words).err, "it does the second one's"
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert Path("found.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert not Path("found.parts").exists()
    few = ["count", "few", "--threshold", "0.01", *QUICKLY]
    for shard in ("1/2", "2/2"):
        assert run(*few, "--out", "counts.csv", "--shard", shard).status == 0
    assert "13 images finished before, 0 left" in run(*few, "--out", "counts.csv").err
    assert Path("counts.csv").read_text() == run(*few, "--format", "csv").out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--shard", "0/4", "--out", "x"], "must be I/N, such as 2/8"),
        (["--shard", "5/4", "--out", "x"], "must be I/N, such as 2/8"),
        (["--shard", "two", "--out", "x"], "must be I/N, such as 2/8"),
        (["--shard", "1/2"], "--shard keeps its results beside the output; name it"),
        (["--scheduler", "tcp://localhost:1", "--workers", "2"], "remove --workers and --shard"),
        (["--workers", "0"], "should be greater than or equal to 1"),
    ],
)
def test_options_that_cannot_be_used_are_named(run: Runner, words: list[str], reason: str) -> None:
    ended = run("detect", scenes(Path("few"), 1), *words, *QUICKLY)
    assert ended.status == 2
    assert reason in ended.err.splitlines()[-1]
    assert os.listdir() == ["few"]


def test_a_worker_that_dies_loses_nothing(
    run: Runner, monkeypatch: pytest.MonkeyPatch, deadly: Path
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 5)
    words = ["detect", damaged(scenes(Path("many"), 60)), *ALL, *QUICKLY]
    alone = run(*words, "--out", "whole")
    deadly.unlink()
    ended = run(*words, "--out", "found", "--workers", "2")
    assert ended.status == 0, ended.err
    assert deadly.read_text() == "once"
    assert "ended (SIGKILL); its part is done again" in ended.err
    assert ended.err.splitlines()[-1] == alone.err.splitlines()[-1]
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(os.listdir()) == ["found", "many", "whole"]


def test_logs_have_lines_of_progress_with_and_without_workers(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 2)
    words = ["detect", scenes(Path("few"), 6), *QUICKLY[:-1], "--out"]
    assert "images: " not in run(*words, "found").err, "not that soon"
    monkeypatch.setattr("spairkit.cli.console.LINE_EVERY_SECONDS", 0)
    assert "images: " not in run(*words, "found", "--quiet").err
    for workers in (1, 2):
        lines = run(*words, "found", "--workers", workers).err.splitlines()
        shown = [line for line in lines if line.startswith("images: ")]
        assert shown == [f"images: {done} of 6" for done in range(1, 7)]


def test_an_image_that_kills_every_worker_is_named_and_the_rest_is_kept(
    run: Runner, monkeypatch: pytest.MonkeyPatch, deadly: Path
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 3)
    deadly.write_text("always")
    words = ["detect", scenes(Path("many"), 9), *ALL, *QUICKLY, "--out", "found"]
    ended = run(*words, "--workers", "2")
    assert ended.status == 2
    assert "many/006.png to many/008.png: 2 worker processes ended here (SIGKILL)" in ended.err
    assert not Path("found").exists()
    deadly.write_text("once")
    ended = run(*words)
    assert ended.status == 0
    assert "6 images finished before, 3 left" in ended.err


def test_a_cluster_that_loses_a_worker_loses_nothing(
    run: Runner, monkeypatch: pytest.MonkeyPatch, deadly: Path, cluster: str
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 5)
    words = ["detect", damaged(scenes(Path("many"), 60)), *ALL, *QUICKLY]
    alone = run(*words, "--out", "whole")
    deadly.unlink()
    ended = run(*words, "--out", "found", "--scheduler", cluster)
    assert ended.status == 0, ended.err
    assert deadly.read_text() == "once", "a worker was killed"
    assert ended.err.splitlines()[-1] == alone.err.splitlines()[-1]
    assert alone.err.splitlines()[-1].startswith("skipped 1 of 60: many/030.png: a damaged image")
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(os.listdir()) == ["found", "many", "whole"]


def test_missing_schedulers_are_named(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["detect", scenes(Path("few"), 1), *QUICKLY, "--scheduler"]
    pytest.importorskip("distributed")
    monkeypatch.setattr("spairkit.parts.cluster._TIMEOUT_SECONDS", 0.2)
    for address in ("tcp://127.0.0.1:1", "no address"):
        ended = run(*words, address)
        assert ended.status == 2
        last = ended.err.splitlines()[-1]
        assert last.startswith(f"spairkit: --scheduler {address}: no Dask scheduler answers")
    monkeypatch.setitem(sys.modules, "distributed", None)
    ended = run(*words, "tcp://127.0.0.1:1")
    assert ended.err.splitlines()[-1] == (
        "spairkit: --scheduler needs Dask: pip install 'spairkit[cluster]'"
    )


@pytest.fixture
def store() -> Any:
    """fsspec's file system in memory, with five images below set/ and one beside."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.store.clear()
    folder = scenes(Path("few"), 5)
    for path in folder.iterdir():
        files.pipe(f"/set/sub/{path.name}", path.read_bytes())
    files.pipe("/set/notes.txt", b"x")
    files.pipe("/set/.hidden/1.png", b"x")
    files.pipe("/alone", (folder / "000.png").read_bytes())
    yield files
    files.store.clear()


def test_images_of_urls_give_what_files_give(run: Runner, store: Any) -> None:
    words = [*ALL, *QUICKLY, "--out"]
    assert run("detect", "few", *words, "here").status == 0
    assert run("detect", "memory://set", *words, "afar").status == 0
    expected = Path("here").read_text().replace("few/", "memory://set/sub/")
    assert Path("afar").read_text() == expected
    assert expected.count("\n") > 5
    assert run("detect", "memory://alone", *words, "one").status == 0
    assert {line.split(",")[0] for line in Path("one").read_text().splitlines()[1:]} == {
        "memory://alone"
    }
    counts = run("count", "memory://set", "--format", "json", *QUICKLY).out
    assert [row["image"] for row in json.loads(counts)["images"]] == [
        f"memory://set/sub/{i:03}.png" for i in range(5)
    ]


def test_stacks_of_urls_are_refused(run: Runner, store: Any) -> None:
    rows = (np.arange(3 * 48 * 48) % 251).astype(np.uint8).reshape(3, 48, 48)
    for name in ("npy", "tif"):
        content = io.BytesIO()
        if name == "npy":
            np.save(content, rows)
        else:
            tifffile.imwrite(content, rows, photometric="minisblack")
        store.pipe(f"/mixed/cells.{name}", content.getvalue())
    store.pipe("/mixed/one.png", store.cat("/alone"))
    ended = run("detect", "memory://mixed", *ALL, *QUICKLY, "--out", "found")
    assert ended.status == 0
    reason = "a stack of 3 pages; from URLs, only single images are read; copy it to this machine"
    assert ended.err.splitlines()[-1] == (
        f"skipped 2 of 3: memory://mixed/cells.npy: {reason}; memory://mixed/cells.tif: {reason}"
    )
    lines = Path("found").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {"memory://mixed/one.png"}
    for command in ("detect", "count"):
        ended = run(command, "memory://mixed/cells.tif", *QUICKLY)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.splitlines()[-1] == f"spairkit: memory://mixed/cells.tif: {reason}"


def test_changed_files_of_urls_are_read_again(
    run: Runner, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MAX_IMAGES", 1)
    words = ["detect", "memory://set", *ALL, *QUICKLY, "--out", "found"]
    assert run(*words, "--shard", "1/1").status == 0
    assert "5 images finished before, 0 left" in run(*words, "--shard", "1/1").err
    store.pipe("/set/sub/003.png", store.cat("/set/sub/002.png"))
    assert "4 images finished before, 1 left" in run(*words).err


def test_bad_urls_are_one_line(run: Runner, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*words: object) -> str:
        ended = run(*words)
        assert ended.status == 2
        last: str = ended.err.splitlines()[-1]
        return last

    assert "memory://none: no images there" in said("detect", "memory://none")
    assert said("detect", "nothing://x").startswith("spairkit: nothing://x: ")
    assert "not both at once" in said("detect", "memory://set", "few")
    assert "only detect and count read URLs" in said("viz", "memory://set")
    assert "not of URLs" in said("detect", "memory://set", "--annotated", "drawn")
    store.pipe("/set/sub/000.png", b"no image")
    ended = run("detect", "memory://set", *QUICKLY, "--out", "found")
    assert ended.status == 0
    assert "skipped 1 of 5: memory://set/sub/000.png: not an image" in ended.err
    monkeypatch.setattr(remote, "MAX_BYTES", 100)
    assert "no image can be read: skipped 5 of 5" in said("detect", "memory://set", *QUICKLY)
    assert "memory://alone: larger than 1 GiB" in said("detect", "memory://alone", *QUICKLY)

    def breaks(*_: object, **__: object) -> None:
        raise PermissionError("no credentials\nare known")

    monkeypatch.setattr(type(store), "find", breaks)
    last = said("detect", "memory://set")
    assert last == "spairkit: memory://set: cannot be read: no credentials are known"


def test_a_gpu_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes take turns on several GPUs; a detector that is given is used as it is."""
    from spairkit.parts import work

    detector = spairkit.load(device="cpu", search="off")
    chosen: list[torch.device] = []

    def detector_of(_: object, device: torch.device, **__: object) -> Detector:
        chosen.append(device)
        return detector

    monkeypatch.setattr(work, "detector_of", detector_of)
    monkeypatch.setattr(work, "chosen_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    from spairkit.storage.checkpoints import load_checkpoint
    from spairkit.storage.runs import pretrained

    loaded = load_checkpoint(pretrained())
    job = work.Job(
        checkpoint=str(loaded.path),
        sha256=loaded.sha256,
        device="cuda",
        search="off",
        box_contrast=None,
        threshold=0.5,
        count=None,
        threads=1,
        describe=lambda *_: ([], ""),
    )
    for index in range(3):
        Worker(job, index=index)
    assert [device.index for device in chosen] == [0, 1, 0]
    assert Worker(job, detector).detector is detector
    with pytest.raises(spairkit.InputError, match="is another checkpoint on this machine"):
        Worker(replace(job, sha256="0" * 64))


def started(*words: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "spairkit", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return list(map(int, text.split()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(run: Runner, number: signal.Signals) -> None:
    words = ["detect", scenes(Path("many"), 640), *ALL, *QUICKLY]
    process = started(*words, "--workers", "2", "--out", "found")
    while process.poll() is None and not parts("found.parts"):
        time.sleep(0.002)
    workers = children(process.pid)
    assert len(workers) >= 2
    if number == signal.SIGINT:  # a terminal sends it to all
        for pid in workers:
            os.kill(pid, number)
    process.send_signal(number)
    _, said = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"finished, kept in found.parts; the same command goes on" in said
        assert b"Traceback" not in said
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert parts("found.parts")


def test_interrupts_are_held_from_the_first_worker_on(tmp_path: Path) -> None:
    """Also if multiprocessing starts its tracker meanwhile, which lets them through again."""
    script = tmp_path / "workers.py"
    script.write_text(
        "import multiprocessing, signal\n"
        "from spairkit.parts.processes import _interrupts_held\n"
        "def show():\n"
        "    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        "        with _interrupts_held():\n"
        "            worker = multiprocessing.get_context('spawn').Process(target=show)\n"
        "            worker.start()\n"
        "        worker.join()\n"
        "    show()\n"
    )
    shown = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["True", "True", "False"]


def killed_twice(words: list[object], after: int) -> None:
    """Runs the command, and kills it, and its workers with it, twice after so many more parts."""
    for _ in range(2):
        reached = len(parts("found.parts"))
        process = started(*words)
        while process.poll() is None and len(parts("found.parts")) < reached + after:
            time.sleep(0.005)
        assert process.poll() is None, "it is done already"
        process.kill()
        process.communicate()
        assert len(parts("found.parts")) >= reached + after, "nothing went back"


@pytest.mark.parametrize(
    "kills", [2, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(7200)])]
)
def test_kills_lose_no_finished_part(run: Runner, kills: int) -> None:
    words = ["detect", scenes(Path("many"), 640), *ALL, *QUICKLY[:-1]]
    assert run(*words, "--out", "whole").status == 0
    delay = torch.Generator().manual_seed(0)
    for _ in range(kills):
        reached = len(parts("found.parts"))
        if Path("found").exists():
            Path("found").unlink()
            reached = 0
        process = started(*words, "--out", "found")
        while process.poll() is None and len(parts("found.parts")) <= reached:
            time.sleep(0.005)
        time.sleep(float(torch.rand((), generator=delay)) * 0.05)
        process.kill()
        process.communicate()
        assert Path("found").exists() or len(parts("found.parts")) >= reached, "nothing went back"
    assert run(*words, "--out", "found").status == 0
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(os.listdir()) == ["found", "many", "whole"]


def test_writes_of_killed_processes_are_removed_at_the_end(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["detect", scenes(Path("few"), 2), "--out", "found.json", "--table", "found.csv"]
    words += ["--annotated", "drawn", *QUICKLY]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: None)  # as if killed before
        assert run(*words, "--shard", "1/1").status == 0
        for name in ("found.json", "found.csv", "other"):
            write_text(Path(name), "")
    assert len(list(Path().rglob(".spairkit-tmp-*"))) == 6
    assert run(*words).status == 0
    assert len(list(Path().rglob(".spairkit-tmp-*"))) == 1, "of `other`, which is not written here"
    assert sorted(os.listdir("drawn")) == ["000.png", "001.png"]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_images_by_two_workers_killed_twice(run: Runner) -> None:
    """Or as many as the variable IMAGES says; 256 px each, with the packaged model."""
    number = int(os.environ.get("IMAGES", "10000"))
    Path("many").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        discs = torch.zeros(256, 256)
        for y, x in torch.randint(0, 240, (40, 2), generator=generator).tolist():
            discs[y : y + 9, x : x + 9] = 1
        write_png(f"many/{i:05}.png", discs.expand(3, -1, -1))
    words: list[object] = ["detect", "many", "--format", "csv", *QUICKLY]
    begun = time.monotonic()
    assert run(*words, "--out", "whole").status == 0
    alone = time.monotonic() - begun
    words += ["--workers", "2", "--out", "found"]
    begun = time.monotonic()
    killed_twice(words, number // 60)
    last = started(*words)
    last.communicate()
    assert last.returncode == 0
    print(f"{number} images: alone {alone:.0f} s, killed twice {time.monotonic() - begun:.0f} s")
    assert Path("found").read_bytes() == Path("whole").read_bytes()
    assert sorted(os.listdir()) == ["found", "many", "whole"]
