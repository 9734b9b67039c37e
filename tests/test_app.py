"""The server of `spairkit app`: who may ask, corrections, exports and trainings, over HTTP."""

import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from spairkit.app.corrections import Corrections, CorrectionsFile
from spairkit.cli.workers import start_worker
from spairkit.config import DataConfig
from spairkit.data.folder import ImageFolder
from spairkit.detector import load
from spairkit.errors import InputError
from spairkit.images import read_image, write_png

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from spairkit.app.finder import Finder  # noqa: E402
from spairkit.app.grouping import groups_of  # noqa: E402
from spairkit.app.pictures import Pictures  # noqa: E402
from spairkit.app.server import build_app  # noqa: E402
from spairkit.app.session import Session  # noqa: E402

TOKEN, ONCE = "the-token", "once-only"
SIZE = 96
DISCS = [(14, 14), (48, 16), (80, 18), (18, 50), (52, 52), (82, 50), (16, 82), (50, 84), (80, 80)]


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def value(self) -> Any:
        return json.loads(self.body)


class Served:
    """A session behind a real server."""

    def __init__(self, session: Session, port: int) -> None:
        self.session, self.port = session, port

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        *,
        token: str | None = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        query = "" if token is None else f"{'&' if '?' in path else '?'}token={token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path + query, body, headers or {})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, response.read(), named)
        finally:
            connection.close()

    def put(self, index: int, **corrections: Any) -> Answer:
        body = json.dumps({"removed": [], "added": [], **corrections}).encode()
        return self.ask(f"/api/images/{index}/corrections", "PUT", body)

    def finished(self) -> "Served":
        """Waits until all images are done."""
        until = time.monotonic() + 60
        while self.session.finder.is_busy:
            assert time.monotonic() < until
            time.sleep(0.02)
        return self


def no_training(words: Sequence[str]) -> "subprocess.Popen[bytes]":
    raise AssertionError("no training was asked for")


@contextmanager
def serving(
    folder: Path, checkpoint: Path | None = None, start: Any = no_training
) -> Iterator[Served]:
    session = Session(folder, folder / "fixes.json", checkpoint, torch.device("cpu"), start)
    try:
        config = uvicorn.Config(
            build_app(session, TOKEN, ONCE), port=0, log_level="error", ws="none", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield Served(session, port)
        finally:
            server.should_exit = True
            thread.join()
    finally:
        session.close()


def draw_discs(path: Path, number: int) -> None:
    """Discs of 12 px on black, the later ones dimmer."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    image = np.full((SIZE, SIZE), 0.05, np.float32)
    for k, (cx, cy) in enumerate(DISCS[:number]):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 36] = 1 - 0.08 * k
    write_png(path, torch.from_numpy(image).expand(3, -1, -1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, of 9 and 6 discs, and a damaged one."""
    folder = tmp_path / "discs"
    folder.mkdir()
    draw_discs(folder / "a.png", 9)
    draw_discs(folder / "b.png", 6)
    (folder / "c.png").write_bytes(b"\x89PNG no more")
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving(folder) as served:
        yield served.finished()


def test_every_request_needs_the_token(served: Served) -> None:
    paths = ["/", "/page/main.js", "/api/state", "/api/images/0/picture", "/api/export/coco", "/x"]
    for path in paths:
        assert served.ask(path, token=None).status == 403
        assert served.ask(path, token="the-token-not").status == 403
        assert served.ask(path, token="%FF").status == 403
    for method in ("PUT", "POST", "DELETE", "OPTIONS", "HEAD"):
        assert served.ask("/api/training", method, token=None).status == 403


def test_token_becomes_a_cookie_that_scripts_cannot_read(served: Served) -> None:
    page = served.ask("/")
    assert page.status == 200
    cookie = page.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    held = {"Cookie": f"other=1; {cookie.split(';')[0]}"}
    assert served.ask("/api/state", token=None, headers=held).status == 200
    name = cookie.partition("=")[0]
    assert served.ask("/api/state", token=None, headers={"Cookie": f"{name}=x"}).status == 403


def test_second_token_holds_once(served: Served) -> None:
    first = served.ask("/", token=ONCE)
    assert first.status == 200
    assert served.ask("/", token=ONCE).status == 403
    held = {"Cookie": first.headers["set-cookie"].split(";")[0]}
    assert served.ask("/api/state", token=None, headers=held).status == 200


def test_other_hosts_are_refused(served: Served) -> None:
    hosts = ["evil.example", "127.0.0.1.evil.example:80", "", "[", "10.0.0.1", "x@localhost.x"]
    for host in hosts:
        assert served.ask("/api/state", headers={"Host": host}).status == 403, host


def test_names_of_this_machine_are_taken_at_any_port(served: Served) -> None:
    for host in ("127.0.0.1:1", "localhost", "LOCALHOST:9999"):
        assert served.ask("/api/state", headers={"Host": host}).status == 200


def test_changes_from_other_pages_are_refused(served: Served) -> None:
    own = f"http://127.0.0.1:{served.port}"
    others = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"{own}0"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ]
    for headers in others:
        assert served.ask("/api/training", "DELETE", headers=headers).status == 403
    headers = {"Origin": own, "Sec-Fetch-Site": "same-origin"}
    assert served.ask("/api/training", "DELETE", headers=headers).status == 200


def test_page_allows_nothing_from_elsewhere(served: Served) -> None:
    for path in ("/", "/page/app.css", "/page/main.js", "/api/state", "/nothing"):
        headers = served.ask(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert served.ask("/page/..%2Fserver.py").status == 404
    assert served.ask("/page/server.py").status == 404


def test_counts_follow_the_filter(served: Served) -> None:
    state = served.ask("/api/state").value
    assert (state["done"], state["num_unreadable"]) == (3, 1)
    assert "c.png" in state["unreadable"][0]
    assert served.ask("/api/counts").value == {"images": [9, 6, None], "total": 15}
    objects = served.ask("/api/images/0/objects").value
    fourth = sorted(objects["scores"], reverse=True)[3]
    counts = served.ask(f"/api/counts?threshold={fourth}").value["images"]
    assert counts[0] == sum(score > fourth for score in objects["scores"]) == 3
    sides = objects["sides"]
    assert all(10 < side < 14 for side in sides)
    least = sorted(sides)[5]
    assert served.ask(f"/api/counts?least={least}").value["images"][0] == sum(
        side >= least for side in sides
    )
    assert served.ask("/api/counts?largest=5").value["total"] == 0


def test_unreadable_image_is_named(served: Served) -> None:
    for kind in ("objects", "picture", "thumbnail"):
        answer = served.ask(f"/api/images/2/{kind}")
        assert answer.status == 400
        assert "c.png" in answer.value["error"]


BOX = [40.0, 40.0, 52.0, 52.0]
HOSTILE: list[bytes] = [
    b"",
    b"[]",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    *(
        json.dumps({"revision": 0, "removed": [], "added": [], **change}).encode()
        for change in (
            {"revision": -1},
            {"revision": "0"},
            {"revision": True},
            {"revision": 1 << 70},
            {"more": 1},
            {"added": [[1, 2, 3]]},
            {"added": [[3, 2, 1, 4]]},
            {"added": [[1, 2, 1, 4]]},
            {"added": [["1", "2", "3", "4"]]},
            {"added": [[float("nan"), 0, 1, 1]]},
            {"added": [[0, 0, float("inf"), 1]]},
            {"added": [[0, 0, 1e7, 1]]},
            {"added": {"0": BOX}},
            {"removed": [BOX] * 10_001},
            {"removed": None},
        )
    ),
]


def test_hostile_corrections_are_refused(served: Served) -> None:
    for body in HOSTILE:
        answer = served.ask("/api/images/0/corrections", "PUT", body)
        assert answer.status == 422, body[:200]
        assert 0 < len(answer.value["error"]) < 500
    assert not (served.session.folder / "fixes.json").exists()


def test_other_hostile_requests_are_refused(served: Served) -> None:
    held = {"Cookie": served.ask("/").headers["set-cookie"].split(";")[0]}
    refused = [
        served.ask("/api/images/0/corrections", "PUT", b" " * (5 << 20)),
        served.put(99, revision=0),
        served.ask("/api/images/99/objects"),
        served.ask("/api/images/99999999999999999999/objects"),
        served.ask("/api/images/-1/objects"),
        served.ask("/api/images/0/picture?side=0"),
        served.ask("/api/images/0/picture?side=100000"),
        served.ask("/api/images/0/picture?region=1,2,3"),
        served.ask("/api/images/0/picture?region=1,2,0,0"),
        served.ask("/api/images/0/picture?other=1"),
        served.ask("/api/counts?threshold=nan"),
        served.ask("/api/counts?threshold=1"),
        served.ask("/api/counts?least=-1"),
        served.ask("/api/counts?largest=inf"),
        served.ask("/api/counts?without=x"),
        served.ask("/api/counts?without=0"),
        served.ask(f"/api/counts?without={'1,' * 3000}", token=None, headers=held),
        served.ask("/api/export/pickle"),
        served.ask("/api/model", "PUT", b'{"model": 7}'),
        served.ask("/api/model", "PUT", b'{"model": "../x"}'),
        served.ask("/api/training/model", "PUT"),
        served.ask("/api/state", "PUT"),
    ]
    assert {answer.status for answer in refused} <= {400, 404, 405, 413, 422}
    assert served.ask("/api/state").status == 200


def test_corrections_are_there_after_a_restart(folder: Path) -> None:
    with serving(folder) as served:
        served.finished()
        boxes = served.ask("/api/images/0/objects").value["boxes"]
        answer = served.put(0, revision=0, removed=[boxes[4]], added=[[2.5, 40.25, 9, 47]])
        assert answer.value["covers"] == [4, None]
        assert answer.value["revision"] == 1
        assert served.ask("/api/counts").value["images"][0] == 9 - 1 + 1
        assert served.ask("/api/counts?threshold=0.99").value["images"][0] == 1  # the added one
    before = (folder / "fixes.json").read_bytes()
    with serving(folder) as served:
        objects = served.finished().ask("/api/images/0/objects").value
        assert objects["removed"] == [boxes[4]]
        assert objects["added"] == [[2.5, 40.25, 9, 47]]
        assert objects["covers"] == [4, None]
        assert served.ask("/api/counts").value["images"] == [9, 6, None]
        assert (folder / "fixes.json").read_bytes() == before


def test_corrections_of_another_window_are_not_overwritten(served: Served) -> None:
    assert served.put(0, revision=0, added=[BOX]).status == 200
    late = served.put(0, revision=0, removed=[BOX])
    assert late.status == 409
    assert "another window" in late.value["error"]
    assert served.ask("/api/images/0/objects").value["added"] == [BOX]
    assert served.put(1, revision=0).status == 200


def test_corrections_of_another_program_are_not_overwritten(served: Served) -> None:
    assert served.put(0, revision=0, added=[BOX]).status == 200
    file = served.session.folder / "fixes.json"
    file.write_bytes(file.read_bytes() + b" ")
    answer = served.put(0, revision=1)
    assert answer.status == 400
    assert "another program" in answer.value["error"]
    assert file.read_bytes().endswith(b" ")
    assert served.ask("/api/images/0/objects").value["added"] == [BOX]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 50_000,
        b'{"content": "spairkit corrections", "version": 2, "images": {}}',
        b'{"content": "spairkit corrections", "version": 1, "images": {"a": {"added": [[1]]}}}',
        b'{"content": "spairkit corrections", "version": 1, "images": []}',
        b'{"images": [], "annotations": []}',
        b"\x80\x04K*.",
    ],
)
def test_damaged_file_of_corrections_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fixes.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"fixes\.json: not corrections by spairkit: .*--out"):
        CorrectionsFile(path)
    assert path.read_bytes() == content


def test_corrections_of_absent_images_are_kept(tmp_path: Path) -> None:
    file = CorrectionsFile(tmp_path / "fixes.json")
    file.put("gone.png", Corrections(added=((0, 0, 1, 1),)))
    again = CorrectionsFile(tmp_path / "fixes.json")
    again.put("here.png", Corrections(removed=((0, 0, 2, 2),)))
    last = CorrectionsFile(tmp_path / "fixes.json")
    assert last.of("gone.png") == Corrections(added=((0, 0, 1, 1),))
    assert last.of("here.png") == Corrections(removed=((0, 0, 2, 2),))


def test_each_correction_stands_for_one_box_at_most() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 20, 10, 30]], float)
    corrections = Corrections(removed=((0, 0, 10, 10), (20, 5, 30, 30)), added=((0, 21, 10, 30),))
    assert corrections.covers(boxes) == [0, None, 3]  # the IoU with the third box is 1/6
    twice = Corrections(removed=((0, 0, 10, 10),) * 3)
    assert twice.covers(boxes) == [0, 1, None]
    assert twice.covers(np.zeros((0, 4))) == [None] * 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_coco_is_read_by_pycocotools_and_by_spairkit(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = served.ask("/api/images/0/objects").value["boxes"]
    added = [60.5, 30.0, 70.0, 41.25]
    served.put(0, revision=0, removed=[boxes[0]], added=[added])
    answer = served.ask("/api/export/coco")
    assert answer.headers["content-disposition"] == 'attachment; filename="annotations.json"'
    path = served.session.folder / "annotations.json"
    path.write_bytes(answer.body)
    coco = COCO(str(path))
    capsys.readouterr()
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.png", "b.png"]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    found = load_watershed(served).detect(served.session.folder / "a.png")
    assert len(annotations) == len(found) == 9
    for row, annotation in enumerate(annotations[:-1], start=1):
        mask = coco.annToMask(annotation)
        assert mask.tolist() == (found.masks == row + 1).int().tolist()
        assert annotation["area"] == mask.sum()
        x, y, width, height = annotation["bbox"]
        assert np.allclose([x, y, x + width, y + height], boxes[row])
        assert 0.5 < annotation["score"] <= 1
    assert annotations[-1]["bbox"] == [60.5, 30.0, 9.5, 11.25]
    assert "score" not in annotations[-1]
    assert coco.annToMask(annotations[-1]).sum() > 0
    images = ImageFolder(DataConfig(name="folder", path=str(path.parent)), "test").images()
    truths = {name: truth for name, _, _, truth in images}
    assert truths["a.png"] is not None
    assert truths["b.png"] is not None
    assert np.allclose(truths["a.png"].boxes.numpy(), [*boxes[1:], added], atol=1e-4)
    assert len(truths["b.png"]) == 6


def load_watershed(served: Served) -> Any:
    assert served.session.finder.detector is not None
    return served.session.finder.detector


def test_csv_holds_what_is_counted(served: Served) -> None:
    served.put(1, revision=0, added=[BOX])
    answer = served.ask("/api/export/csv?threshold=0.8")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
    counted = served.ask("/api/counts?threshold=0.8").value
    assert [sum(row["image"] == name for row in rows) for name in ("a.png", "b.png")] == (
        counted["images"][:2]
    )
    assert all(float(row["score"]) > 0.8 for row in rows if row["added"] == "0")
    last = rows[-1]
    assert [float(last[name]) for name in ("x1", "y1", "x2", "y2")] == BOX
    assert (last["score"], last["area"], last["added"], last["image_id"]) == ("", "", "1", "2")


def test_export_waits_for_all_images(folder: Path) -> None:
    with serving(folder) as served:
        until = threading.Event()
        finder = served.finished().session.finder
        results, finder._results = finder._results, {0: finder._results[0]}
        answer = served.ask("/api/export/csv")
        finder._results = results
        until.set()
    assert answer.status == 400
    assert answer.value["error"].startswith("2 of 3 images are not done yet")


def test_internal_error_is_shown_on_the_page(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chosen: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(served.session, "picked", fail)
    answer = served.ask("/api/counts")
    assert answer.status == 500
    assert answer.value["error"] == "internal error: RuntimeError: a mistake of ours"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert served.ask("/api/state").status == 200


def test_model_that_cannot_be_opened_is_named(folder: Path) -> None:
    def fail() -> Any:
        raise InputError("this run is damaged")

    finder = Finder([folder / "a.png"], fail)
    assert finder.wait(0, 30) is None
    assert finder.error == "this run is damaged"
    assert finder.close()


def test_work_that_goes_on_is_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spairkit.app.finder._PATIENCE_SECONDS", 0.05)
    began, ends = threading.Event(), threading.Event()

    class Slow:
        """In place of a detector, one that shows no progress."""

        count_is_given = False
        config = SimpleNamespace(model=None)

        def detect(self, path: Path, threshold: float) -> Any:
            began.set()
            assert ends.wait(30)
            raise InputError("never shown")

    finder = Finder([folder / "a.png"], Slow)  # type: ignore[arg-type]
    assert began.wait(30)
    assert not finder.close()
    ends.set()
    finder._thread.join(30)
    assert not finder.is_busy


def test_pictures_show_the_file_or_a_part_of_it(tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.rand(3, 60, 100, generator=torch.Generator().manual_seed(0))
    write_png(tmp_path / "a.png", pixels)
    expected = (read_image(tmp_path / "a.png") * 255).round().byte().permute(1, 2, 0).numpy()
    pictures = Pictures()

    def drawn(side: int, region: tuple[int, int, int, int] | None = None) -> Any:
        data, kind = pictures.draw(tmp_path / "a.png", side, region)
        assert kind == "image/png"
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    assert np.array_equal(drawn(2048), expected)
    assert drawn(50).shape == (30, 50, 3)
    assert np.array_equal(drawn(2048, (90, 50, 40, 40)), expected[50:, 90:])
    assert np.array_equal(drawn(2048, (500, -7, 3, 3)), expected[:3, 99:])


def test_picture_is_not_sent_again(served: Served) -> None:
    first = served.ask("/api/images/0/picture")
    assert first.headers["content-type"] == "image/png"
    known = {"If-None-Match": first.headers["etag"]}
    assert served.ask("/api/images/0/picture", headers=known).status == 304
    draw_discs(served.session.folder / "a.png", 2)
    again = served.ask("/api/images/0/picture", headers=known)
    assert again.status == 200
    assert again.body != first.body


def test_frames_of_a_stack_are_images(tmp_path: Path) -> None:
    folder = tmp_path / "films"
    folder.mkdir()
    draw_discs(tmp_path / "a.png", 9)
    frame = read_image(tmp_path / "a.png")[0].numpy()
    np.save(folder / "film.npy", np.stack([frame, frame.T, frame[::-1]]))
    with serving(folder) as served:
        served.finished()
        assert served.ask("/api/images").value["names"] == [f"film.npy/{i}" for i in (1, 2, 3)]
        assert served.ask("/api/counts").value == {"images": [9, 9, 9], "total": 27}
        boxes = served.ask("/api/images/1/objects").value["boxes"]
        upright = served.ask("/api/images/0/objects").value["boxes"]
        assert sorted(boxes) == sorted([y1, x1, y2, x2] for x1, y1, x2, y2 in upright)
        first, second = (served.ask(f"/api/images/{i}/picture") for i in (0, 1))
        assert first.status == second.status == 200
        assert first.body != second.body


def test_groups_are_those_of_the_whole_folder() -> None:
    generator = np.random.default_rng(0)
    objects = {}
    for image in range(3):
        kinds = np.arange(20) % 3 == 0
        embeddings = generator.normal(0, 0.1, (20, 4)) + 5 * kinds[:, None]
        boxes = np.arange(80.0).reshape(20, 4)
        scores = np.where(np.arange(20) == 3, 0.2, 0.9)
        objects[image] = embeddings.astype(np.float32), scores, boxes
    groups, numbers = groups_of(objects)
    assert [group.count for group in groups] == [39, 18]  # of 13 and 7, less the doubtful one
    assert all(numbers[image].tolist() == ([2, 1, 1] * 7)[:20] for image in range(3))
    for number, group in enumerate(groups, start=1):
        row = int(group.box[0]) // 4
        assert numbers[group.image][row] == number
    assert groups_of({0: (np.zeros((5, 0)), np.ones(5), np.zeros((5, 4)))}) == ([], {})
    assert groups_of({}) == ([], {})
    alike = {image: (np.zeros((20, 4), np.float32), np.ones(20), boxes) for image in range(2)}
    groups, numbers = groups_of(alike)
    assert groups == [], "nothing to switch off"
    assert all(numbers[image].tolist() == [1] * 20 for image in range(2))
    objects[0][0][1] = np.nan
    groups, numbers = groups_of(objects)
    assert [group.count for group in groups] == [39, 18], "NaN is taken for 0"
    assert all(numbers[image].tolist() == ([2, 1, 1] * 7)[:20] for image in range(3))


@pytest.mark.parametrize("least", [-1.0, 2.0])
def test_csv_has_the_clusters_of_detect(
    workplace: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    least: float,
) -> None:
    monkeypatch.setattr("spairkit.groups._LEAST_SILHOUETTE", least)
    words = ["detect", "cells", "--checkpoint", "run", "--table", "objects.csv"]
    assert command(*words).status == 0
    expected = list(csv.DictReader(io.StringIO(Path("objects.csv").read_text())))
    with serving(workplace / "cells", workplace / "run") as served:
        answer = served.finished().ask("/api/export/csv?threshold=0.5")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
    assert [row["cluster"] for row in rows] == [row["cluster"] for row in expected]
    assert ({row["cluster"] for row in rows} == {"1"}) == (least > 1), "else all look alike"


def test_groups_can_be_left_out(workplace: Path) -> None:
    with serving(workplace / "cells", workplace / "run") as served:
        finder = served.finished().session.finder
        finder._numbers = {
            i: 1 + np.arange(len(finder.result(i).boxes)) % 2  # type: ignore[union-attr]
            for i in range(4)
        }
        every = served.ask("/api/counts?threshold=0.05").value["total"]
        parts = [
            served.ask(f"/api/counts?threshold=0.05&without={n}").value["total"] for n in (1, 2)
        ]
        assert sum(parts) == every > 0
        assert served.ask("/api/counts?threshold=0.05&without=1,2").value["total"] == 0


def test_run_gives_what_detect_gives(workplace: Path) -> None:
    with serving(workplace / "cells", workplace / "run") as served:
        served.finished()
        detector = load(workplace / "run", "cpu")
        for index, path in enumerate(served.session.paths):
            found = detector.detect(path, threshold=0.05)
            objects = served.ask(f"/api/images/{index}/objects").value
            assert np.allclose(objects["boxes"], found.boxes.numpy(), atol=0.006)
            assert np.allclose(objects["scores"], found.scores.numpy(), atol=6e-5)
        assert served.ask("/api/state").value["models"][1] == str(workplace / "run")


def test_model_is_exchanged_and_corrections_stay(workplace: Path) -> None:
    with serving(workplace / "cells", workplace / "run") as served:
        served.finished().put(0, revision=0, added=[[1, 1, 5, 5]])
        state = served.ask("/api/model", "PUT", b'{"model": 0}').value
        assert (state["model"], state["generation"]) == (0, 1)
        served.finished()
        assert load_watershed(served).config.model.kind == "watershed"
        assert served.ask("/api/images/0/objects").value["added"] == [[1, 1, 5, 5]]


def waited(served: Served, *statuses: str) -> Any:
    until = time.monotonic() + 120
    while (training := served.ask("/api/state").value["training"])["status"] not in statuses:
        assert time.monotonic() < until, training
        time.sleep(0.05)
    return training


def tiny_trainings(steps: int) -> Callable[[Sequence[str]], "subprocess.Popen[bytes]"]:
    """Starts the trainings that are asked for, with a tiny network."""

    def start(words: Sequence[str]) -> "subprocess.Popen[bytes]":
        more = ["--config", "tiny.toml", "--steps", str(steps), "--set", "train.retries=[]"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return start_worker([*words, *more], {"OMP_NUM_THREADS": "1"}, **streams)

    return start


@pytest.mark.long
def test_training_is_watched_to_its_end(workplace: Path) -> None:
    with serving(workplace / "cells", start=tiny_trainings(3)) as served:
        state = served.ask("/api/training", "POST").value
        assert state["training"]["run"] == "runs/folder-quick-1"
        assert served.ask("/api/training", "POST").status == 400  # one at a time
        training = waited(served, "done", "failed")
        assert training["status"] == "done", training["lines"]
        assert (training["step"], training["steps"]) == (3, 3)
        assert [point["step"] for point in training["curve"]] == [1, 2, 3]
        assert training["has_model"]


@pytest.mark.slow
def test_stopped_training_has_saved_a_model_to_take(workplace: Path) -> None:
    with serving(workplace / "cells", start=tiny_trainings(1_000_000)) as served:
        served.ask("/api/training", "POST")
        until = time.monotonic() + 120
        while not served.ask("/api/state").value["training"]["curve"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        served.ask("/api/training", "DELETE")
        training = waited(served, "stopped", "failed")
        assert training["status"] == "stopped", training["lines"]
        assert any("checkpoint saved" in line for line in training["lines"])
        assert training["step"] >= training["curve"][-1]["step"] > 0
        assert training["has_model"]
        state = served.ask("/api/training/model", "PUT").value
        assert state["models"][state["model"]] == training["run"] == "runs/folder-quick-1"
        assert state["uses_training"]
        assert served.finished().ask("/api/images/0/objects").status == 200


@pytest.mark.slow
def test_training_ends_with_a_killed_app(workplace: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "from spairkit.cli.workers import start_worker\n"
        "pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}\n"
        "child = start_worker(sys.argv[1:], **pipes)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    words = ["train", "--data", "cells", "--config", "tiny.toml", "--steps", "1000000"]
    words += ["--out", "new", "--set", "train.validation_every=100000"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, start_new_session=True
    ) as app:
        assert app.stdout is not None
        child = int(app.stdout.readline())
        until = time.monotonic() + 120
        while not Path("new/metrics.jsonl").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        app.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and not is_zombie(child):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the training goes on")
        time.sleep(0.05)
    assert [path.name for path in Path("new").glob("checkpoints/step-*/manifest.json")]


def is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_command_refuses_in_one_line(
    workplace: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such folder" in command("app", "nowhere").err
    assert "no images in this folder" in command("app", "run/checkpoints").err
    Path("bad.json").write_text("{}")
    assert "not corrections" in command("app", "cells", "--out", "bad.json").err
    assert "create it first" in command("app", "cells", "--out", "no/where.json").err
    with serving(workplace / "cells") as served:
        assert f"--port {served.port}: " in command("app", "cells", "--port", served.port).err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'spairkit[app]'" in command("app", "cells").err


def test_corrections_are_no_data_of_a_folder(workplace: Path, command: Callable[..., Any]) -> None:
    CorrectionsFile(workplace / "cells" / "spairkit-corrections.json").put(
        "0.png", Corrections(added=((0, 0, 4, 4),))
    )
    names = [path.name for path in Path("cells").iterdir()]
    assert len(names) == 6
    before = command("count", "cells", "--checkpoint", "run", "--format", "csv").out
    os.remove("cells/spairkit-corrections.json")
    assert command("count", "cells", "--checkpoint", "run", "--format", "csv").out == before
