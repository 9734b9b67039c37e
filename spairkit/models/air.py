"""AIR and DAIR, the baselines (docs/model.md 7 and 8): objects one after the other.

An LSTM (AIR) reads the image; a stateless network (DAIR) reads the image minus the canvas. Each
step predicts one object and its presence. B images, T steps, A what dimensions, P the side of an
object map.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.config import AIRConfig
from spairkit.detections import Detections, Explanation
from spairkit.errors import InputError
from spairkit.kernels.constants import LOGIT_LIMIT
from spairkit.models.affine import cut, place
from spairkit.models.densities import (
    bernoulli_cross_entropy,
    limited,
    logistic,
    squash,
    weighted_kls,
)
from spairkit.models.elbo import Losses
from spairkit.models.networks import check_images, linear, mlp
from spairkit.models.noise import Source, normal, uniform
from spairkit.models.tight_boxes import tighten

_WHERE = 4  # scale w, h and shift x, y
_STOP = 0.99  # steps end once the absences sum to this
_MAX_STEPS = 256


@dataclass(frozen=True, eq=False)
class _Noise:
    """Random numbers for one pass over a batch, drawn before it."""

    normal: Tensor  # [B, T, 4 + A] standard normal: where, what
    logistic: Tensor  # [B, T] standard logistic: pres


@dataclass(frozen=True, eq=False)
class _Objects:
    """The object of each step; normal variables are before their sigmoid or tanh."""

    where_mean: Tensor  # [B, T, 4]
    where_std: Tensor  # [B, T, 4]
    scale: Tensor  # [B, T, 2] w, h in (0, 1)
    shift: Tensor  # [B, T, 2] x, y in (-1, 1)
    what_mean: Tensor  # [B, T, A]
    what_std: Tensor  # [B, T, A]
    what: Tensor  # [B, T, A] the sample
    maps: Tensor  # [B, T, 3, P, P] colour in (0, 1)
    placed: Tensor  # [B, T, 3, H, W] the map in its box, zero beyond
    logit: Tensor  # [B, T] log-odds of presence, given that all earlier ones are


class AIR(nn.Module):
    """Finds objects one by one: AIR with the Concrete distribution, or DAIR.

    Args:
        config: the hyper-parameters, whose `kind` is "air" or "dair".
        size: height and width of the images, pixels; the networks take no other.

    Source: supplement D.1 and the released code; docs/model.md 7 and 8.
    """

    def __init__(self, config: AIRConfig, size: tuple[int, int]) -> None:
        super().__init__()
        self.config = config
        self.size = size
        c = config
        pixels = (1 if c.grey else 3) * size[0] * size[1]
        glimpse = 3 * c.object_size**2
        self.look: nn.Module
        if c.kind == "air":
            self.look = linear(pixels, 4 * c.units)
            self.recur = linear(c.units, 4 * c.units)
        else:
            self.look = mlp((pixels, *c.difference_hidden, c.units), "relu")
        self.output = mlp((c.units, c.output_hidden, 2 * _WHERE + 1), "relu")
        self.encoder = mlp((glimpse, *c.encoder_hidden, 2 * c.what), c.activation)
        self.decoder = mlp((c.what, *c.decoder_hidden, glimpse), c.activation)
        numbers, moments, colours = self.output[-1], self.encoder[-1], self.decoder[-1]
        assert isinstance(numbers, nn.Linear)
        assert isinstance(moments, nn.Linear)
        assert isinstance(colours, nn.Linear)
        with torch.no_grad():
            numbers.bias[:2] = c.scale_bias
            numbers.bias[_WHERE : 2 * _WHERE] = c.std_bias
            numbers.bias[-1] = c.presence_bias
            moments.bias[c.what :] = c.std_bias
            colours.bias[:] = c.colour_bias

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        *,
        success: float | Tensor | None = None,
        training_wheels: bool = False,
        generator: Source = None,
        counts: Tensor | None = None,  # [B] int64
        steps: int | None = None,
    ) -> Losses:
        """The terms of the negative ELBO with one sample of the latents.

        Args:
            images: of the model's size.
            success: 1 / (1 + prior odds of one more object), in (0, 1); None is the schedule's
                end.
            training_wheels: stop the gradients of where and pres.
            generator: source of the sampling noise, which may be a `Part` of a batch; None is
                torch's default generator.
            counts: the true numbers of objects, if `config.count` is "given".
            steps: at least the greatest of `counts`, which are then not read, as in a CUDA graph;
                None reads them, if they are given.

        Returns:
            Losses, every term [B] in nats; no `kl_pres` where counts are given.

        Raises:
            ValueError: `images` has another shape or dtype; or counts are needed and are absent,
                negative or of another shape.
            InputError: `images` has another size, or a count is above 256.
        """
        if steps is None:
            steps = self._steps(images, counts)
        noise = self._draw(images, steps, generator)
        objects = self._find(images, steps, noise, counts, training_wheels)
        if success is None:
            success = 1 / (1 + self.config.odds_end)
        floor = self.config.likelihood_floor
        if self.config.count_is_given:
            alive = self._weights(objects.logit, noise, counts)
            error = bernoulli_cross_entropy(_sum(alive, objects.placed), images, floor)
            return self._losses(error, objects, alive, None)
        odds = objects.logit.new_zeros(()) + (1 - success) / success
        prior = odds.to(objects.logit.dtype).log()
        if self.config.presence == "exact":
            return self._expected(images, objects, prior)
        drawn = self._relaxed(objects.logit, noise)
        alive = _before_stop(drawn.sigmoid()).to(drawn.dtype)
        asked = torch.cat([torch.ones_like(alive[:, :1]), alive[:, :-1]], dim=1)
        temperature = self.config.temperature
        posterior = _concrete_log_density(drawn, objects.logit, temperature)
        kl = posterior - _concrete_log_density(drawn, prior, temperature)
        canvas = _sum(alive * drawn.sigmoid(), objects.placed)
        error = bernoulli_cross_entropy(canvas, images, floor)
        return self._losses(error, objects, alive, (asked * kl).sum(1))

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        counts: Tensor | None = None,
        box_contrast: float | None = None,
        sample: bool = False,
    ) -> list[Detections]:
        """The objects of each image, in the order of the steps.

        The score of an object is the probability that it and all before it are present; with given
        counts it is 1. Depth is 0: light is added, so nothing hides anything.

        Args:
            images: [B, 3, H, W] in [0, 1], of the model's size.
            threshold: objects with a score above it are returned.
            counts: [B] int64, the true numbers of objects, if `config.count` is "given".
            box_contrast: tightens boxes as `config.box_contrast` says, which None takes; 0 keeps
                scale and shift.
            sample: sample every latent instead of taking its mean.

        Returns:
            B `Detections`, on the CPU.

        Raises:
            ValueError: `images` has another shape or dtype, or holds NaN or infinity; or counts are
                needed and are absent, negative or of another shape.
            InputError: `images` has another size, or a count is above 256.
        """
        objects, scores = self._infer(images, sample, counts)
        return self._detections(objects, scores, threshold, box_contrast)

    @torch.no_grad()
    def explain(
        self,
        images: Tensor,
        threshold: float = 0.5,
        *,
        counts: Tensor | None = None,
        box_contrast: float | None = None,
    ) -> list[Explanation]:
        """The objects of each image, their appearances and the reconstruction, in one pass.

        Arguments and errors as in `detect`. The reconstruction shows the objects with a score
        above 1/2.
        """
        objects, scores = self._infer(images, False, counts)
        found = self._detections(objects, scores, threshold, box_contrast)
        drawn = _sum((scores > 0.5).to(images.dtype), objects.placed).clamp(0, 1)
        return Explanation.of_batch(scores > threshold, found, images, drawn, _opaque(objects.maps))

    @torch.no_grad()
    def glimpses(self, images: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Glimpses [B, T, 3, P, P] of all steps, and whether each shows an object [B, T] bool.

        Latents are their means; an object is present if its score is above 1/2. Arguments and
        errors as in `detect`.
        """
        objects, scores = self._infer(images, False, counts)
        return cut(images, objects.scale, objects.shift, self.config.object_size), scores > 0.5

    def _detections(
        self, objects: _Objects, scores: Tensor, threshold: float, box_contrast: float | None
    ) -> list[Detections]:
        sides = scores.new_tensor([self.size[1], self.size[0]])
        contrast = self.config.box_contrast if box_contrast is None else box_contrast
        texels = self.config.object_size
        if contrast:
            # where the map is drawn: first and last texels are centred on the box's own edges
            centre = (objects.shift + 1) / 2 * (sides - 1) + 0.5
            size = objects.scale * (sides - 1) * texels / (texels - 1)
        else:
            centre, size = (objects.shift + 1) / 2 * sides, objects.scale * sides
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        if contrast:
            black = boxes.new_zeros(len(boxes), 3, 1, 1)
            boxes = tighten(boxes, _opaque(objects.maps), black, contrast, self.size)
        columns = {"boxes": boxes, "scores": scores, "what": objects.what}
        return Detections.of_batch(scores > threshold, **columns, depth=torch.zeros_like(scores))

    def _steps(self, images: Tensor, counts: Tensor | None) -> int:
        """Number of steps, at least one. Refuses images and counts that do not fit."""
        check_images(images)
        name = self.config.kind.upper()
        height, width = images.shape[-2:]
        if (height, width) != self.size:
            raise InputError(
                f"{name} was trained on images of {self.size[0]}x{self.size[1]} px and takes only "
                f"that size, got {height}x{width} px; crop them, or train SPAIR, which takes any"
            )
        if not self.config.count_is_given:
            return self.config.max_objects
        if counts is None or counts.shape != (len(images),) or int(counts.min()) < 0:
            raise ValueError(f"counts must be {len(images)} whole numbers from 0, got {counts}")
        if int(counts.max()) > _MAX_STEPS:
            raise InputError(f"{name} takes counts up to {_MAX_STEPS}, got {int(counts.max())}")
        return max(int(counts.max()), 1)

    def _draw(self, images: Tensor, steps: int, source: Source) -> _Noise:
        # for the greatest number of steps, so that an image's noise does not depend on its batch
        batch, most = len(images), max(steps, self.config.max_objects)
        placed = normal(source, images, batch, most, _WHERE + self.config.what)
        jitter = logistic(uniform(source, images, batch, most))
        return _Noise(placed[:, :steps], jitter[:, :steps])

    def _infer(
        self, images: Tensor, sample: bool, counts: Tensor | None
    ) -> tuple[_Objects, Tensor]:
        """The objects, and the probability [B, T] that each is present."""
        check_images(images, finite=True)
        steps = self._steps(images, counts)
        noise = self._draw(images, steps, None) if sample else None
        objects = self._find(images, steps, noise, counts, hard=True)
        if not sample and not self.config.count_is_given:
            return objects, objects.logit.sigmoid().cumprod(1)
        return objects, self._weights(objects.logit, noise, counts, hard=True)

    def _find(
        self,
        images: Tensor,
        steps: int,
        noise: _Noise | None,
        counts: Tensor | None,
        training_wheels: bool = False,
        hard: bool = False,
    ) -> _Objects:
        """The objects of all steps; without noise, latents are their means."""
        normal = None if noise is None else noise.normal
        if self.config.kind == "air":
            states = self._recurrent(images, steps)
            return self._where_and_what(images, states, normal, training_wheels)
        found: list[_Objects] = []
        canvas = torch.zeros_like(images)
        for t in range(steps):
            state = self.look(self._seen(images - canvas))[:, None]
            drawn = None if normal is None else normal[:, t : t + 1]
            found.append(self._where_and_what(images, state, drawn, training_wheels))
            logits = torch.cat([item.logit for item in found], dim=1)
            weight = self._weights(logits, noise, counts, hard)[:, -1:]
            canvas = canvas + _sum(weight, found[-1].placed)
        return _Objects(
            **{
                field.name: torch.cat([getattr(item, field.name) for item in found], dim=1)
                for field in fields(_Objects)
            }
        )

    def _seen(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, pixels]
        return (images.mean(1) if self.config.grey else images).flatten(1)

    def _recurrent(self, images: Tensor, steps: int) -> Tensor:  # [B, T, units]
        """Outputs of the LSTM, whose input is the same at every step."""
        product = self.look(self._seen(images))
        output = cell = images.new_zeros(len(images), self.config.units)
        outputs = []
        for _ in range(steps):
            enter, new, forget, leave = (product + self.recur(output)).chunk(4, dim=1)
            # forgetting starts low: the bias of 1
            cell = cell * (forget + 1).sigmoid() + enter.sigmoid() * new.tanh()
            output = cell.tanh() * leave.sigmoid()
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    def _where_and_what(
        self,
        images: Tensor,  # [B, 3, H, W]
        states: Tensor,  # [B, n, units]
        normal: Tensor | None,  # [B, n, 4 + A]
        training_wheels: bool,
    ) -> _Objects:
        """Where and what of n steps that do not depend on each other."""
        c = self.config
        numbers = self.output(states).to(images.dtype)  # from bfloat16, under autocast
        if training_wheels:
            numbers = numbers.detach()
        where_mean, raw, logit = numbers.split([_WHERE, _WHERE, 1], dim=-1)
        where_std = _std(raw)
        where = where_mean if normal is None else where_mean + where_std * normal[..., :_WHERE]
        scale = squash(where[..., :2])
        shift = where[..., 2:].clamp(-LOGIT_LIMIT, LOGIT_LIMIT).tanh()
        glimpses = cut(images, scale, shift, c.object_size)  # from the image, not the difference
        moments = self.encoder(glimpses.flatten(2)).to(images.dtype)
        what_mean, raw = moments.chunk(2, dim=-1)
        what_std = _std(raw)
        what = what_mean if normal is None else what_mean + what_std * normal[..., _WHERE:]
        maps = squash(self.decoder(what).to(images.dtype))
        maps = maps.unflatten(-1, (3, c.object_size, c.object_size))
        return _Objects(
            where_mean=where_mean,
            where_std=where_std,
            scale=scale,
            shift=shift,
            what_mean=what_mean,
            what_std=what_std,
            what=what,
            maps=maps,
            placed=place(maps, scale, shift, *self.size),
            logit=limited(logit.squeeze(-1), c.presence_limit),
        )

    def _relaxed(self, logits: Tensor, noise: _Noise) -> Tensor:
        """Draws from the Concrete distribution before their sigmoid, [B, t]."""
        return (logits + noise.logistic[:, : logits.shape[1]]) / self.config.temperature

    def _weights(
        self, logits: Tensor, noise: _Noise | None, counts: Tensor | None, hard: bool = False
    ) -> Tensor:  # [B, t]
        """Weight of each object so far on the canvas."""
        if self.config.count_is_given:
            assert counts is not None
            steps = torch.arange(logits.shape[1], device=logits.device)
            return (steps < counts.to(logits.device)[:, None]).to(logits.dtype)
        if noise is None or (self.config.presence == "exact" and not hard):
            return torch.ones_like(logits)  # later objects matter only if this one is present
        drawn = self._relaxed(logits, noise).sigmoid()
        if hard:
            drawn = drawn.round()
        return drawn * _before_stop(drawn)

    def _expected(self, images: Tensor, objects: _Objects, prior: Tensor) -> Losses:
        """The terms in expectation over the count, whose posterior is a product of T numbers."""
        floor, logit = self.config.likelihood_floor, objects.logit
        reached = F.logsigmoid(logit).cumsum(1).exp()  # [B, T] at least so many
        none = torch.ones_like(reached[:, :1])
        counts = torch.cat([none, reached], 1) - F.pad(reached, (0, 1))  # [B, T + 1] exactly
        canvases = [torch.zeros_like(images), *objects.placed.cumsum(1).unbind(1)]
        errors = [bernoulli_cross_entropy(canvas, images, floor) for canvas in canvases]
        # of a Bernoulli choice of log-odds l: p (l - prior) + log(1 - p) - log(1 - prior's p)
        kl = logit.sigmoid() * (logit - prior) + F.softplus(prior) - F.softplus(logit)
        asked = torch.cat([none, reached[:, :-1]], dim=1)
        error = (counts * torch.stack(errors, dim=1)).sum(1)
        return self._losses(error, objects, reached, (asked * kl).sum(1))

    def _losses(
        self,
        reconstruction: Tensor,  # [B]
        objects: _Objects,
        weight: Tensor,  # [B, T] of each object in the KL of where and what
        kl_pres: Tensor | None,
    ) -> Losses:
        c = self.config
        where = weighted_kls(
            objects.where_mean,
            objects.where_std,
            weight,
            (2, c.scale_prior_mean, c.scale_prior_std),
            (2, 0.0, c.shift_prior_std),
        )
        what = weighted_kls(objects.what_mean, objects.what_std, weight, (c.what, 0.0, 1.0))
        on = (objects.logit > 0).to(reconstruction.dtype).cumprod(1)  # up to the first absent one
        found = None if c.count_is_given else on.sum(1)
        return Losses(
            reconstruction, where.sum(1), what.sum(1), kl_pres=kl_pres, found=found, beta=c.beta
        )


def _std(raw: Tensor) -> Tensor:
    return raw.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp()


def _sum(weights: Tensor, placed: Tensor) -> Tensor:  # [B, T], [B, T, 3, H, W] -> [B, 3, H, W]
    """The canvas: light is added."""
    return (weights[..., None, None, None] * placed).sum(1)


def _before_stop(presence: Tensor) -> Tensor:  # [B, T] -> [B, T] bool
    """Mask of the steps before the sum of absences reaches the stop (docs/model.md 7)."""
    return (1 - presence).cumsum(1) < _STOP


def _concrete_log_density(drawn: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Of the sigmoid's argument of a Concrete draw, elementwise."""
    distance = logits - temperature * drawn
    log_temperature = torch.as_tensor(temperature).log()
    return log_temperature + distance - 2 * F.softplus(distance)


def _opaque(maps: Tensor) -> Tensor:  # [B, T, 3, P, P] -> [B, T, P, P, 4]
    colour = maps.movedim(2, -1)
    return torch.cat([colour, torch.ones_like(colour[..., :1])], dim=-1)
