"""Iterations of refinement: padded ones, and recorded ones as on a GPU, against plain ones.

Without a GPU, a recorder of operations replaces CUDA graphs.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from spairkit import backends, cuda_graphs
from spairkit.cuda_graphs import Recorded
from spairkit.models.slots import Slots
from spairkit.search import iterations
from spairkit.search import refine as refine_module
from spairkit.search.energy import Energy, Scene
from spairkit.search.iterations import RecordedIterations, Work, advanced
from spairkit.search.refine import refine

if TYPE_CHECKING:
    from conftest import Discs, Recorder

SIZE = 48, 48
TRUE = [
    [(14.0, 18.0, 12.0, 0.0), (23.0, 17.0, 11.0, -0.5), (30.0, 33.0, 13.0, 0.5)],
    [(20.0, 20.0, 12.0, 0.2)],
    [],
    [(12.0, 30.0, 14.0, 0.3), (33.0, 12.0, 10.0, -0.2)],
    [(25.0, 26.0, 11.0, 0.0)],
]


def shaken(world: "Discs", images: int = len(TRUE)) -> tuple[Scene, Slots]:
    """Scenes of discs, and states with errors in all latents; the fifth state has none."""
    slots = world.slots(*TRUE[:images])
    scene = world.scene(world.draw(slots, SIZE))
    noise = torch.randn(slots.latents.shape, generator=torch.Generator().manual_seed(0))
    noise[4:] = 0
    return scene, slots.changed(slots.latents + 0.2 * noise)


def started(world: "Discs", images: int = len(TRUE)) -> Work:
    scene, slots = shaken(world, images)
    return Work.of(scene, slots, slots.present[..., None])


def assert_close(work: Work, expected: Work) -> None:
    for value, other in zip(work.tensors(), expected.tensors(), strict=True):
        # kernels of matrix products differ with the number of rows
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, recorder: "type[Recorder]") -> list[int]:
    """Replaces CUDA by the recorder; returns the number of operations of each record."""
    sizes: list[int] = []

    def record(iterate: partial[None], *_: Any) -> Callable[[], None]:
        tensors = [*iterate.args[0].tensors(), *iterate.args[1]]
        before = [tensor.clone() for tensor in tensors]
        with recorder() as recording:
            iterate()
        torch._foreach_copy_(tensors, before)  # CUDA does not execute while it records
        sizes.append(len(recording.calls))

        @torch.no_grad()
        def play() -> None:
            recording.play()

        return play

    # the recorder cannot see operations inside Numba
    monkeypatch.setitem(backends._tried, "cpu", False)
    monkeypatch.setattr(cuda_graphs, "_aside", lambda function, device: function())
    monkeypatch.setattr(cuda_graphs, "_record", record)
    return sizes


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_padding_changes_no_image(discs: "type[Discs]", likelihood: str) -> None:
    world = discs(likelihood=likelihood)
    plain = started(world, 3)
    padded = plain.padded(8, 16)
    assert padded.slots.present.shape == (8, 16)
    assert torch.equal(padded.scene.images[3:], plain.scene.images[2:].expand(5, -1, -1, -1))
    for start in (1, 6, 11):
        plain, padded = (
            advanced(world.energy, w, range(start, start + 5)) for w in (plain, padded)
        )
        some = padded.select(torch.arange(3))
        for name in ("now", "best", "mean", "scale"):
            value = getattr(some, name)
            torch.testing.assert_close(value[:, :3], getattr(plain, name), rtol=1e-4, atol=1e-5)
            assert not value[:, 3:].any(), "empty slots stay"
        for name in ("value", "here", "high"):
            torch.testing.assert_close(
                getattr(some, name), getattr(plain, name), rtol=1e-6, atol=1e-4
            )


def test_iterations_are_recorded_once_for_each_padded_shape(
    discs: "type[Discs]", records: list[int]
) -> None:
    world = discs()
    recorded = RecordedIterations(world.energy, None)
    for images in (1, 3, 4, 2, 3):
        work = started(world, images)
        for start in (0, 5):
            steps = range(start + 1, start + 6)
            expected = advanced(world.energy, work, steps)
            work = recorded(work, steps)
            assert work.slots.present.shape == (images, work.now.shape[1])
            assert_close(work, expected)
    assert len(records) == 3  # of 1, 2 and 4 images
    assert min(records) > 50


def test_results_do_not_change_with_the_next_call(discs: "type[Discs]", records: list[int]) -> None:
    world = discs()
    recorded = RecordedIterations(world.energy, None)
    first = recorded(started(world, 2), range(1, 6))
    before = [tensor.clone() for tensor in first.tensors()]
    recorded(recorded(first, range(6, 11)), range(11, 16))
    assert all(map(torch.equal, first.tensors(), before))
    assert len(records) == 1


def test_refinement_is_that_of_plain_iterations(
    discs: "type[Discs]", records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = discs()
    scene, slots = shaken(world)
    free = torch.ones_like(slots.present)
    free[0, 1] = 0
    settings: dict[str, Any] = {"tolerance": 2 / 3, "most": 100}
    expected, energies = refine(world.energy, scene, slots, free, **settings)
    recorded = RecordedIterations(world.energy, None)
    numbers: list[int] = []

    def replayed(energy: Energy, work: Work, steps: Iterable[int]) -> Work:
        numbers.append(len(work.now))
        return recorded(work, steps)

    monkeypatch.setattr(refine_module, "advanced", replayed)
    found, lowest = refine(world.energy, scene, slots, free, **settings)
    torch.testing.assert_close(lowest, energies, rtol=0, atol=0.05)
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=5e-3)
    assert torch.equal(found.present, slots.present)
    assert numbers[0] == 5
    assert numbers == sorted(numbers, reverse=True), "images that have converged leave"
    assert len(records) == len({1 << (number - 1).bit_length() for number in numbers}) > 1


def test_graphs_are_few(
    discs: "type[Discs]", records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iterations, "_MOST_GRAPHS", 2)
    world = discs()
    recorded = RecordedIterations(world.energy, None)
    for images in (1, 2, 1, 4, 1, 2):
        recorded(started(world, images), range(1, 6))
        assert len(recorded._graphs) <= 2
    assert len(records) == 4, "that of one image stays, and that of two is made again"


def test_iterations_that_cannot_be_recorded_are_launched_one_by_one(
    discs: "type[Discs]", records: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "_record", fail)
    world = discs()
    work, recorded = started(world, 2), RecordedIterations(world.energy, None)
    with pytest.warns(RuntimeWarning, match="refinement could not be recorded as a CUDA graph"):
        found = recorded(work, range(1, 11))
    assert_close(found, advanced(world.energy, work, range(1, 11)))


def test_threads_take_turns_on_the_stream_of_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the work of one thread would become part of the graph of another one."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = SimpleNamespace(replay=lambda: None)
    cuda = SimpleNamespace(
        device=lambda device: nullcontext(),
        stream=lambda stream: nullcontext(),
        graph=lambda *_, **__: nullcontext(),
        current_stream=lambda: stream,
        current_device=lambda: 0,
        set_stream=lambda stream: None,
        CUDAGraph=lambda: graph,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(cuda_graphs, "_own_stream", lambda index: stream)
    inside: list[int] = []

    def work(number: int) -> None:
        inside.append(number)
        time.sleep(0.01)
        inside.append(number)

    def call(number: int) -> None:
        recorded = Recorded(partial(work, number), torch.device("cpu"), "work")
        for _ in range(4):
            recorded()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))
    assert len(inside) == 24
    assert inside[::2] == inside[1::2]


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_iteration_never_waits_for_the_device(
    discs: "type[Discs]", no_sync: type[Any], monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    monkeypatch.setitem(backends._tried, "cpu", False)
    world = discs(likelihood=likelihood)
    work = started(world)
    with no_sync():
        advanced(world.energy, work, [1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_refinement_of_a_gpu_is_recorded_and_that_of_the_cpu(discs: "type[Discs]") -> None:
    world = discs()
    scene, slots = shaken(world)
    settings: dict[str, Any] = {"tolerance": 2 / 3, "most": 100}
    expected, energies = refine(world.energy, scene, slots, **settings)
    network = world.network.cuda()
    energy = Energy(network, 0.5)

    def moved(value: Any) -> Any:
        return type(value)(*(getattr(value, name).cuda() for name in value.__dataclass_fields__))

    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(2):
        state, lowest = refine(energy, moved(scene), moved(slots), **settings)
        found.append((state.latents.cpu(), lowest.cpu()))
    assert any(graph.iterate.plays for graph in energy.recorded._graphs.values())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(found[0][0], expected.latents, rtol=0, atol=1e-2)
    torch.testing.assert_close(found[0][1], energies, rtol=0, atol=0.1)
