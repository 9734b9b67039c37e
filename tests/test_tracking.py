"""Tracks of simulated particles, and of digits that move, against what is true."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray

from spairkit.config import DataConfig
from spairkit.data.glyphs import load_glyphs, resize
from spairkit.detections import Detections
from spairkit.images import write_png
from spairkit.report.colours import COLOURS, DARK_COLOURS
from spairkit.report.trails import draw_tracks
from spairkit.tracking import track

Link = tuple[int, int, int, int]  # frame and row of one object, and of the next
_RADIUS = 6.0


def found_at(places: NDArray[Any], what: NDArray[Any] | None = None) -> Detections:
    """Objects of one size, with their centres at `places` [n, 2]."""
    boxes = np.concatenate([places - _RADIUS, places + _RADIUS], 1)
    looks = np.zeros((len(boxes), 0)) if what is None else what
    scores = torch.ones(len(boxes))
    return Detections(
        torch.from_numpy(boxes).float(), scores, torch.from_numpy(looks).float(), scores - 1
    )


def simulated(
    seed: int,
    *,
    particles: int = 50,
    frames: int = 100,
    side: float = 500,
    step: float = 3.0,
    drift: float = 0.0,
    missed: float = 0.03,
    looks: int = 0,
) -> tuple[list[Detections], set[Link]]:
    """Particles that diffuse and drift, are missed now and then, vanish and appear; true links."""
    rng = np.random.default_rng(seed)
    places = rng.random((particles, 2)) * side
    what = rng.normal(0, 1, (particles, looks))
    names = np.arange(particles)
    found, links = [], set()
    last: dict[int, tuple[int, int]] = {}
    for t in range(frames):
        seen = rng.permutation(np.flatnonzero(rng.random(particles) >= missed))
        found.append(found_at(places[seen], what[seen] + rng.normal(0, 0.1, (len(seen), looks))))
        for row, name in enumerate(names[seen].tolist()):
            if name in last and t - last[name][0] <= 3:
                links.add((*last[name], t, row))
            last[name] = (t, row)
        places = places + rng.normal(0, step, places.shape) + drift
        gone = np.flatnonzero(rng.random(particles) < 0.004)
        places[gone], what[gone] = rng.random((len(gone), 2)) * side, rng.normal(0, 1, looks)
        names[gone] = names.max() + 1 + np.arange(len(gone))
    return found, links


def links_of(numbers: Any, frames: Any, rows: Any) -> set[Link]:
    order = np.lexsort((frames, numbers))
    numbers, frames, rows = (np.asarray(x)[order].tolist() for x in (numbers, frames, rows))
    return {
        (frames[i], rows[i], frames[i + 1], rows[i + 1])
        for i in range(len(numbers) - 1)
        if numbers[i] == numbers[i + 1]
    }


def right(found: set[Link], true: set[Link]) -> float:
    """The lesser of the shares of true links that are found, and of found links that are true."""
    both = len(found & true)
    return min(both / len(found), both / len(true))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 0.99),
        ({"step": 6.0, "looks": 8}, 0.995),
        ({"step": 1.5, "drift": 12.0}, 0.99),
    ],
    ids=["diffusion", "appearance", "drift"],
)
def test_links_of_fifty_particles_over_a_hundred_frames(
    seed: int, options: dict[str, Any], least: float
) -> None:
    found, true = simulated(seed, **options)
    tracks = track(found)
    assert right(links_of(tracks.number, tracks.frame, tracks.row), true) >= least
    assert tracks.predicted == ("drift" in options)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # of pandas, used by trackpy
@pytest.mark.parametrize("seed", [3, 4])
def test_links_are_those_of_trackpy(seed: int) -> None:
    trackpy = pytest.importorskip("trackpy")
    pandas = pytest.importorskip("pandas")
    trackpy.quiet()
    found, true = simulated(seed)
    tracks = track(found, gap=2)
    places = [
        {"frame": t, "row": row, "x": (x1 + x2) / 2, "y": (y1 + y2) / 2}
        for t, item in enumerate(found)
        for row, (x1, y1, x2, y2) in enumerate(item.boxes.double().tolist())
    ]
    other = trackpy.link(pandas.DataFrame(places), search_range=tracks.reach, memory=2)
    theirs = links_of(other["particle"], other["frame"], other["row"])
    ours = links_of(tracks.number, tracks.frame, tracks.row)
    assert right(ours, theirs) > 0.99
    assert right(ours, true) > right(theirs, true) - 0.002


def test_every_object_has_one_track() -> None:
    found, _ = simulated(5, particles=20, frames=12)
    tracks = track(found)
    assert sorted(zip(tracks.frame.tolist(), tracks.row.tolist(), strict=True)) == [
        (t, row) for t, item in enumerate(found) for row in range(len(item))
    ]
    assert len(tracks) == len(np.unique(tracks.number)) == tracks.number.max()
    for i in range(len(tracks.number)):
        x1, y1, x2, y2 = found[tracks.frame[i]].boxes[tracks.row[i]].tolist()
        assert (tracks.x[i], tracks.y[i]) == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2))
    order = list(zip(tracks.number.tolist(), tracks.frame.tolist(), strict=True))
    assert order == sorted(order)
    begins = [tracks.frame[tracks.number == n].min() for n in range(1, len(tracks) + 1)]
    assert begins == sorted(begins)


def test_gaps_births_and_ends() -> None:
    still, late, lost = [50.0, 50.0], [150.0, 50.0], [250.0, 50.0]
    frames = [[still, lost], [still, lost], [late], [late, still], [late, still], [still]]
    found = [found_at(np.array(places)) for places in frames]

    def paths(gap: int) -> list[tuple[float, list[int]]]:
        tracks = track(found, gap=gap)
        return [
            (tracks.x[tracks.number == n][0], tracks.frame[tracks.number == n].tolist())
            for n in range(1, len(tracks) + 1)
        ]

    assert paths(1) == [(50.0, [0, 1, 3, 4, 5]), (250.0, [0, 1]), (150.0, [2, 3, 4])]
    assert paths(0) == [(50.0, [0, 1]), (250.0, [0, 1]), (150.0, [2, 3, 4]), (50.0, [3, 4, 5])]


def test_the_total_cost_is_least() -> None:
    """The nearest pair is given up where both objects have a partner otherwise."""
    found = [
        found_at(np.array([[0.0, 0.0], [10.0, 0.0]])),
        found_at(np.array([[9.0, 0.0], [16.0, 0.0]])),
    ]
    tracks = track(found, reach=12)
    assert links_of(tracks.number, tracks.frame, tracks.row) == {(0, 0, 1, 0), (0, 1, 1, 1)}
    alone = track(found, reach=8)
    assert links_of(alone.number, alone.frame, alone.row) == {(0, 1, 1, 0)}


def test_appearance_decides_between_equal_distances() -> None:
    rng = np.random.default_rng(0)
    looks = np.array([[0.0, 1.0], [1.0, 0.0]])
    found = []
    for t in range(12):
        # two objects that change places through each other
        places = np.array([[20.0 + t, 30.0], [31.0 - t, 30.0]])
        order = rng.permutation(2)
        found.append(found_at(places[order], looks[order] + rng.normal(0, 0.01, (2, 2))))
    tracks = track(found, reach=4)
    assert len(tracks) == 2
    for n in (1, 2):
        own = [
            found[t].what[r].argmax().item()
            for t, r in zip(
                tracks.frame[tracks.number == n], tracks.row[tracks.number == n], strict=True
            )
        ]
        assert len(set(own)) == 1


def test_nothing_to_link() -> None:
    nothing = found_at(np.zeros((0, 2)))
    assert len(track([])) == len(track([nothing, nothing])) == 0
    one = track([nothing, found_at(np.array([[5.0, 5.0]])), nothing])
    assert (len(one), one.frame.tolist()) == (1, [1])
    for wrong in ({"reach": 0.0}, {"reach": float("nan")}, {"gap": -1}):
        with pytest.raises(ValueError, match="must be"):
            track([], **wrong)


def test_dataframe_has_trackpys_columns() -> None:
    pytest.importorskip("pandas")
    tracks = track(simulated(6, particles=5, frames=5)[0])
    frame = tracks.to_dataframe()
    assert list(frame.columns) == ["particle", "frame", "x", "y", "row"]
    assert frame["particle"].tolist() == tracks.number.tolist()
    assert repr(tracks).startswith(f"Tracks({len(tracks)} tracks of ")


def test_paths_are_drawn_in_the_pixels_of_the_last_frame() -> None:
    places = [np.array([[10.0 + 20 * t, 40.0]]) for t in range(4)]
    found = [found_at(item) for item in places]
    drawn = draw_tracks(torch.zeros(3, 400, 400), found[-1], track(found, reach=25))
    assert drawn.shape == (3, 400, 400)
    painted = drawn.amax(0) > 0
    assert painted[40, 10:70].all()
    assert not painted[60:].any()
    single = draw_tracks(torch.zeros(3, 400, 400), found[-1], track(found, reach=5))
    assert not (single.amax(0) > 0)[40, :60].any()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_track_has_one_colour_in_its_picture(level: float) -> None:
    # the second track ends before the last frame, so rows and tracks are numbered otherwise
    y = np.array([40.0, 120.0, 200.0, 280.0])
    places = [np.stack([np.full(4, 10.0 + 20 * t), y], axis=1) for t in range(4)]
    places[2:] = [item[[3, 0, 2]] for item in places[2:]]
    found = [found_at(item) for item in places]
    tracks = track(found, reach=25, gap=0)
    assert len(tracks) == 4
    drawn = draw_tracks(torch.full((3, 400, 400), level), found[-1], tracks)
    seen = set()
    for x1, y1, x2, y2 in found[-1].boxes.round().int().tolist():
        path = tuple(drawn[:, (y1 + y2) // 2, 30].tolist())
        box = tuple(drawn[:, y1 - 1, (x1 + x2) // 2 + 1].tolist())
        assert path == box, (x1, y1, x2, y2)
        assert path in (DARK_COLOURS if level else COLOURS)
        seen.add(path)
    assert len(seen) == 3


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three digits that move over eight frames of 96 x 96 px."""
    monkeypatch.chdir(tmp_path)
    glyphs = load_glyphs(DataConfig(), "test")
    shapes = resize(glyphs.images[[0, 40, 90]], 14, full=glyphs.full)
    frames = []
    for t in range(8):
        image = np.zeros((96, 96), np.uint8)
        for shape, x, y in zip(
            shapes, (6 + 4 * t, 70, 74 - 5 * t), (8, 14 + 3 * t, 74), strict=True
        ):
            image[y : y + 14, x : x + 14] = shape
        frames.append(image)
    tifffile.imwrite("digits.tif", np.stack(frames), imagej=True, metadata={"axes": "TYX"})
    return Path("digits.tif")


def test_command_tracks_digits(stack: Path, command: Callable[..., Any]) -> None:
    words = ("track", stack, "--quiet")
    ended = command(*words, "--out", "tracks.csv", "--picture", "tracks.png")
    assert (
        "wrote tracks.csv and tracks.png: 3 tracks of 8 objects (median) in 8 frames" in ended.err
    )
    rows = list(csv.DictReader(io.StringIO(Path("tracks.csv").read_text())))
    assert [row["track"] for row in rows] == ["1"] * 8 + ["2"] * 8 + ["3"] * 8
    assert [row["frame"] for row in rows] == [*map(str, range(8))] * 3
    assert rows[10]["image"] == "digits.tif/3"
    moves = {
        (
            round((float(rows[i + 7]["x"]) - float(rows[i]["x"])) / 7),
            round((float(rows[i + 7]["y"]) - float(rows[i]["y"])) / 7),
        )
        for i in (0, 8, 16)
    }
    assert moves == {(4, 0), (0, 3), (-5, 0)}
    assert command(*words).out == Path("tracks.csv").read_text()


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(
    stack: Path, command: Callable[..., Any]
) -> None:
    Path("frames").mkdir()
    for t, frame in enumerate(tifffile.imread(stack), start=7):
        write_png(f"frames/frame{t}.png", torch.from_numpy(frame)[None].expand(3, -1, -1))
    out = command("track", "frames", "--quiet").out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["image"] for row in rows[:8]] == [f"frames/frame{t}.png" for t in range(7, 15)]
    assert len(rows) == 24


def test_frames_of_different_sizes_are_refused(stack: Path, command: Callable[..., Any]) -> None:
    Path("frames").mkdir()
    for t, side in enumerate((96, 96, 90)):
        write_png(f"frames/{t}.png", torch.zeros(3, side, 96))
    ended = command("track", "frames", "--out", "tracks.csv")
    assert ended.status == 2
    assert "frames/2.png: has 90x96 pixels (height x width) and frames/0.png 96x96" in ended.err
    ended = command("track", "frames/0.png", "--out", "tracks.csv")
    assert ended.status == 2
    assert "frames/0.png: is one frame; name a folder or a stack of several" in ended.err
    assert not list(Path().glob("tracks.csv*"))
