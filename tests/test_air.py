"""AIR and DAIR against loops over images, steps and pixels in float64, and sums over counts."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from spairkit.config import AIRConfig
from spairkit.errors import InputError
from spairkit.models import affine
from spairkit.models.air import AIR, _before_stop, _concrete_log_density, _Noise, _Objects
from spairkit.models.elbo import Losses
from spairkit.models.noise import Part

SMALL = AIRConfig(
    units=10,
    output_hidden=8,
    difference_hidden=(9, 7),
    what=4,
    encoder_hidden=(12,),
    decoder_hidden=(12,),
    object_size=6,
    scale_prior_mean=-1.2,
    scale_prior_std=0.4,
    shift_prior_std=0.8,
    likelihood_floor=1e-6,
)
INFERRED = replace(SMALL, count="inferred")
EXACT = replace(INFERRED, presence="exact")
SIZE = 11, 9
COUNTS = torch.tensor([2, 0, 3])


def build(config: AIRConfig, size: tuple[int, int] = SIZE, **changes: Any) -> AIR:
    torch.manual_seed(0)
    model = AIR(replace(config, **changes), size).double()
    for parameter in model.parameters():  # so that steps and images differ
        nn.init.normal_(parameter, std=0.4)
    return model


def last_bias(network: nn.Sequential) -> Tensor:
    layer = network[-1]
    assert isinstance(layer, nn.Linear)
    return layer.bias.data


def images(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, 3, *SIZE, generator=generator, dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def run(model: AIR, counts: Tensor | None = None, **options: Any) -> Losses:
    losses: Losses = model(images(), generator=generator(), counts=counts, **options)
    return losses


def objects(model: AIR, steps: int, counts: Tensor | None = None) -> tuple[_Objects, _Noise]:
    """The objects that `run` infers, and the noise that it draws."""
    noise = model._draw(images(), steps, generator())
    return model._find(images(), steps, noise, counts), noise


def normal_kl(mean: float, std: float, prior_mean: float, prior_std: float) -> float:
    share = (std / prior_std) ** 2
    return 0.5 * (share + ((mean - prior_mean) / prior_std) ** 2 - 1 - math.log(share))


def step_kl(model: AIR, found: _Objects, b: int, t: int) -> tuple[float, float]:
    """KL divergences of the where and what latents, summed element by element."""
    c = model.config
    priors = [(c.scale_prior_mean, c.scale_prior_std)] * 2 + [(0.0, c.shift_prior_std)] * 2
    where = zip(
        found.where_mean[b, t].tolist(), found.where_std[b, t].tolist(), priors, strict=True
    )
    what = zip(found.what_mean[b, t].tolist(), found.what_std[b, t].tolist(), strict=True)
    return (
        sum(normal_kl(mean, std, *prior) for mean, std, prior in where),
        sum(normal_kl(mean, std, 0.0, 1.0) for mean, std in what),
    )


def cross_entropy(canvas: Tensor, image: Tensor, floor: float = 1e-6) -> float:
    """Cross entropy of an image given the clipped canvas, summed pixel by pixel."""
    total = 0.0
    for x, y in zip(image.flatten().tolist(), canvas.flatten().tolist(), strict=True):
        y = min(max(y, 0.0), 1.0)
        total -= x * math.log(y + floor) + (1 - x) * math.log(1 - y + floor)
    return total


def alone(found: _Objects, b: int, t: int) -> Tensor:
    """One object on a black image; test_affine compares `place` with a loop over pixels."""
    one = slice(b, b + 1), slice(t, t + 1)
    return affine.place(found.maps[one], found.scale[one], found.shift[one], *SIZE)[0, 0]


@pytest.mark.parametrize("kind", ["air", "dair"])
@torch.no_grad()
def test_losses_with_given_counts_equal_a_loop(kind: str) -> None:
    model = build(SMALL, kind=kind)
    losses = run(model, COUNTS)
    found, _ = objects(model, 3, COUNTS)
    assert losses.kl_pres is None
    assert losses.found is None
    for b, count in enumerate((2, 0, 3)):
        canvas = torch.zeros(3, *SIZE, dtype=torch.float64)
        where = what = 0.0
        for t in range(count):
            canvas = canvas + alone(found, b, t)
            kl = step_kl(model, found, b, t)
            where, what = where + kl[0], what + kl[1]
        expected = cross_entropy(canvas, images()[b])
        assert float(losses.reconstruction[b]) == pytest.approx(expected, rel=1e-9)
        assert float(losses.kl_where[b]) == pytest.approx(where, rel=1e-9)
        assert float(losses.kl_what[b]) == pytest.approx(what, rel=1e-9)


@pytest.mark.parametrize("kind", ["air", "dair"])
@torch.no_grad()
def test_exact_losses_equal_the_expectation_over_counts(kind: str) -> None:
    model = build(EXACT, kind=kind, presence_limit=0.7)
    success = 0.7
    losses = run(model, success=success)
    found, _ = objects(model, 3)
    for b in range(3):
        on = found.logit[b].sigmoid().tolist()
        assert max(map(abs, found.logit[b].tolist())) <= 0.7
        canvas = torch.zeros(3, *SIZE, dtype=torch.float64)
        sums = dict.fromkeys(("reconstruction", "kl_where", "kl_what", "kl_pres"), 0.0)
        where = what = 0.0
        for count in range(4):
            if count:
                canvas = canvas + alone(found, b, count - 1)
                kl = step_kl(model, found, b, count - 1)
                where, what = where + kl[0], what + kl[1]
            # `count` present steps, then an absent one if any step is left
            posterior = math.prod(on[:count]) * (1 - on[count] if count < 3 else 1)
            prior = (1 - success) ** count * (success if count < 3 else 1)
            sums["reconstruction"] += posterior * cross_entropy(canvas, images()[b])
            sums["kl_where"] += posterior * where
            sums["kl_what"] += posterior * what
            sums["kl_pres"] += posterior * math.log(posterior / prior)
        for name, value in sums.items():
            assert float(losses.terms()[name][b]) == pytest.approx(value, rel=1e-9)
        likely = next((t for t, p in enumerate(on) if p <= 0.5), 3)  # up to the first absent one
        assert losses.found is not None
        assert float(losses.found[b]) == likely


@pytest.mark.parametrize("kind", ["air", "dair"])
@torch.no_grad()
def test_relaxed_losses_equal_a_loop_with_early_stopping(kind: str) -> None:
    model = build(INFERRED, kind=kind, temperature=0.5)
    success = 0.4
    losses = run(model, success=success)
    found, noise = objects(model, 3)
    prior = torch.tensor(math.log((1 - success) / success), dtype=torch.float64)
    stopped_at = []
    for b in range(3):
        canvas = torch.zeros(3, *SIZE, dtype=torch.float64)
        where = what = pres = absences = 0.0
        for t in range(3):
            drawn = (found.logit[b, t] + noise.logistic[b, t]) / 0.5
            densities = [
                LogitRelaxedBernoulli(torch.tensor(0.5), logits=logits).log_prob(drawn)
                for logits in (found.logit[b, t], prior)
            ]
            pres += float(densities[0] - densities[1])
            presence = float(drawn.sigmoid())
            absences += 1 - presence
            if absences >= 0.99:
                stopped_at.append(t)
                break
            canvas = canvas + presence * alone(found, b, t)
            kl = step_kl(model, found, b, t)
            where, what = where + kl[0], what + kl[1]
        expected = cross_entropy(canvas, images()[b])
        assert losses.kl_pres is not None
        assert float(losses.reconstruction[b]) == pytest.approx(expected, rel=1e-9)
        assert float(losses.kl_where[b]) == pytest.approx(where, rel=1e-9)
        assert float(losses.kl_what[b]) == pytest.approx(what, rel=1e-9)
        assert float(losses.kl_pres[b]) == pytest.approx(pres, rel=1e-9)
    assert stopped_at, "some image must stop early, or this tests nothing"


@pytest.mark.parametrize("config", [SMALL, EXACT])
@torch.no_grad()
def test_parts_of_a_batch_equal_the_whole_batch(config: AIRConfig) -> None:
    model = build(config)
    given = config.count == "given"
    whole = run(model, COUNTS if given else None).total
    for index in range(3):
        rows = slice(index, index + 1)
        counts = COUNTS[rows] if given else None
        part = model(images()[rows], generator=Part(generator(), index, 3), counts=counts)
        torch.testing.assert_close(part.total, whole[rows])


def test_steps_stop_once_absences_sum_to_0_99() -> None:
    presence = torch.tensor([[0.9, 0.8, 0.4, 1.0], [0.01, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert _before_stop(presence).tolist() == [
        [True, True, True, True],
        [False, False, False, False],
        [True, True, True, True],
    ]
    assert _before_stop(torch.tensor([[0.5, 0.5, 1.0]])).tolist() == [[True, False, False]]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_concrete_density_equals_torch(temperature: float) -> None:
    drawn, logits = torch.randn(2, 50, dtype=torch.float64).mul(4).unbind()
    expected = LogitRelaxedBernoulli(torch.tensor(temperature), logits=logits).log_prob(drawn)
    actual = _concrete_log_density(drawn, logits, temperature)
    torch.testing.assert_close(actual, expected, check_dtype=False)


def test_recurrence_equals_torch_lstm_cell() -> None:
    model = build(SMALL)
    cell = nn.LSTMCell(3 * SIZE[0] * SIZE[1], 10).double()
    look, recur = model.look, model.recur
    assert isinstance(look, nn.Linear)
    # torch's order of the gates: input, forget, cell, output
    order = torch.cat([torch.arange(10) + 10 * gate for gate in (0, 2, 1, 3)])
    with torch.no_grad():
        cell.weight_ih.copy_(look.weight[order])
        cell.weight_hh.copy_(recur.weight[order])
        cell.bias_ih.copy_(look.bias[order])
        cell.bias_hh.copy_(recur.bias[order])
        cell.bias_hh[10:20] += 1  # the forget gate's
        state = torch.zeros(3, 10, dtype=torch.float64), torch.zeros(3, 10, dtype=torch.float64)
        outputs = []
        for _ in range(4):
            state = cell(images().flatten(1), state)
            outputs.append(state[0])
        torch.testing.assert_close(model._recurrent(images(), 4), torch.stack(outputs, dim=1))


@pytest.mark.parametrize("config", [SMALL, EXACT, replace(INFERRED, temperature=0.5)])
def test_dair_sees_the_image_minus_the_canvas(config: AIRConfig) -> None:
    """Unclipped, with gradients through the canvas; glimpses are cut from the image."""
    model = build(config, kind="dair")
    seen: list[Tensor] = []
    model.look.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    counts = COUNTS if config.count == "given" else None
    found, noise = objects(model, 3, counts)
    weights = model._weights(found.logit, noise, counts)
    canvas = torch.zeros_like(images())
    for t, difference in enumerate(seen):
        torch.testing.assert_close(difference, (images() - canvas).flatten(1))
        canvas = canvas + torch.stack([weights[b, t] * alone(found, b, t) for b in range(3)])
    assert len(seen) == 3
    assert float(seen[2].detach().min()) < 0, "not clipped"
    assert [difference.requires_grad for difference in seen] == [False, True, True]
    glimpses = affine.cut(images(), found.scale, found.shift, 6)
    what_mean = model.encoder(glimpses.flatten(2))[..., :4]
    torch.testing.assert_close(found.what_mean, what_mean)


@pytest.mark.parametrize("kind", ["air", "dair"])
def test_all_weights_get_gradients_except_under_training_wheels(kind: str) -> None:
    for config in (SMALL, INFERRED, EXACT):
        counts = COUNTS if config.count == "given" else None
        model = build(config, kind=kind)
        run(model, counts).total.sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert float(parameter.grad.abs().sum()) > 0, name
        model.zero_grad()
        run(model, counts, training_wheels=True).total.sum().backward()
        moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        assert moved == {"encoder", "decoder"}


def test_number_of_detections_equals_the_given_count() -> None:
    for kind in ("air", "dair"):
        model = build(SMALL, kind=kind)
        for sample in (False, True):
            found = model.detect(images(), counts=COUNTS, sample=sample)
            assert [len(item) for item in found] == [2, 0, 3]
            assert all(item.scores.tolist() == [1.0] * len(item) for item in found)
        shown = model.explain(images(), counts=COUNTS)
        assert [len(item.appearances) for item in shown] == [2, 0, 3]
        none = torch.zeros(3, dtype=torch.int64)
        assert not any(item.reconstruction.any() for item in model.explain(images(), counts=none))
        run(model, none).total.sum().backward()  # a batch of empty images is valid


@pytest.mark.parametrize("kind", ["air", "dair"])
def test_reconstruction_shows_probable_objects_at_any_threshold(kind: str) -> None:
    model = build(EXACT, kind=kind)
    low, high = model.explain(images(), 0.0), model.explain(images(), 0.99)
    assert [len(item.appearances) for item in low] > [len(item.appearances) for item in high]
    for one, other in zip(low, high, strict=True):
        assert torch.equal(one.reconstruction, other.reconstruction)


def test_boxes_are_scale_and_shift_in_pixels() -> None:
    model = build(SMALL)
    found = model.detect(images(), counts=COUNTS)[2]
    steps = model._find(images(), 3, None, COUNTS)
    for t, box in enumerate(found.boxes.tolist()):
        (w, h), (x, y) = steps.scale[2, t].tolist(), steps.shift[2, t].tolist()
        centre_x, centre_y = (x + 1) / 2 * 9, (y + 1) / 2 * 11
        expected = [centre_x - w * 4.5, centre_y - h * 5.5, centre_x + w * 4.5, centre_y + h * 5.5]
        assert box == pytest.approx(expected, rel=1e-5)


def test_tight_boxes_enclose_the_rendered_objects() -> None:
    """Compares boxes with the extent of the lit pixels of each placed map."""
    model = build(EXACT, box_contrast=0.3)
    with torch.no_grad():
        last_bias(model.output)[8] = 9.0
        layer = model.decoder[-1]
        assert isinstance(layer, nn.Linear)
        layer.weight.mul_(4)  # texels that are clearly lit or not
    steps = model._find(images(), 3, None, None)
    apart = []
    for b, item in enumerate(model.detect(images(), threshold=0.0)):
        assert torch.equal(item.boxes, item.boxes.round())
        for t, box in enumerate(item.boxes.tolist()):
            light = steps.placed[b, t].amax(0)
            lit = (light > 0.3 * steps.maps[b, t].max()).nonzero().tolist()
            if not lit:
                continue
            rows, columns = [row for row, _ in lit], [column for _, column in lit]
            inside = [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
            apart += [abs(x - y) for x, y in zip(box, inside, strict=True)]
    assert len(apart) >= 12
    assert max(apart) <= 1.0, "at most one partly covered pixel"
    assert sum(apart) / len(apart) < 0.35


@pytest.mark.parametrize("contrast", [0.3, 0.45, 0.6, 0.75])
def test_tight_boxes_end_at_the_contrast_threshold(contrast: float) -> None:
    """Boxes have the size of the lit texels, on an image where a texel covers many pixels."""
    height, width = 121, 91
    model = build(EXACT, size=(height, width), box_contrast=contrast)
    rim = (torch.arange(6.0) - 2.5).abs()
    with torch.no_grad():
        last_bias(model.decoder)[:] = (8 - 4 * (rim[:, None] + rim)).expand(3, 6, 6).flatten()
    pictures = torch.rand(20, 3, height, width, dtype=torch.float64)
    steps = model._find(pictures, 3, None, None)
    cut = 0
    for b, item in enumerate(model.detect(pictures, threshold=0.0)):
        for t, (x1, y1, x2, y2) in enumerate(item.boxes.tolist()):
            light = steps.maps[b, t].amax(0)
            lit = light > contrast * light.max()
            texels = [int(lit.any(axis).nonzero().flatten().diff().sum()) + 1 for axis in (0, 1)]
            w, h = (steps.scale[b, t] / 5).tolist()  # from the first of six texels to the last
            if 0 in (x1, y1) or x2 == width or y2 == height:
                continue
            assert x2 - x1 == pytest.approx(max(1, texels[0] * w * (width - 1)), abs=1)
            assert y2 - y1 == pytest.approx(max(1, texels[1] * h * (height - 1)), abs=1)
            cut += texels != [6, 6]
    assert cut >= 5


def test_score_is_the_product_of_presences_so_far() -> None:
    model = build(EXACT)
    steps = model._find(images(), 3, None, None)
    expected = steps.logit.sigmoid().cumprod(1)
    for b, item in enumerate(model.detect(images(), threshold=0.0)):
        torch.testing.assert_close(item.scores, expected[b].float())
        assert all(first >= second for first, second in pairwise(item.scores.tolist()))
    for b, item in enumerate(model.detect(images(), threshold=0.3)):
        assert len(item) == int((expected[b] > 0.3).sum())


@pytest.mark.parametrize("kind", ["air", "dair"])
def test_sampled_counts_follow_the_posterior(kind: str) -> None:
    model = build(EXACT, kind=kind)
    # without noise in where and what, DAIR's later steps are the same for every sample
    with torch.no_grad():
        last_bias(model.output)[4:8] = -10.0
        last_bias(model.encoder)[4:] = -10.0
    many = images()[:1].expand(2000, -1, -1, -1)
    torch.manual_seed(0)
    found = [len(item) for item in model.detect(many, sample=True)]
    reached = model._find(images()[:1], 3, None, None).logit.sigmoid().cumprod(1)[0].tolist()
    for t, chance in enumerate(reached):
        share = sum(number > t for number in found) / 2000
        assert share == pytest.approx(chance, abs=4 * (0.25 / 2000) ** 0.5)


def test_wrong_images_and_counts_are_refused() -> None:
    given, inferred = build(SMALL), build(EXACT)
    with pytest.raises(InputError, match=r"images of 11x9 px and takes only that size, got 12x9"):
        inferred.detect(torch.zeros(1, 3, 12, 9, dtype=torch.float64))
    for counts in (None, torch.tensor([2]), torch.tensor([1, 2, -1]), torch.ones(4).long()):
        with pytest.raises(ValueError, match="counts must be 3 whole numbers from 0"):
            given.detect(images(), counts=counts)
    with pytest.raises(ValueError, match="counts must be 3 whole numbers from 0, got None"):
        build(SMALL, kind="dair")(images())
    with pytest.raises(InputError, match="counts up to 256, got 10000"):
        given.detect(images(1), counts=torch.tensor([10_000]))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        inferred.detect(torch.zeros(3, *SIZE, dtype=torch.float64))
    with pytest.raises(ValueError, match="images must be finite"):
        inferred.explain(images() * float("nan"))


@pytest.mark.parametrize("kind", ["air", "dair"])
def test_losses_stay_float32_under_bfloat16_autocast(kind: str) -> None:
    model = build(EXACT, kind=kind).float()
    seen = images().float()
    exact = model(seen, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(seen, generator=generator())
    for name, term in exact.terms().items():
        assert rough.terms()[name].dtype == torch.float32
        torch.testing.assert_close(rough.terms()[name], term, rtol=0.05, atol=0.1)
    rough.total.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_grey_models_see_the_mean_of_the_channels() -> None:
    model = build(EXACT, grey=True)
    turned = images()[:, [1, 2, 0]]
    torch.testing.assert_close(model._recurrent(images(), 2), model._recurrent(turned, 2))


def test_initial_biases_come_from_the_config() -> None:
    config = replace(SMALL, scale_bias=-0.5, std_bias=-2.0, presence_bias=3.0, colour_bias=-1.0)
    model = AIR(config, SIZE)
    assert last_bias(model.output).tolist() == [-0.5, -0.5, 0.0, 0.0, *[-2.0] * 4, 3.0]
    assert last_bias(model.encoder).tolist() == [0.0] * 4 + [-2.0] * 4
    assert last_bias(model.decoder).unique().tolist() == [-1.0]
