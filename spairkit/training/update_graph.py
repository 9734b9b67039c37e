"""A trainer whose updates are a CUDA graph: recorded once, then launched as a whole.

Launched one by one, the hundreds of small kernels of an update keep a GPU waiting for the host.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spairkit.config import Config
from spairkit.cuda_graphs import Recorded
from spairkit.data.datasets import Dataset
from spairkit.data.scenes import Batch, Scenes
from spairkit.models.elbo import Losses
from spairkit.models.noise import Part, Tape
from spairkit.storage.runs import Run
from spairkit.training.distributed import World
from spairkit.training.trainer import Inputs, Trainer


def make_trainer(
    config: Config, run: Run | None, train: Dataset, device: torch.device, world: World
) -> Trainer:
    """A `RecordingTrainer` where an update can be recorded, else a `Trainer`.

    A record needs a GPU for each process. With the true counts of a folder's images the updates of
    AIR and DAIR differ in shape; scenes have a greatest count, for which all updates can be made.
    """
    records = device.type == "cuda" and (
        not config.model.count_is_given or isinstance(train, Scenes)
    )
    return (RecordingTrainer if records else Trainer)(config, run, train, device, world)


class RecordingTrainer(Trainer):
    """A `Trainer` that records an update once and replays it; see `Trainer` for its arguments.

    A record reads its inputs from tensors that stay in one place: `_place` fills them before each
    update. Scenes that one kernel makes are part of the record, which is given their index.
    """

    capturable = True

    @property
    def makes_scenes(self) -> bool:
        """Whether the scenes of an update are made inside its record."""
        return isinstance(self.train, Scenes) and self.train.fused

    def update(self) -> Losses:
        """As `Trainer.update`; the returned tensors are overwritten by the next update."""
        if self._set_wheels(self.step < self.config.train.training_wheels):
            self.graph = UpdateGraph(self._recorded, self.device, self.world)
            self.tapes = Tape(), Tape()
            self.places: dict[str, Tensor] = {}
        self.placed = self._placed(self._inputs(self.step))
        losses = self.graph()
        self.step += 1
        return losses

    def _batch(self, step: int) -> Batch | None:
        return None if self.makes_scenes else super()._batch(step)

    def _placed(self, inputs: Inputs) -> Inputs:
        """The inputs in the tensors that the record reads, and noise on tapes."""
        for tape, source in zip(self.tapes, (inputs.noise, inputs.gradient_noise), strict=True):
            assert isinstance(source, torch.Generator | Part)
            tape.wind(source)
        batch = inputs.batch
        if batch is None:
            self._place("first", self._first_image(self.step), torch.int64)
        else:
            images, counts = (self._place(n, getattr(batch, n)) for n in ("images", "counts"))
            batch = replace(batch, images=images, counts=counts)
        return Inputs(
            batch=batch,
            success=self._place("success", inputs.success),
            rate=self._place("rate", inputs.rate, torch.float32),
            noise=self.tapes[0],
            gradient_scale=self._place("gradient_scale", inputs.gradient_scale),
            gradient_noise=self.tapes[1],
        )

    def _place(
        self, name: str, value: float | Tensor, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Copies `value` into the persistent tensor `name`; `dtype` is that of a number."""
        if name not in self.places:
            number = torch.empty((), dtype=dtype, device=self.device)
            self.places[name] = torch.empty_like(value) if isinstance(value, Tensor) else number
        place = self.places[name]
        return place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)

    def _recorded(self) -> Losses:
        """The update that is recorded."""
        for tape in self.tapes:
            tape.rewind()
        inputs = self.placed
        if inputs.batch is None:
            assert isinstance(self.train, Scenes)
            share = self.config.train.batch_size // self.world.size
            rows = torch.arange(share, device=self.device)
            inputs = replace(inputs, batch=self.train.unchecked(self.places["first"] + rows))
        return self._apply(inputs)

    def _counts(self, batch: Batch) -> dict[str, Any]:
        """As in `Trainer`, and the number of steps, which a record cannot read off the counts."""
        given = super()._counts(batch)
        return given | {"steps": max(self.config.data.max_objects, 1)} if given else given


class UpdateGraph(Recorded[Losses]):
    """A recorded update of all processes of a world.

    Where recording fails in one process, every call of every process runs `update`: exchanges that
    are recorded here and not there might not meet.
    """

    def __init__(
        self, update: Callable[[], Losses], device: torch.device, world: World | None = None
    ) -> None:
        super().__init__(update, device, "an update")
        self._world = world or World()

    def _agreed(self, plays: bool) -> bool:
        return not self._world.greatest(int(not plays))
