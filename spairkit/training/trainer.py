"""`Trainer`: a model and its optimiser; makes updates, validations and checkpoints."""

import math
import warnings
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from spairkit.backends import computing_in
from spairkit.config import ClassicalConfig, Config, TrainConfig
from spairkit.data.crops import Cuts
from spairkit.data.datasets import Dataset, validation_batches
from spairkit.data.folder import ImageFolder
from spairkit.data.scenes import Batch, Scenes
from spairkit.detector import Detector
from spairkit.errors import InputError
from spairkit.models.conncomp import ConnComp
from spairkit.models.densities import count_success
from spairkit.models.elbo import Losses
from spairkit.models.loading import build, from_checkpoint
from spairkit.models.noise import Batches, Part, Source, uniform
from spairkit.models.spair import SPAIR
from spairkit.models.watershed import Watershed
from spairkit.names import printable
from spairkit.preparation import fixed_levels
from spairkit.storage.checkpoints import Checkpoint, Scalar, environment
from spairkit.storage.runs import Run
from spairkit.training.ahead import Ahead
from spairkit.training.distributed import World
from spairkit.training.validation import Validation, box_figures, draw

_FITTED_IMAGES = 256  # for the background "mode" and the first noise of likelihood "normal"
_NEGLIGIBLE_NOISE = 1e-12
_WITHIN = math.erf(math.sqrt(2))  # share of a normal within two standard deviations
_VALIDATED_PIXELS = 1 << 21  # of the images that a GPU computes together
_SAMPLE, _GRADIENT, _VALIDATE = 1, 2, 3  # purposes of a random stream


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of one update; in a CUDA graph the numbers are 0-d tensors."""

    batch: Batch | None
    """None where a CUDA graph makes the scenes itself."""
    success: float | Tensor
    """s of the count prior, in (0, 1)."""
    rate: float | Tensor
    """Learning rate of Adam."""
    noise: Source
    """Source of the sampling noise of the latents."""
    gradient_scale: float | Tensor
    """Standard deviation of the noise on gradients, before it is truncated."""
    gradient_noise: Source
    """Source of the noise on gradients."""


class Trainer:
    """A model, its optimiser and the number of updates made.

    Args:
        config: of the run; of a model with weights.
        run: receives metrics and checkpoints and is resumed from its last one; None: no files.
        train: the images of updates.
        device: of the model and the images.
        world: the processes that share each batch; None is this one alone.
    """

    capturable = False
    """Whether Adam keeps its counts on the device, as a CUDA graph needs them."""

    def __init__(
        self,
        config: Config,
        run: Run | None,
        train: Dataset,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.config, self.run, self.train, self.device = config, run, train, device
        self.world = world or World()
        self.step = 0
        self.best = float("-inf")
        self.best_step = 0
        # updates in a row, up to this one, that changed nothing
        self.skipped = torch.zeros((), device=device)
        checkpoint = run.latest() if run else None
        model = (
            build(config).to(device) if checkpoint is None else from_checkpoint(checkpoint, device)
        )
        assert not isinstance(model, ConnComp | Watershed)
        self.model = model.train()
        if isinstance(self.model, SPAIR):
            self.model.backend = config.train.backend
            if checkpoint is None and self.world.rank == 0:
                self._fit(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.optimiser = torch.optim.Adam(
            self.parameters.values(),
            lr=config.train.learning_rate,
            fused=True,
            capturable=self.capturable,
        )
        if run and checkpoint:
            self._resume(run, checkpoint)
        if self.world.size > 1:
            self._take_from_first()
        self._ahead: Ahead[Batch | Cuts] | None = None
        if device.type == "cuda":
            self._look_ahead()
        self.wheels: bool | None = None  # whether training wheels were on in the last update

    def _take_from_first(self) -> None:
        """Takes weights, moments and the number of updates from rank 0."""
        weights = {f"model:{name}": value for name, value in self.model.state_dict().items()}
        state = self._state() | weights | {"updates": torch.tensor(self.step)}
        data = {name: value.contiguous() for name, value in state.items()}
        shared = safetensors.torch.load(self.world.from_first(safetensors.torch.save(data)))
        self.model.load_state_dict({name[6:]: shared[name] for name in weights})
        self._restore(shared)
        self.step = int(shared["updates"])

    def _fit(self, model: SPAIR) -> None:
        """Takes background and noise from training images, where the config says so."""
        mode, normal = model.config.background == "mode", model.config.likelihood == "normal"
        if not (mode or normal):
            return
        images = self._seen(self.train.batch(torch.arange(_FITTED_IMAGES)))
        if mode:
            model.fit_background(images)
        if normal:
            model.fit_noise(images)

    def update(self) -> Losses:
        """One step of Adam, which changes nothing where gradients are not finite.

        Nothing here waits for the device, except for images that are not made on it: Adam's own
        kernel looks at `found_inf`. The losses hold until the next update.
        """
        self._set_wheels(self.step < self.config.train.training_wheels)
        losses = self._apply(self._inputs(self.step))
        self.step += 1
        return losses

    def _set_wheels(self, wheels: bool) -> bool:
        """Takes training wheels on or off; True if this is a change, or the first update."""
        changed = wheels is not self.wheels
        self.wheels = wheels
        return changed

    def _inputs(self, step: int) -> "Inputs":
        """Everything that the update of `step` depends on, besides weights and moments."""
        settings = self.config.train
        sample, gradient = (self._generator(purpose, step) for purpose in (_SAMPLE, _GRADIENT))
        return Inputs(
            batch=self._batch(step),
            success=success_at(self.config, step),
            rate=learning_rate(settings, step),
            noise=Part(sample, self.world.rank, self.world.size) if self.world.size > 1 else sample,
            gradient_scale=settings.gradient_noise * 0.1 ** (step / settings.gradient_noise_decay),
            gradient_noise=gradient,
        )

    def _batch(self, step: int) -> Batch | None:
        if self._ahead:
            return self._ahead(step).to(self.device)
        return self.train.batch(_images(self.config.train, self.world, step))

    def _look_ahead(self) -> None:
        """Starts a thread that draws and pins the crops of the next update of a folder."""
        if isinstance(self.train, ImageFolder):
            make = self.train.ahead(with_truth=self.config.model.count_is_given)
            images = partial(_images, self.config.train, self.world)
            self._ahead = Ahead(lambda step: make(images(step)), self.config.train.steps)

    def _first_image(self, step: int) -> int:
        """Index of the first image of this process in the update of `step`."""
        return int(_images(self.config.train, self.world, step)[0])

    def _apply(self, inputs: "Inputs") -> Losses:
        """The update with these inputs; reads nothing that is on the device."""
        settings, batch = self.config.train, inputs.batch
        assert batch is not None
        bf16 = settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            losses: Losses = self.model(
                self._seen(batch),
                success=inputs.success,
                training_wheels=self.wheels,
                generator=inputs.noise,
                **self._counts(batch),
            )
        if self.world.size > 1:
            self._share_noise()
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.mean().backward()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.world.average(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        broken = (~norm.isfinite()).float()
        self.skipped.add_(1).mul_(broken)
        if settings.clip_norm:
            scale = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        if settings.gradient_noise:
            _add_noise(gradients, inputs.gradient_scale, inputs.gradient_noise)
        for group in self.optimiser.param_groups:
            group["lr"] = inputs.rate
        self.optimiser.found_inf = broken  # type: ignore[attr-defined]
        self.optimiser.step()
        return losses.detach()

    def _seen(self, batch: Batch) -> Tensor:  # [B, 3, h, w]
        """Training images as the model sees them: a folder prepares its crops itself."""
        if isinstance(self.train, Scenes):
            return fixed_levels(batch.images, self.config.prepare)
        return batch.images

    def _share_noise(self) -> None:
        """Averages the variance that each process has measured, if the model has one."""
        if isinstance(self.model, SPAIR) and self.model.config.likelihood == "normal":
            std = self.model.noise_std
            std.copy_(self.world.mean(std.square()).sqrt())

    def _counts(self, batch: Batch) -> dict[str, Any]:
        """The true counts, if the model takes them."""
        return {"counts": batch.counts} if self.config.model.count_is_given else {}

    def means(self, losses: Losses) -> dict[str, float]:
        """Means of the loss terms over the whole batch; reading them waits for the device."""
        means = losses.means()
        values = self.world.mean(torch.stack(list(means.values())))
        return dict(zip(means, values.tolist(), strict=True))

    def validate(self, dataset: Dataset) -> Validation | None:
        """Writes a checkpoint with validation figures and a picture, if there is a run."""
        with computing_in("float32", self.device):
            result = self._validate(self.run, dataset) if self.run else None
        self.best_step = self.world.greatest(self.best_step)  # that of rank 0
        return result

    def _validate(self, run: Run, dataset: Dataset) -> Validation:
        self.model.eval()
        detector = Detector(self.model, self.config, search="off")  # a search takes longer
        figures = self._mean_elbo(dataset)
        if dataset.has_truth:
            figures |= box_figures(detector, dataset, validation_rows(self.config, self.device))
        picture = draw(detector, dataset, run, self.step)
        self.model.train()
        score = figures[criterion(self.config.train)]
        is_best = score > self.best
        if is_best:
            self.best, self.best_step = score, self.step
        # resuming cuts off a line without its checkpoint, but cannot add a missing line
        run.log({"kind": "validation", "step": self.step, **figures, "is_best": is_best})
        self.save(figures, is_best)
        return Validation(self.step, figures, picture, is_best)

    def check_scenes(self) -> None:
        """Waits for the device and checks the scenes of past updates.

        Raises:
            InputError: a scene without a layout was trained on.
        """
        if isinstance(self.train, Scenes):
            self.train.check()

    def save(self, metrics: dict[str, float], is_best: bool) -> None:
        """Writes a checkpoint of this step, if there is a run.

        Raises:
            InputError: as `check_scenes`, or the folder cannot be written.
        """
        self.check_scenes()
        if self.run:
            self.run.save(
                step=self.step,
                model=self.model.state_dict(),
                optimiser=self._state(),
                metrics=metrics,
                environment=self._environment(),
                is_best=is_best,
            )

    def _state(self) -> dict[str, Tensor]:
        """The state of Adam, and the best validation so far."""
        state = {"best": torch.tensor([self.best, self.best_step], dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"{key}:{name}"] = value
        return state

    def _restore(self, state: dict[str, Tensor]) -> None:
        """Restores the result of `_state`. Raises KeyError or IndexError if it does not fit."""
        self.best, self.best_step = float(state["best"][0]), int(state["best"][1])
        for name, parameter in self.parameters.items():
            # a parameter without a gradient so far, as with training wheels, has no moments
            if f"step:{name}" not in state:
                continue
            moments = {
                key: state[f"{key}:{name}"].to(self.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            if moments["exp_avg"].shape != parameter.shape:
                raise KeyError(name)
            self.optimiser.state[parameter] = moments

    def _environment(self) -> dict[str, Scalar]:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else self.device.type
        return environment() | {"processes": self.world.size, "device": name}

    def _resume(self, run: Run, checkpoint: Checkpoint) -> None:
        try:
            self._restore(checkpoint.optimiser or {})
        except (KeyError, IndexError):
            raise InputError(
                f"{checkpoint.path}: its optimiser does not fit its model; resume from another "
                "checkpoint, or start a new run"
            ) from None
        self.step = checkpoint.step
        here = self._environment()
        changed = [
            f"{name} was {before} and is {here.get(name)}"
            for name, before in checkpoint.environment.items()
            if before != here.get(name)
        ]
        if changed:
            said = f"{run.path}: the result will not be bit-identical: {', '.join(changed)}"
            warnings.warn(printable(said), stacklevel=2)
        if self.best_step == self.step:  # the process may have been killed before the link was made
            run.mark_best(self.step)

    def _mean_elbo(self, dataset: Dataset) -> dict[str, float]:
        """Means over the images of `elbo`, under the final count prior, and of `found`, if known.

        The noise of an image is the same every time, whatever the size of batches.
        """
        sums: dict[str, float] = {}
        images = 0
        size = self.config.train.batch_size
        rows = validation_rows(self.config, self.device)
        for batch in validation_batches(dataset, rows, self.config.prepare):
            indices = range(images // size, -(-(images + len(batch.images)) // size))
            noise = Batches([self._generator(_VALIDATE, index) for index in indices], size)
            with torch.no_grad():
                losses = self.model(batch.images, generator=noise, **self._counts(batch))
            for name, values in (("elbo", losses.elbo), ("found", losses.found)):
                if values is not None:
                    sums[name] = sums.get(name, 0.0) + float(values.sum())
            images += len(batch.images)
        return {name: total / images for name, total in sums.items()}

    def _generator(self, purpose: int, step: int) -> torch.Generator:
        # hashed, because the CPU's generator uses only the low 32 bits of a seed
        words = f"{self.config.train.seed} {purpose} {step}".encode()
        seed = int.from_bytes(sha256(words).digest()[:8], "big")
        return torch.Generator(self.device).manual_seed(seed)


def _add_noise(gradients: list[Tensor], scale: float | Tensor, source: Source) -> None:
    """Adds truncated normal noise that decays over training (docs/model.md 2.2)."""
    if isinstance(scale, float) and scale < _NEGLIGIBLE_NOISE:
        return
    sizes = [gradient.numel() for gradient in gradients]
    noise = uniform(source, gradients[0], sum(sizes)).mul(2 * _WITHIN).sub_(_WITHIN)
    # by the inverse distribution function: rejection would wait for the device
    parts = noise.erfinv_().mul_(scale * math.sqrt(2)).split_with_sizes(sizes)
    noises = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    torch._foreach_add_(gradients, noises)


def _images(settings: TrainConfig, world: World, step: int) -> Tensor:  # [b] int64
    """Indices of the images of this process in the update of `step`."""
    rows = settings.batch_size // world.size
    # no scene of another seed
    first = (settings.seed << 32) + step * settings.batch_size + world.rank * rows
    return torch.arange(first, first + rows)


def validation_rows(config: Config, device: torch.device) -> int:
    """Images of a validation that are computed together: on a GPU several batches of training."""
    size = config.train.batch_size
    if device.type != "cuda":
        return size
    pixels = size * config.data.image_height * config.data.image_width
    return size * max(_VALIDATED_PIXELS // pixels, 1)


def criterion(settings: TrainConfig) -> str:
    """The validation figure of the best checkpoint; higher is better."""
    return "elbo" if settings.select == "elbo" else "ap_spair"


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Linear from `learning_rate` at step 0 to `learning_rate_end` after the last update."""
    share = step / settings.steps
    return settings.learning_rate + share * (settings.learning_rate_end - settings.learning_rate)


def success_at(config: Config, step: int) -> float:
    """s of the count prior after `step` updates (docs/model.md 2.1)."""
    c = config.model
    assert not isinstance(c, ClassicalConfig)
    return count_success(step, c.odds_start, c.odds_end, c.odds_decay, c.odds_schedule)
