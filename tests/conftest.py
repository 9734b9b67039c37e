"""Shared fixtures: uninitialised memory is NaN; `kernel` runs over this machine's backends;
`discs` is a SPAIR made by hand; `cell_loop` builds one whose loop is tested; `command` runs a
command and holds it to the contract of errors; `workplace` has images and a run of a tiny SPAIR."""

import gc
import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

# the processes of -n 2 share the cores, and threads that wait for each other would fill them
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spairkit import detector as detector_module
from spairkit.cli.main import main
from spairkit.config import SPAIRConfig
from spairkit.images import num_channels, write_png
from spairkit.models.latents import Latents
from spairkit.models.slots import Slots
from spairkit.models.spair import SPAIR
from spairkit.search.energy import Energy, Scene

_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")

# torch remembers the functions that a default device applies to: those before the patches below
with torch.device("meta"):
    torch.empty(0)

# processes in the background of a shell, or under nohup, ignore signals that some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _cpu_by_default() -> Iterator[None]:
    """Gives the CPU to tests that ask for no device, and to processes that they start.

    They compare bits and files, which on a GPU are others.
    """
    torch.cuda.is_available()  # the driver of this process reads the variable now
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(detector_module, "_default_device", lambda: "cpu")
        patched.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def _gpus_for_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the GPUs back to processes that tests of GPUs start."""
    if request.node.get_closest_marker("gpu"):
        if _VISIBLE is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", _VISIBLE)


@pytest.fixture(autouse=True, scope="module")
def _exclude_imports_from_garbage_collection() -> None:
    """Scanning torch's compiler would add a third of a second to each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process say the same on slow machines."""
    monkeypatch.setattr("spairkit.cli.console.LINE_EVERY_SECONDS", math.inf)


@pytest.fixture(autouse=True)
def _poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh floating-point tensors with NaN, so that an unwritten element is noticed."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            # torch.compile must trace the original call
            if torch.compiler.is_compiling() or not fresh.is_floating_point():
                return fresh
            return fresh.fill_(float("nan"))

        return allocate_nan

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def float64_by_default() -> Callable[[], AbstractContextManager[None]]:
    """A context in which the default dtype of new tensors is float64."""

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return context


def kernel_backends() -> list[str]:
    """The compiled backends that this process can run."""
    if torch.cuda.is_available():
        return ["cpu", "triton"]
    # Triton chooses compiler or interpreter when it is imported: a process has only one of them
    return ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernel_backends())


@pytest.fixture
def kernel_device(kernel: str) -> torch.device:
    """The device of tensors for the backend `kernel`."""
    return torch.device("cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def fast_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter without its checks of integers, which take half the time and report
    nothing in there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import interpreter_builder as builder

        monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))


class _NoSync(TorchDispatchMode):
    """Fails on operations that synchronise with a device: their values or shapes depend on data.

    `lift_fresh` is one of them: it copies a tensor of Python numbers to the device at once.
    """

    SYNCHRONISING = (
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.lift_fresh,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.unique_dim,
        torch.ops.aten._unique2,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in self.SYNCHRONISING, f"{func} synchronises with the device"
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> type[_NoSync]:
    """A context in which an operation that synchronises with a device fails."""
    return _NoSync


class Recorder(TorchDispatchMode):
    """Runs operations and records them; `play` repeats them in place, as a CUDA graph would."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorder() -> type[Recorder]:
    """A context that records the operations in it, in the place of a CUDA graph."""
    return Recorder


Disc = tuple[float, float, float, float]
"""x and y of the centre, diameter, px, and z_what[0], which makes it brighter."""


class Discs:
    """A SPAIR made by hand, whose decoder draws a white disc; its encoder finds none.

    z_what[0] changes the brightness and z_what[1] the hue. The encoder gives z_what 0 to every
    glimpse, and every cell an absent object of 12 px in its middle.
    """

    SIDE = 12.0
    PLACES = 2  # that the count prior counts in a cell

    def __init__(self, **settings: Any) -> None:
        base: dict[str, Any] = {
            "backbone_channels": (4,),
            "features": 4,
            "hidden": 4,
            "passthrough": 2,
            "what": 2,
            "encoder_hidden": (),
            "decoder_hidden": (),
            "colour_scale": 1.0,
            "alpha_scale": 1.0,
            "alpha_bias": 0.0,
            "std_bias": -3.0,
            "size_bias": -1.1,  # 12 of 48 px
            "size_prior_mean": -1.1,
            "presence_bias": -10.0,
            "odds_end": 0.05,
            "likelihood_floor": 1e-6,
            "importance_floor": 0.00025,
            "box_contrast": 0.1,
        }
        self.network = net = SPAIR(SPAIRConfig(**base | settings)).eval().requires_grad_(False)
        side = net.config.object_size
        place = torch.arange(side) - (side - 1) / 2
        radius = (place.square() + place.square()[:, None]).sqrt()
        moments, maps = net.encoder[-1], net.decoder[-1]
        assert isinstance(moments, nn.Linear)
        assert isinstance(maps, nn.Linear)
        moments.weight.zero_()
        moments.bias[: net.config.what] = 0.0
        for network in (net.where_network, net.depth_network, net.presence_network):
            network.last.weight.zero_()
        net.where_network.last.bias[:2] = 0.0
        net.depth_network.last.bias[0] = 0.0
        bias = maps.bias.unflatten(0, (side, side, 4))
        bias[..., :3] = 2.0
        bias[..., 3] = (3 * (side / 2 - 0.8 - radius)).clamp(-9, 9)
        weight = maps.weight.zero_().unflatten(0, (side, side, 4))
        weight[..., :3, 0] = 1.5
        weight[..., 0, 1], weight[..., 2, 1] = 0.3, -0.3
        self.energy = Energy(net, 0.5)

    def boxes(self, discs: list[Disc]) -> Tensor:  # [n, 4] xyxy, px
        rows = [[x - d / 2, y - d / 2, x + d / 2, y + d / 2] for x, y, d, _ in discs]
        return torch.tensor(rows).reshape(-1, 4)

    def slots(self, *images: list[Disc], cells: list[tuple[int, int]] | None = None) -> Slots:
        """The state of each image; `cells` names row and column of each disc's cell."""
        states = []
        for discs in images:
            boxes, c = self.boxes(discs), self.network.config
            centre = (boxes[:, :2] + boxes[:, 2:]).flip(-1) / 2
            cell = (centre / c.cell).floor() if cells is None else torch.tensor(cells).float()
            what = torch.zeros(len(discs), c.what + 1)
            what[:, 0] = torch.tensor([z for *_, z in discs])
            where = self.network.where_of(boxes, cell * c.cell)
            latents = torch.cat([where, what], dim=-1)[None]
            states.append(
                Slots(
                    latents,
                    torch.full_like(latents, 0.1),
                    (cell * c.cell)[None],
                    torch.ones(1, len(discs)),
                    torch.full((1, len(discs)), torch.inf),
                )
            )
        return Slots.stack(states)

    def scene(self, images: Tensor) -> Scene:
        """Whole images on black."""
        rows, columns = self.network.grid(images.shape[-2], images.shape[-1])
        zeros = images.new_zeros(len(images))
        return Scene(
            images,
            images.new_zeros(len(images), 3, 1, 1),
            num_channels(images),
            evidence=zeros + 1,
            outside=zeros,
            places=zeros + rows * columns * self.PLACES,
        )

    def draw(self, slots: Slots, size: tuple[int, int]) -> Tensor:  # [B, 3, H, W]
        """The images that the objects explain perfectly."""
        blank = self.scene(torch.zeros(len(slots.present), 3, *size))
        return self.energy.draw(blank, slots).clamp(0, 1)

    def latents(self, slots: Slots, size: tuple[int, int], presence_logit: float = -8.0) -> Latents:
        """What the encoder would have to find to start from `slots`: one object of a cell at most.

        Args:
            presence_logit: of the other cells, which have objects of 12 px in their middle.
        """
        c = self.network.config
        rows, columns = self.network.grid(*size)
        batch, number = len(slots.present), rows * columns
        mean = torch.zeros(batch, number, slots.latents.shape[-1])
        mean[..., 2:4] = c.size_bias
        presence = torch.zeros(batch, number)
        for b, i in (slots.present > 0).nonzero().tolist():
            row, column = (slots.corner[b, i] / c.cell).long().tolist()
            assert presence[b, row * columns + column] == 0
            presence[b, row * columns + column] = 1
            mean[b, row * columns + column] = slots.latents[b, i]
        index = torch.arange(number)
        corner = c.cell * torch.stack([index // columns, index % columns], dim=-1).float()
        std = torch.full_like(mean, 0.1)
        where, what, depth = mean.split([4, c.what, 1], dim=-1)
        return Latents(
            where_mean=where,
            where_std=std[..., :4],
            what_mean=what,
            what_std=std[..., 4:-1],
            what=what,
            depth_mean=depth[..., 0],
            depth_std=std[..., -1],
            depth=depth[..., 0],
            presence_logit=torch.where(presence > 0, 8.0, presence_logit),
            presence=presence,
            boxes=self.network.boxes(where, corner),
        )


@pytest.fixture
def discs() -> type[Discs]:
    """A SPAIR made by hand, with settings, and states and scenes for it."""
    return Discs


class CellLoop:
    """A loop over cells in which everything matters."""

    @staticmethod
    def build(config: SPAIRConfig) -> SPAIR:
        """A SPAIR in float64 with larger weights and biases than those of a fresh one."""
        torch.manual_seed(0)
        model = SPAIR(config).double()
        with torch.no_grad():
            for network in (model.where_network, model.depth_network, model.presence_network):
                network.last.weight.mul_(3)
                for line in (network.first, network.second):
                    line.bias.normal_()
        return model

    @staticmethod
    def score(latents: Latents) -> Tensor:
        """A scalar that weights every element of the latents differently."""
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros((), dtype=torch.float64, device=latents.what.device)
        for field in fields(Latents):
            value = getattr(latents, field.name)
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            total = total + (weight.to(value.device) * (value + value.square())).sum()
        return total


@pytest.fixture
def cell_loop() -> type[CellLoop]:
    """A SPAIR whose loop over cells is tested, and a scalar of its latents."""
    return CellLoop


class Ended(NamedTuple):
    """The end of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command in this process, whatever its exit status."""

    def run(*words: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command in this process: it succeeds, or prints one line and its status is 2."""

    def run(*words: object) -> Ended:
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # the command prints them
            with pytest.raises(SystemExit) as ended:
                main([str(word) for word in words])
        out, err = capfd.readouterr()
        said_before = "spairkit: warning: ", "comparing in "
        lines = [line for line in err.splitlines() if not line.startswith(said_before)]
        assert all(line.isprintable() for line in lines), err
        assert ended.value.code in (0, 2), err
        if ended.value.code == 2:
            assert out == ""
            assert len(lines) == 1, err
            assert lines[0].startswith("spairkit: "), err
            assert len(lines[0]) < 2000, err
        return Ended(ended.value.code, out, err)

    return run


_TINY = """
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
training_wheels = 0
validation_every = 1
threads = 1
"""


@pytest.fixture(scope="session")
def _workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "tiny.toml").write_text(_TINY)
    (folder / "cells").mkdir()
    images, annotations = [], []
    for n in range(4):
        image = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(n)) / 4
        image[:, 4 : 12 + n, 6:14] = 1.0
        write_png(folder / "cells" / f"{n}.png", image)
        images.append({"id": n, "file_name": f"{n}.png", "width": 24, "height": 24})
        box = {"id": n + 1, "image_id": n, "category_id": 1, "bbox": [6, 4, 8, 8 + n]}
        annotations.append(box | {"area": 64, "iscrowd": 0})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "cells" / "annotations.json").write_text(json.dumps(truth))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        words = ["--config", "tiny.toml", "--data", "cells", "--out", "run", "--steps", "3"]
        with pytest.raises(SystemExit) as ended:
            main(["train", *words, "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture
def workplace(_workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with cells/ of four annotated images of 24 x 24 px, tiny.toml and run/,
    which ends at step 3 and has a checkpoint of each step."""
    folder = tmp_path / "workplace"
    shutil.copytree(_workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
