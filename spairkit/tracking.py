"""Links the objects of consecutive frames to tracks, by position and appearance.

    tracks = track(list(spairkit.load("runs/cells").detect_many("cells.tif")))
    tracks.number, tracks.frame, tracks.x, tracks.y   # a row for each object of a track

Frame by frame, the tracks so far and the new objects are assigned to each other at the least total
cost (Crocker and Grier 1996; Jaqaman et al. 2008). A pair at most `reach` apart costs the square of
its distance in units of `reach` and, with embeddings, that of the distance of their appearances in
units of the largest usual one; a track without an object, or an object without a track, costs as
much as the worst pair allowed. A track that finds no object waits for `gap` frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from spairkit.detections import Detections

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_USUAL = 4.0  # times the median step, which 1 of 65,000 steps of diffusion exceeds
_LEAST_REACH = 0.5  # of an object's typical side
_STEADY = 0.5  # of the step that is left after a prediction, for predictions to be used
_LEAST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """Objects with the number of their track: a row for each, in order of track and frame."""

    number: Ints
    """[n], from 1, in the order in which tracks begin."""
    frame: Ints
    """[n], from 0."""
    row: Ints
    """[n], of the object in the `Detections` of its frame."""
    x: Floats
    """[n], the centre of the box, px."""
    y: Floats
    """[n], likewise."""
    reach: float
    """Largest distance between an object and its track in the frame before, px."""
    predicted: bool
    """Whether a track was expected to go on at the speed of its last step."""

    def __len__(self) -> int:
        """The number of tracks."""
        return int(self.number.max(initial=0))

    def __repr__(self) -> str:
        """Tracks, objects and the reach, in one line."""
        return (
            f"Tracks({len(self)} tracks of {len(self.number)} objects, reach {self.reach:.1f} px)"
        )

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame` in trackpy's form: `particle`, `frame`, `x`, `y`, and `row`.

        Raises:
            ImportError: pandas is missing.
        """
        import pandas

        return pandas.DataFrame(
            {
                "particle": self.number,
                "frame": self.frame,
                "x": self.x,
                "y": self.y,
                "row": self.row,
            }
        )


def track(frames: Sequence[Detections], *, reach: float | None = None, gap: int = 2) -> Tracks:
    """Links objects over frames; objects without a partner are tracks of one frame.

    Args:
        frames: the objects of each frame, in order.
        reach: the largest distance between an object and its track in the frame before, px. A track
            that has missed n frames reaches sqrt(n + 1) times as far. Default: four times the
            median step of mutual nearest neighbours, and at least half of an object's side.
        gap: frames for which a track may miss its object, from 0.

    Raises:
        ValueError: `reach` is not positive, or `gap` is negative.
    """
    if reach is not None and not reach > 0:
        raise ValueError(f"reach must be positive, got {reach}")
    if gap < 0:
        raise ValueError(f"gap must be at least 0, got {gap}")
    points = [_centres(found) for found in frames]
    looks = [found.what.double().numpy() for found in frames]
    steps, changes = _steps(points, looks)
    if reach is None:
        sides = [(f.boxes[:, 2:] - f.boxes[:, :2]).amax(1).double().numpy() for f in frames]
        side = (
            float(np.median(np.concatenate([*sides, np.zeros(0)]))) if any(map(len, sides)) else 1.0
        )
        usual = _USUAL * float(np.median(steps)) if len(steps) >= _LEAST_STEPS else 0.0
        reach = max(usual, _LEAST_REACH * side)
    change = _USUAL * float(np.median(changes)) if len(changes) >= _LEAST_STEPS else 0.0
    linked = _linked(points, looks, reach, change, gap, predicts=False)
    predicts = _is_steady(linked, points)
    if predicts:
        linked = _linked(points, looks, reach, change, gap, predicts=True)
    return _tracks(linked, points, reach, predicts)


@dataclass
class _Track:
    """A track as it grows."""

    frames: list[int]
    rows: list[int]
    place: Floats  # [2], of the last object
    look: Floats  # [A], of the last object
    speed: Floats = field(default_factory=lambda: np.zeros(2))  # [2], px a frame


def _centres(found: Detections) -> Floats:  # [n, 2]
    boxes: Floats = found.boxes.double().numpy()
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _steps(points: list[Floats], looks: list[Floats]) -> tuple[Floats, Floats]:
    """Distances, and changes of appearance, of mutual nearest neighbours in consecutive frames."""
    steps, changes = [np.zeros(0)], [np.zeros(0)]
    for t in range(1, len(points)):
        before, now = points[t - 1], points[t]
        if not len(before) or not len(now):
            continue
        forward, back = KDTree(now).query(before)[1], KDTree(before).query(now)[1]
        mutual = np.flatnonzero(back[forward] == np.arange(len(before)))
        pairs = forward[mutual]
        steps.append(np.linalg.norm(now[pairs] - before[mutual], axis=1))
        changes.append(np.linalg.norm(looks[t][pairs] - looks[t - 1][mutual], axis=1))
    return np.concatenate(steps), np.concatenate(changes)


def _linked(
    points: list[Floats],
    looks: list[Floats],
    reach: float,
    change: float,
    gap: int,
    *,
    predicts: bool,
) -> list[_Track]:
    """All tracks, in the order in which they begin."""
    tracks: list[_Track] = []
    waiting: list[_Track] = []
    for t, (places, look) in enumerate(zip(points, looks, strict=True)):
        waiting = [item for item in waiting if t - item.frames[-1] <= gap + 1]
        taken: set[int] = set()
        for one, row in _pairs(waiting, places, look, t, reach, change, predicts=predicts):
            item, passed = waiting[one], t - waiting[one].frames[-1]
            item.speed = (places[row] - item.place) / passed
            item.place, item.look = places[row], look[row]
            item.frames.append(t)
            item.rows.append(row)
            taken.add(row)
        new = [
            _Track([t], [row], places[row], look[row])
            for row in range(len(places))
            if row not in taken
        ]
        tracks += new
        waiting += new
    return tracks


def _pairs(
    waiting: list[_Track],
    places: Floats,  # [n, 2]
    looks: Floats,  # [n, A]
    t: int,
    reach: float,
    change: float,
    *,
    predicts: bool,
) -> list[tuple[int, int]]:
    """Tracks and objects of frame `t` that belong together, at the least total cost."""
    if not waiting or not len(places):
        return []
    passed = np.array([t - item.frames[-1] for item in waiting])
    expected = np.stack([item.place for item in waiting])
    if predicts:
        expected = expected + np.stack([item.speed for item in waiting]) * passed[:, None]
    reaches = reach * np.sqrt(passed)
    near = KDTree(places).query_ball_point(expected, reaches)
    one = np.repeat(np.arange(len(waiting)), [len(rows) for rows in near])
    row = np.concatenate([np.array(rows, np.int64) for rows in near])
    if not len(row):
        return []
    distances = np.linalg.norm(places[row] - expected[one], axis=1)
    costs = (distances / reaches[one]) ** 2
    if change > 0:
        before = np.stack([item.look for item in waiting])
        differences = np.linalg.norm(looks[row] - before[one], axis=1)
        costs = (costs + np.minimum(differences / change, 1.0) ** 2) / 2
    # small problems, of tracks and objects that compete, instead of a large one
    size = len(waiting) + len(places)
    graph = coo_array((np.ones(len(row)), (one, len(waiting) + row)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][one]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    pairs: list[tuple[int, int]] = []
    for group in groups:
        ones, i = np.unique(one[group], return_inverse=True)
        rows, j = np.unique(row[group], return_inverse=True)
        # a pair within reach costs 1 less than two that stay alone, or less
        gains = np.zeros((len(ones), len(rows)))
        gains[i, j] = 2.0 - costs[group]
        for a, b in zip(*linear_sum_assignment(gains, maximize=True), strict=True):
            if gains[a, b] > 0:
                pairs.append((int(ones[a]), int(rows[b])))
    return pairs


def _is_steady(tracks: list[_Track], points: list[Floats]) -> bool:
    """Whether a step resembles the one before, so that predictions are nearer than last places."""
    steps, turns = [], []
    for item in tracks:
        path = np.stack([points[t][row] for t, row in zip(item.frames, item.rows, strict=True)])
        direct = np.diff(item.frames) == 1
        moves = np.diff(path, axis=0)
        both = direct[1:] & direct[:-1]
        steps.append(np.linalg.norm(moves[1:][both], axis=1))
        turns.append(np.linalg.norm(np.diff(moves, axis=0)[both], axis=1))
    step, turn = np.concatenate([*steps, np.zeros(0)]), np.concatenate([*turns, np.zeros(0)])
    return len(step) >= _LEAST_STEPS and bool(np.median(turn) < _STEADY * np.median(step))


def _tracks(tracks: list[_Track], points: list[Floats], reach: float, predicted: bool) -> Tracks:
    sizes = [len(item.frames) for item in tracks]
    frame = np.array([t for item in tracks for t in item.frames], np.int64)
    row = np.array([row for item in tracks for row in item.rows], np.int64)
    starts = np.cumsum([0, *(len(places) for places in points)])
    places = np.concatenate([*points, np.zeros((0, 2))])[starts[frame] + row]
    return Tracks(
        number=np.repeat(np.arange(1, len(tracks) + 1), sizes).astype(np.int64),
        frame=frame,
        row=row,
        x=places[:, 0],
        y=places[:, 1],
        reach=reach,
        predicted=predicted,
    )
