"""SPAIR against cells and loss terms written out one by one, and its behaviour as a detector."""

import math
from dataclasses import fields, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spairkit.config import SPAIRConfig
from spairkit.images import num_channels
from spairkit.models.densities import bernoulli_cross_entropy
from spairkit.models.latents import Latents, Noise
from spairkit.models.networks import LateralNetwork
from spairkit.models.spair import SPAIR
from spairkit.presence import presence_kl

SMALL = SPAIRConfig(
    backbone_channels=(8,),
    features=8,
    hidden=16,
    passthrough=5,
    what=6,
    encoder_hidden=(12,),
    decoder_hidden=(12,),
    object_size=6,
)


@pytest.fixture
def model() -> SPAIR:
    torch.manual_seed(0)
    return SPAIR(SMALL)


def encode_in_raster_order(model: SPAIR, images: Tensor, noise: Noise, relaxed: bool) -> Latents:
    """docs/model.md 3.2 literally: cell by cell, with the context from a table of cells."""
    features = model.backbone(images)
    rows, columns = features.shape[-2:]
    box, rest, presence = model.edge[:4], model.edge[4:-1], model.edge[-1:]
    edge = torch.cat([box.sigmoid(), rest, presence.sigmoid()]).expand(len(images), -1)
    vectors: dict[tuple[int, int], Tensor] = {}
    cells = []
    for i in range(rows):
        for j in range(columns):
            near = [(i - 1, j - 1), (i - 1, j), (i - 1, j + 1), (i, j - 1)]
            context = torch.cat([vectors.get(cell, edge) for cell in near], dim=-1)
            shared = torch.cat([features[:, :, i, j], context], dim=-1)
            k = i * columns + j
            latents, vectors[i, j] = encode_cell(
                model, images, shared, (i, j), noise.normal[:, k], noise.logistic[:, k], relaxed
            )
            cells.append(latents)
    return Latents(
        **{f.name: torch.stack([getattr(c, f.name) for c in cells], 1) for f in fields(Latents)}
    )


def encode_cell(
    model: SPAIR,
    images: Tensor,
    shared: Tensor,  # [B, F + context]
    cell: tuple[int, int],
    normal: Tensor,  # [B, 4 + A + 1]
    logistic: Tensor,  # [B]
    relaxed: bool,
) -> tuple[Latents, Tensor]:
    """docs/model.md 3.3, row by row of its table; only the weights come from the model."""
    config = model.config

    def lateral(network: LateralNetwork, *inputs: Tensor) -> Tensor:
        x = network.first(torch.cat(inputs, dim=-1)).relu()
        output: Tensor = network.last(network.second(x).relu())
        return output

    def moments(outputs: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = outputs[:, : outputs.shape[1] // 2], outputs[:, outputs.shape[1] // 2 :]
        return mean, 2 / (1 + torch.exp(-raw.clamp(-10, 10)))

    outputs = lateral(model.where_network, shared)
    where_mean, where_std = moments(outputs[:, :8])
    z_y, z_x, z_h, z_w = (where_mean + where_std * normal[:, :4]).clamp(-10, 10).unbind(1)
    b_y, b_x = z_y.sigmoid() * 2 - 0.5, z_x.sigmoid() * 2 - 0.5
    y, x = (cell[0] + b_y) * 12, (cell[1] + b_x) * 12
    h, w = z_h.sigmoid() * 48, z_w.sigmoid() * 48
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=-1)

    height, width = images.shape[-2:]
    zeros = torch.zeros_like(y)
    # from [-1, 1] on the box to [-1, 1] on the image, both from the first to the last pixel
    across = torch.stack([w / width, zeros, 2 * x / width - 1], dim=-1)
    down = torch.stack([zeros, h / height, 2 * y / height - 1], dim=-1)
    side = config.object_size
    grid = F.affine_grid(
        torch.stack([across, down], dim=1), [len(images), 3, side, side], align_corners=True
    )
    glimpse = F.grid_sample(images, grid, padding_mode="border", align_corners=True)
    first, last = (layer for layer in model.encoder if isinstance(layer, nn.Linear))
    what_mean, what_std = moments(last(first(glimpse.flatten(1)).relu()))
    what = what_mean + what_std * normal[:, 4:-1]

    placed = torch.stack([b_y, b_x, z_h.sigmoid(), z_w.sigmoid()], dim=-1)
    outputs = lateral(model.depth_network, shared, outputs[:, 8:], placed, what)
    depth_mean, depth_std = moments(outputs[:, :2])
    depth = depth_mean + depth_std * normal[:, -1:]
    importance = 4 * (-depth.clamp(-10, 10)).sigmoid()

    presence_inputs = (outputs[:, 2:], placed, what, importance)
    logit = lateral(model.presence_network, shared, *presence_inputs).clamp(-10, 10)
    presence = ((logit + logistic[:, None]) / config.temperature).sigmoid()
    if not relaxed:
        presence = presence.round()
    latents = Latents(
        where_mean=where_mean,
        where_std=where_std,
        what_mean=what_mean,
        what_std=what_std,
        what=what,
        depth_mean=depth_mean[:, 0],
        depth_std=depth_std[:, 0],
        depth=depth[:, 0],
        presence_logit=logit[:, 0],
        presence=presence[:, 0],
        boxes=boxes,
    )
    return latents, torch.cat([placed, what, importance, presence], dim=-1)


@pytest.mark.parametrize(("height", "width"), [(36, 36), (25, 50), (12, 60), (60, 12)])
def test_wavefront_equals_the_raster_loop(model: SPAIR, height: int, width: int) -> None:
    model = model.double()
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    noise = model._draw(images, torch.Generator().manual_seed(1))
    actual = model._encode(images, noise, training_wheels=False, relaxed=True)
    expected = encode_in_raster_order(model, images, noise, relaxed=True)
    for field in fields(Latents):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_wavefront_gradients_equal_the_raster_loop(model: SPAIR) -> None:
    model = model.double()
    images = torch.rand(2, 3, 36, 48, dtype=torch.float64)
    noise = model._draw(images, torch.Generator().manual_seed(1))
    gradients = []
    for latents in (
        model._encode(images, noise, training_wheels=False, relaxed=True),
        encode_in_raster_order(model, images, noise, relaxed=True),
    ):
        total = sum(getattr(latents, f.name).square().sum() for f in fields(Latents))
        parameters = [p for n, p in model.named_parameters() if not n.startswith("decoder")]
        gradients.append(torch.autograd.grad(total, parameters))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_parameter_counts_match_the_specification() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    model = SPAIR(SPAIRConfig())
    assert count(model.backbone) == 576_740
    assert count(model.where_network) == 53_508
    assert count(model.depth_network) == 68_302
    assert count(model.presence_network) == 58_201
    assert count(model.encoder) == 458_596
    assert count(model.decoder) == 546_832
    assert model.edge.numel() == 56
    assert count(model) == 1_762_235


@pytest.mark.parametrize(("centre_min", "centre_max"), [(-0.5, 1.5), (-0.25, 1.0), (0.1, 1.75)])
def test_boxes_follow_equations_2_to_6(centre_min: float, centre_max: float) -> None:
    torch.manual_seed(0)
    model = SPAIR(replace(SMALL, centre_min=centre_min, centre_max=centre_max))
    images = torch.rand(1, 3, 24, 36)
    latents = model._encode(images, None, training_wheels=False, relaxed=False)
    for k in range(6):
        i, j = divmod(k, 3)
        y, x, h, w = (1 / (1 + math.exp(-v)) for v in latents.where_mean[0, k].tolist())
        span = centre_max - centre_min
        centre_y, centre_x = (i + span * y + centre_min) * 12, (j + span * x + centre_min) * 12
        x1, y1, x2, y2 = latents.boxes[0, k].tolist()
        assert (x1 + x2) / 2 == pytest.approx(centre_x, abs=1e-4)
        assert (y1 + y2) / 2 == pytest.approx(centre_y, abs=1e-4)
        assert (x2 - x1, y2 - y1) == pytest.approx((48 * w, 48 * h), abs=1e-4)


@pytest.mark.parametrize(("prior_mean", "prior_std"), [(-2.1972, 0.5), (-1.0, 0.75)])
@torch.no_grad()
def test_losses_match_a_loop_over_cells(prior_mean: float, prior_std: float) -> None:
    torch.manual_seed(0)
    model = SPAIR(replace(SMALL, size_prior_mean=prior_mean, size_prior_std=prior_std))
    images = torch.rand(2, 3, 24, 36)
    latents, background = model._sample(images, False, torch.Generator().manual_seed(0))
    image = model._render(latents, background, images, model.decode(latents.what))
    latents.presence_logit[1, 1::2] -= 9.0  # some cells of one image are off
    losses = model._losses(images, latents, image, 0.3)
    presences = latents.presence_logit.sigmoid().tolist()

    def kl(mean: float, std: float, prior_mean: float, prior_std: float) -> float:
        square = (std**2 + (mean - prior_mean) ** 2) / prior_std**2
        return math.log(prior_std / std) + square / 2 - 0.5

    for b in range(2):
        where = what = depth = 0.0
        for k in range(6):
            presence = float(latents.presence[b, k])
            mean, std = latents.where_mean[b, k].tolist(), latents.where_std[b, k].tolist()
            priors = [(0.0, 1.0), (0.0, 1.0), (prior_mean, prior_std), (prior_mean, prior_std)]
            pairs = zip(mean, std, priors, strict=True)
            where += presence * sum(kl(m, s, *prior) for m, s, prior in pairs)
            mean, std = latents.what_mean[b, k].tolist(), latents.what_std[b, k].tolist()
            what += presence * sum(kl(m, s, 0.0, 1.0) for m, s in zip(mean, std, strict=True))
            m, s = float(latents.depth_mean[b, k]), float(latents.depth_std[b, k])
            depth += presence * kl(m, s, 0.0, 1.0)
        entropy = 0.0
        for x, y in zip(images[b].flatten().tolist(), image[b].flatten().tolist(), strict=True):
            entropy -= x * math.log(y + 1e-9) + (1 - x) * math.log(1 - y + 1e-9)
        assert float(losses.kl_where[b]) == pytest.approx(where, rel=1e-4)
        assert float(losses.kl_what[b]) == pytest.approx(what, rel=1e-4)
        assert float(losses.terms()["kl_depth"][b]) == pytest.approx(depth, rel=1e-4)
        assert float(losses.reconstruction[b]) == pytest.approx(entropy, rel=1e-3)
        assert losses.found is not None
        assert float(losses.found[b]) == sum(p > 0.5 for p in presences[b])
    pres = presence_kl(latents.presence_logit, latents.presence, 0.3).sum(1)
    torch.testing.assert_close(losses.kl_pres, pres)
    terms = losses.terms()
    weighted = terms["kl_where"] + terms["kl_what"] + terms["kl_depth"]
    rest = terms["reconstruction"] + terms["kl_pres"]
    torch.testing.assert_close(losses.total, rest + weighted)
    torch.testing.assert_close(losses.elbo, -losses.total)
    heavier = replace(losses, beta=2.0)
    torch.testing.assert_close(heavier.total, rest + 2 * weighted)
    torch.testing.assert_close(heavier.elbo, losses.elbo)


NORMAL = replace(SMALL, likelihood="normal")


def mixed_images() -> Tensor:
    """Two grey images and one in colour."""
    grey = torch.rand(2, 1, 24, 36, generator=torch.Generator().manual_seed(3))
    colour = torch.rand(1, 3, 24, 36, generator=torch.Generator().manual_seed(4))
    return torch.cat([grey.expand(2, 3, 24, 36), colour])


@torch.no_grad()
def test_normal_reconstruction_matches_a_loop_that_counts_grey_once() -> None:
    torch.manual_seed(0)
    model, images = SPAIR(NORMAL).eval(), mixed_images()
    model.noise_std.fill_(0.3)
    latents, background = model._sample(images, False, torch.Generator().manual_seed(0))
    drawn = model._render(latents, background, images, model.decode(latents.what))
    losses = model(images, generator=torch.Generator().manual_seed(0))
    std = float(model.noise_std)
    for b, counted in enumerate((1, 1, 3)):
        nats = 0.0
        for x, y in zip(images[b].flatten().tolist(), drawn[b].flatten().tolist(), strict=True):
            nats += (x - y) ** 2 / (2 * std**2) + math.log(std) + math.log(2 * math.pi) / 2
        assert float(losses.reconstruction[b]) == pytest.approx(nats * counted / 3, rel=1e-5)


def test_crops_are_weighted_like_their_image() -> None:
    """The losses of the parts of an image add up to its own, even if a part is grey."""
    model, images = SPAIR(NORMAL), mixed_images()
    images[:, :, :12] = images[:, :1, :12]
    drawn, channels = torch.rand_like(images), num_channels(images)
    assert channels.tolist() == [1, 1, 3]
    halves = zip(drawn.split(12, dim=-2), images.split(12, dim=-2), strict=True)
    parts = [model.reconstruction_loss(*half, channels) for half in halves]
    whole = model.reconstruction_loss(drawn, images, channels)
    torch.testing.assert_close(sum(parts), whole)


def test_bernoulli_reconstruction_counts_three_channels(model: SPAIR) -> None:
    images = mixed_images()
    drawn = torch.rand_like(images)
    expected = bernoulli_cross_entropy(drawn, images, SMALL.likelihood_floor)
    for channels in (torch.tensor([1, 1, 3]), torch.tensor([3, 3, 3])):
        assert torch.equal(model.reconstruction_loss(drawn, images, channels), expected)
    assert "noise_std" not in model.state_dict()


def test_noise_converges_to_the_rms_residual_in_training_mode_only() -> None:
    torch.manual_seed(0)
    model, images = SPAIR(replace(NORMAL, presence_bias=-20.0)), mixed_images()[..., :12, :12]
    assert model.noise_std.dtype == torch.float32
    assert model.noise_std.shape == ()
    model.fit_noise(images)
    variance, square = float(images.var(correction=0)), float(images.square().mean())
    assert float(model.noise_std) == pytest.approx(math.sqrt(variance), rel=1e-5)
    for update in range(1, 201):
        with torch.no_grad():
            model(images)  # draws the black background
        rest = 0.99**update
        expected = math.sqrt(rest * variance + (1 - rest) * square)
        assert float(model.noise_std) == pytest.approx(expected, rel=1e-3)
    seen = float(model.noise_std)
    model.eval()(torch.zeros_like(images))
    assert float(model.noise_std) == seen


def test_noise_stays_at_least_one_level_and_finite() -> None:
    model = SPAIR(replace(NORMAL, presence_bias=-20.0))
    images = torch.zeros(1, 3, 24, 24)
    model.fit_noise(images)
    model(images)
    assert float(model.noise_std) == pytest.approx(1 / 255)
    model(torch.full_like(images, torch.nan))
    assert float(model.noise_std) == pytest.approx(1 / 255)


def test_loss_uses_the_noise_of_before_the_update() -> None:
    """Otherwise processes that share a batch would use different ones."""
    torch.manual_seed(0)
    model, images = SPAIR(NORMAL), mixed_images()
    losses = [
        model.train(mode)(images, generator=torch.Generator().manual_seed(0)).reconstruction
        for mode in (True, False)
    ]
    assert not torch.equal(*losses)
    model.noise_std.fill_(1.0)
    again = model(images, generator=torch.Generator().manual_seed(0)).reconstruction
    assert torch.equal(losses[0], again)


def test_bernoulli_has_no_noise_to_fit(model: SPAIR) -> None:
    with pytest.raises(ValueError, match="'bernoulli' has no noise"):
        model.fit_noise(mixed_images())


def test_training_wheels_train_only_encoder_and_decoder(model: SPAIR) -> None:
    images = torch.rand(2, 3, 24, 24)
    model(images, training_wheels=True).total.sum().backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == name.startswith(("encoder", "decoder")), name


@pytest.mark.parametrize("size", [48, 84])
def test_paper_model_stays_finite(size: int) -> None:
    torch.manual_seed(0)
    model = SPAIR(SPAIRConfig())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4)
    for step in range(3):
        images = (torch.rand(4, 3, size, size) > 0.8).float()
        losses = model(images, success=(1e-6, 0.5, 0.98765)[step])
        optimiser.zero_grad()
        losses.total.mean().backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimiser.step()
    assert bool(losses.total.isfinite().all())


@pytest.mark.parametrize("background", ["black", "solid", "mode", "mlp"])
def test_background_fills_images_without_objects(
    background: Literal["black", "solid", "mode", "mlp"],
) -> None:
    torch.manual_seed(0)
    model = SPAIR(replace(SMALL, background=background, presence_bias=-20.0))
    if background == "mode":
        model.fit_background(torch.tensor([51, 102, 153]).byte()[None, :, None, None] / 255)
    images = torch.rand(2, 3, 20, 31)
    image = torch.stack([item.reconstruction for item in model.explain(images)])
    assert image.shape == images.shape
    torch.testing.assert_close(image, image[:, :, :1, :1].expand_as(image), rtol=0, atol=0)
    expected = {"black": [0.0] * 3, "solid": [0.5] * 3, "mode": [0.2, 0.4, 0.6]}
    if background in expected:
        torch.testing.assert_close(image[0, :, 0, 0], torch.tensor(expected[background]))
    losses = model(images)
    losses.total.mean().backward()
    learned = [p for n, p in model.named_parameters() if n.startswith("background")]
    assert all(p.grad is not None and bool(p.grad.any()) for p in learned)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (13, 40), (48, 48), (97, 51)])
def test_images_of_any_size_are_accepted(model: SPAIR, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width)
    found = model.detect(images, threshold=0.0)
    assert [len(item) for item in found] == [math.ceil(height / 12) * math.ceil(width / 12)] * 2
    for item, image, one in zip(model.explain(images, 0.0), images, found, strict=True):
        assert torch.equal(item.image, image)
        assert item.reconstruction.shape == image.shape
        assert item.appearances.shape == (len(one), 6, 6, 4)
        assert torch.equal(item.detections.boxes, one.boxes)
    assert bool(model(images).total.isfinite().all())


@pytest.mark.parametrize("contrast", [0.0, 0.3])
def test_tightened_boxes_lie_on_pixel_edges(model: SPAIR, contrast: float) -> None:
    images = torch.rand(2, 3, 24, 30)
    given = model.detect(images, 0.0, box_contrast=contrast)
    model.config = replace(model.config, box_contrast=contrast)
    for found, one in zip(model.detect(images, 0.0), given, strict=True):
        assert len(found) > 0
        assert torch.equal(found.boxes, found.boxes.round()) == (contrast > 0)
        assert torch.equal(found.boxes, one.boxes)


def test_fixed_backgrounds_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="'black' is not fitted"):
        SPAIR(SMALL).fit_background(torch.rand(1, 3, 4, 4))


def test_moving_the_image_by_a_cell_moves_the_boxes(model: SPAIR) -> None:
    config = replace(SMALL, lateral=False)
    torch.manual_seed(0)
    model = SPAIR(config).double()
    images = torch.zeros(1, 3, 72, 72, dtype=torch.float64)
    images[..., 24:36, 24:38] = torch.rand(12, 14, dtype=torch.float64)
    moved = images.roll((12, 24), dims=(2, 3))
    boxes = model.detect(images, 0.0)[0].boxes.reshape(6, 6, 4)
    others = model.detect(moved, 0.0)[0].boxes.reshape(6, 6, 4)
    shift = torch.tensor([24.0, 12.0, 24.0, 12.0])
    torch.testing.assert_close(others[2:4, 2:5], boxes[1:3, 0:3] + shift, rtol=0, atol=1e-4)


def test_detections_are_deterministic_unless_sampled(model: SPAIR) -> None:
    images = torch.rand(4, 3, 48, 48)
    first, second = model.detect(images, 0.0), model.detect(images, 0.0)
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(first, second, strict=True))
    sampled = model.detect(images, sample=True)
    assert all(bool((item.scores == 1).all()) for item in sampled)
    again = model.detect(images, sample=True)
    assert any(not torch.equal(a.boxes, b.boxes) for a, b in zip(sampled, again, strict=True))


def test_equal_generators_give_equal_losses(model: SPAIR) -> None:
    images = torch.rand(2, 3, 36, 36)
    totals = [model(images, generator=torch.Generator().manual_seed(s)).total for s in (5, 5, 6)]
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])


def test_training_works_after_detecting_in_inference_mode() -> None:
    torch.manual_seed(0)
    model = SPAIR(SMALL)
    images = torch.rand(2, 3, 31, 29)  # a size that no other test has cached
    with torch.inference_mode():
        model.detect(images)
    model(images).total.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 24, 24), r"images must be \[B, 3, H, W\].* got \[3, 24, 24\]"),
        (torch.rand(2, 1, 24, 24), r"got \[2, 1, 24, 24\]"),
        (torch.rand(0, 3, 24, 24), r"got \[0, 3, 24, 24\]"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.uint8), "floating-point in .0, 1., got torch.uint8"),
        (torch.full((1, 3, 24, 24), float("nan")), "must be finite"),
    ],
)
def test_invalid_batches_are_refused(model: SPAIR, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.detect(images)


def test_beta_of_the_config_weighs_the_divergences() -> None:
    totals = []
    images = torch.rand(2, 3, 24, 24)
    for beta in (1.0, 3.0):
        torch.manual_seed(0)
        losses = SPAIR(replace(SMALL, beta=beta))(
            images, generator=torch.Generator().manual_seed(1)
        )
        totals.append(losses.total)
    terms = losses.terms()
    weighted = terms["kl_where"] + terms["kl_what"] + terms["kl_depth"]
    torch.testing.assert_close(totals[1] - totals[0], 2 * weighted, rtol=1e-4, atol=1e-3)
