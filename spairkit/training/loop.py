"""The training loop: `fit` yields what happens, and prints nothing.

Everything random is a function of (seed, step): the data, the sampling noise, the gradient
noise. A run that is killed and resumed therefore ends with the same bits as one that is not, and
processes that share a batch get the images and the noise that one alone would give its rows.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

import safetensors.torch
import torch
from torch import Tensor, nn

from spairkit.config import Config, ConnCompConfig, TrainConfig
from spairkit.data.datasets import Dataset, evaluation_batches, open_splits
from spairkit.data.scenes import Batch, Scenes
from spairkit.errors import DivergedError, InputError
from spairkit.images import commonest_colour
from spairkit.models.conncomp import ConnComp
from spairkit.models.densities import count_success
from spairkit.models.elbo import Losses
from spairkit.models.loading import build, from_checkpoint
from spairkit.models.noise import Part, Source, Tape, uniform
from spairkit.storage.checkpoints import Checkpoint, Scalar, environment
from spairkit.storage.runs import Run
from spairkit.training.distributed import World
from spairkit.training.process import computing_in, keep_freed_memory
from spairkit.training.threshold import fit_threshold
from spairkit.training.update_graph import UpdateGraph
from spairkit.training.validation import Step as Step
from spairkit.training.validation import Validation as Validation
from spairkit.training.validation import box_figures, draw

REPORT_EVERY = 20
"""Updates between two `Step`s that carry losses: reading them waits for the device."""

_MAX_SKIPPED = 10  # updates in a row, when they are counted
_MODE_IMAGES = 256  # whose commonest colour is the background "mode"
_NEGLIGIBLE_NOISE = 1e-12
_WITHIN = math.erf(math.sqrt(2))  # share of a normal within two standard deviations
_SAMPLE, _GRADIENT, _VALIDATE = 1, 2, 3  # what a random stream is for
# of numbers for a CUDA graph, as their readers want them; float64 else
_DTYPES = {"rate": torch.float32, "first": torch.int64}


def check(config: Config, device: torch.device, processes: int) -> None:
    """Refuses settings that cannot be trained with here, before anything is made.

    Raises:
        InputError: the batch cannot be shared out evenly among so many processes, or there is
            nothing to share; or the device does not have the precision.
    """
    if config.train.precision == "tf32" and device.type != "cuda":
        raise InputError(
            "train.precision = 'tf32' is for NVIDIA GPUs, and this would train on "
            f"{device.type}; use 'float32' or 'bf16'"
        )
    if processes > 1 and isinstance(config.model, ConnCompConfig):
        raise InputError("connected components are fitted by one process; leave out torchrun")
    if config.train.batch_size % processes:
        raise InputError(
            f"train.batch_size ({config.train.batch_size}) must be a multiple of the number of "
            f"processes ({processes}): it is that of all of them together"
        )


def fit(
    config: Config,
    run: Run | None,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Iterator[Step | Validation]:
    """Trains in the folder of `run`, from its last checkpoint where it has one.

    ConnComp has no losses: `threshold_search.fit_threshold` fits it, by the same rules.

    Args:
        config: the run's.
        run: must be locked by the caller while this iterates. None in all processes but the
            first, which alone reads and writes it, and validates.
        device: where model and scenes live.
        stop: asked once after every update; when it says yes training ends with a checkpoint of
            that update, to be resumed some other time. All processes must be told the same.
        world: the processes that share each batch; None is this one alone.

    Yields:
        A `Step` for every update and, where there is a run, a `Validation` every
        `validation_every` updates and at the end. Steps that were made before a resumption are
        not yielded again.

    Raises:
        InputError: what `check` says; the data cannot be read, or has no boxes to select by; a
            scene found no layout, which on a GPU is seen when losses are next reported or a
            checkpoint is due; the folder cannot be written; or another process has ended.
        DivergedError: the losses were not finite in the last 10 updates or more, which is seen
            when they are next reported or a validation is due; the last good checkpoint is kept.
    """
    world = world or World()
    check(config, device, world.size)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        keep_freed_memory()
    if isinstance(config.model, ConnCompConfig):
        assert run
        yield from fit_threshold(config, run, device, stop)
        return
    train, validation = open_splits(config, device)
    trainer = Trainer(config, run, train, device, world)
    if run:
        run.truncate_metrics(trainer.step)
    settings = config.train
    started = time.perf_counter()
    while trainer.step < settings.steps:
        with computing_in(config.train.precision, device):
            losses = trainer.update()
        step, means = trainer.step, None
        validates = step % settings.validation_every == 0 or step == settings.steps
        reports = step % REPORT_EVERY == 0
        # to read what is on the device waits for it, so this is not done after every update
        looks = validates or reports
        if looks:
            trainer.check_scenes()
        skipped = int(trainer.skipped) if looks else 0
        if skipped >= _MAX_SKIPPED:
            kept = f"the last good checkpoint is {run.path / 'last'}; " if run else ""
            raise DivergedError(
                f"the losses were not finite {skipped} updates in a row, up to step {step}; "
                f"{kept}try a lower train.learning_rate"
            )
        if reports and not skipped:
            means = trainer.means(losses)
            if run:
                run.log({"kind": "step", "step": step, **means})
        yield Step(step, settings.steps, means, time.perf_counter() - started)
        if validates:
            result = trainer.validate(validation)
            if result:
                yield result
            if settings.patience and step - trainer.best_step >= settings.patience:
                return
            if stop():
                return
        elif stop():
            trainer.save(metrics={}, is_best=False)
            return


class Trainer:
    """A model, its optimiser and how far they are.

    Args:
        config: of the run; not ConnComp's.
        run: where it writes, and goes on from its last checkpoint; None writes nothing.
        train: the images of updates.
        device: where.
        world: the processes that share each batch; None is this one alone.
    """

    # of the update under way, made by `update`
    call: Callable[[], Losses]
    tapes: tuple[Tape, Tape]
    given: "_Given"

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
        self.skipped = torch.zeros((), device=device)  # updates up to this one that did nothing
        checkpoint = run.latest() if run else None
        model = (
            build(config).to(device) if checkpoint is None else from_checkpoint(checkpoint, device)
        )
        assert not isinstance(model, ConnComp)
        self.model = model.train()
        if checkpoint is None and config.model.background == "mode":
            images = train.batch(torch.arange(_MODE_IMAGES)).images
            self.model.set_background(commonest_colour(images))
        self.parameters = dict(self.model.named_parameters())
        # what a model makes of true counts depends on them, not only the numbers in it
        self.captures = device.type == "cuda" and self.world.size == 1 and not config.model.told
        self.places: dict[str, Tensor] = {}  # of what a CUDA graph is given
        self.optimiser = torch.optim.Adam(
            self.parameters.values(),
            lr=config.train.learning_rate,
            fused=True,
            capturable=self.captures,
        )
        if run and checkpoint:
            self._resume(run, checkpoint)
        if self.world.size > 1:
            state = self._state() | {"updates": torch.tensor(self.step)}
            data = self.world.from_first(safetensors.torch.save(state))
            shared = safetensors.torch.load(data)
            self._restore(shared)
            self.step = int(shared["updates"])
        self.replica: nn.Module = self.model
        self.wheels: bool | None = None  # whether they are on in `replica`

    @property
    def makes_scenes(self) -> bool:
        """Whether its images are made in the update itself, and so are part of a CUDA graph."""
        return self.captures and isinstance(self.train, Scenes) and self.train.fused

    def update(self) -> Losses:
        """One step of Adam, which leaves everything as it is where gradients are not finite.

        Nothing here waits for the device, but for images that are not made in the update: it is
        Adam's kernel that looks at `found_inf`. The losses hold until the next update.
        """
        wheels = self.step < self.config.train.training_wheels
        if wheels is not self.wheels:
            self.wheels, self.replica = wheels, self.world.replica(self.model, partial=wheels)
            self.call = UpdateGraph(self._update, self.device) if self.captures else self._update
            self.tapes = Tape(), Tape()
        self.given = self._give(self.step)
        losses = self.call()
        self.step += 1
        return losses

    def _give(self, step: int) -> "_Given":
        settings = self.config.train
        rows = settings.batch_size // self.world.size
        first = (settings.seed << 32) + step * settings.batch_size  # no scene of another seed
        first += self.world.rank * rows
        place = self._place
        if self.makes_scenes:
            place("first", first)
            batch = None
        else:
            batch = self.train.batch(torch.arange(first, first + rows))
        sample, gradient = (self._generator(purpose, step) for purpose in (_SAMPLE, _GRADIENT))
        given = _Given(
            batch=batch,
            success=success_at(self.config, step),
            rate=learning_rate(settings, step),
            noise=Part(sample, self.world.rank, self.world.size) if self.world.size > 1 else sample,
            gradient_scale=settings.gradient_noise * 0.1 ** (step / settings.gradient_noise_decay),
            gradient_noise=gradient,
        )
        if not self.captures:
            return given
        for tape, source in zip(self.tapes, (sample, gradient), strict=True):
            tape.wind(source)
        if batch:
            images, counts = place("images", batch.images), place("counts", batch.counts)
            batch = replace(batch, images=images, counts=counts)
        return _Given(
            batch=batch,
            success=place("success", given.success),
            rate=place("rate", given.rate),
            noise=self.tapes[0],
            gradient_scale=place("gradient_scale", given.gradient_scale),
            gradient_noise=self.tapes[1],
        )

    def _place(self, name: str, value: float | Tensor) -> Tensor:
        """The value on the device, where those of this name always lie."""
        if name not in self.places:
            number = torch.empty((), dtype=_DTYPES.get(name, torch.float64), device=self.device)
            self.places[name] = torch.empty_like(value) if isinstance(value, Tensor) else number
        place = self.places[name]
        return place.copy_(value) if isinstance(value, Tensor) else place.fill_(value)

    def _scenes(self) -> Batch:
        """Those of the update, from the first one that `_give` has put into its place."""
        assert isinstance(self.train, Scenes)
        rows = torch.arange(self.config.train.batch_size, device=self.device)
        return self.train.unchecked(self.places["first"] + rows)

    def _update(self) -> Losses:
        """The update that `given` asks for, with no look at what is on the device."""
        settings, given = self.config.train, self.given
        for tape in self.tapes:
            tape.rewind()
        batch = given.batch or self._scenes()
        bf16 = settings.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            losses: Losses = self.replica(
                batch.images,
                success=given.success,
                training_wheels=self.wheels,
                generator=given.noise,
                counts=batch.counts,
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.world.backward(losses.total.mean())
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        broken = (~norm.isfinite()).float()
        self.skipped.add_(1).mul_(broken)
        if settings.clip_norm:
            scale = (settings.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        if settings.gradient_noise:
            _add_noise(gradients, given.gradient_scale, given.gradient_noise)
        for group in self.optimiser.param_groups:
            group["lr"] = given.rate
        self.optimiser.found_inf = broken  # type: ignore[attr-defined]
        self.optimiser.step()
        return losses.detach()

    def means(self, losses: Losses) -> dict[str, float]:
        """Over the whole batch; reading them waits for the device."""
        means = losses.means()
        values = self.world.mean(torch.stack(list(means.values())))
        return dict(zip(means, values.tolist(), strict=True))

    def validate(self, dataset: Dataset) -> Validation | None:
        """Figures and a picture of the validation split, and a checkpoint, where there is a run."""
        with computing_in("float32", self.device):
            result = self._validate(self.run, dataset) if self.run else None
        self.best_step = self.world.greatest(self.best_step)  # that of the first
        return result

    def _validate(self, run: Run, dataset: Dataset) -> Validation:
        self.model.eval()
        figures = {"elbo": self._elbo(dataset)}
        if dataset.has_truth:
            figures |= box_figures(self.model, dataset, self.config.train.batch_size)
        picture = draw(self.model, dataset, run, self.step)
        self.model.train()
        score = figures[criterion(self.config.train)]
        is_best = score > self.best
        if is_best:
            self.best, self.best_step = score, self.step
        # a line without its checkpoint is cut off by resuming, a missing one would stay missing
        run.log({"kind": "validation", "step": self.step, **figures, "is_best": is_best})
        self.save(figures, is_best)
        return Validation(self.step, figures, picture, is_best)

    def check_scenes(self) -> None:
        """Waits for the device.

        Raises:
            InputError: a scene found no layout, and was trained on.
        """
        if isinstance(self.train, Scenes):
            self.train.check()

    def save(self, metrics: dict[str, float], is_best: bool) -> None:
        """Writes a checkpoint of this step, where there is a run.

        Raises:
            InputError: what `check_scenes` says, or the folder cannot be written.
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
        """Of Adam, and the best validation so far."""
        state = {"best": torch.tensor([self.best, self.best_step], dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                state[f"{key}:{name}"] = value
        return state

    def _restore(self, state: dict[str, Tensor]) -> None:
        """Takes what `_state` gave. Raises KeyError or IndexError where it does not fit."""
        self.best, self.best_step = float(state["best"][0]), int(state["best"][1])
        for name, parameter in self.parameters.items():
            # what never had a gradient has no moments, as after training wheels
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
                "checkpoint or train anew"
            ) from None
        self.step = checkpoint.step
        here = self._environment()
        changed = [
            f"{name} was {before} and is {here.get(name)}"
            for name, before in checkpoint.environment.items()
            if before != here.get(name)
        ]
        if changed:
            warnings.warn(
                f"{run.path}: goes on, but not to the same bits: {', '.join(changed)}",
                stacklevel=2,
            )
        if self.best_step == self.step:  # a kill may have come before the link
            run.mark_best(self.step)

    def _elbo(self, dataset: Dataset) -> float:
        """Mean ELBO in nats under the final count prior, with the same noise every time."""
        total, images = 0.0, 0
        for index, batch in enumerate(evaluation_batches(dataset, self.config.train.batch_size)):
            with torch.no_grad():
                losses = self.model(
                    batch.images,
                    generator=self._generator(_VALIDATE, index),
                    counts=batch.counts,
                )
            total += float(losses.elbo.sum())
            images += len(batch.images)
        return total / images

    def _generator(self, purpose: int, step: int) -> torch.Generator:
        # mixed: of a seed the CPU's generator takes the low 32 bits alone
        words = f"{self.config.train.seed} {purpose} {step}".encode()
        seed = int.from_bytes(sha256(words).digest()[:8], "big")
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True, eq=False)
class _Given:
    """What sets an update apart from others; numbers are 0-d tensors for a CUDA graph."""

    batch: Batch | None
    """None where the update makes its scenes itself."""
    success: float | Tensor
    rate: float | Tensor
    noise: Source
    gradient_scale: float | Tensor
    """Standard deviation of the noise on gradients, before it is truncated ..."""
    gradient_noise: Source
    """... and what it is drawn from."""


def _add_noise(gradients: list[Tensor], scale: float | Tensor, source: Source) -> None:
    """Truncated normal noise that dies away (docs/model.md 2.2)."""
    if isinstance(scale, float) and scale < _NEGLIGIBLE_NOISE:
        return
    sizes = [gradient.numel() for gradient in gradients]
    noise = uniform(source, gradients[0], sum(sizes)).mul(2 * _WITHIN).sub_(_WITHIN)
    # the inverse of the distribution: to draw again what lies outside would wait for the device
    parts = noise.erfinv_().mul_(scale * math.sqrt(2)).split_with_sizes(sizes)
    noises = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    torch._foreach_add_(gradients, noises)


def criterion(settings: TrainConfig) -> str:
    """The validation figure that decides which checkpoint is best: higher is better."""
    return "elbo" if settings.select == "elbo" else "ap_spair"


def learning_rate(settings: TrainConfig, step: int) -> float:
    """On a straight line from `learning_rate` at step 0 to `learning_rate_end` at the end."""
    share = step / settings.steps
    return settings.learning_rate + share * (settings.learning_rate_end - settings.learning_rate)


def success_at(config: Config, step: int) -> float:
    """s of the count prior after `step` updates (docs/model.md 2.1)."""
    c = config.model
    assert not isinstance(c, ConnCompConfig)
    return count_success(step, c.odds_start, c.odds_end, c.odds_decay, c.odds_schedule)
