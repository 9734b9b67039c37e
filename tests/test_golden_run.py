"""Twenty seeded updates of a small SPAIR against recorded losses.

They run in float64, because training amplifies rounding: in float32 the losses would differ by
several per cent. A faster implementation changes only the last digits. A commit that changes the
mathematics says so and updates the losses.
"""

import pytest
import torch

from spairkit.config import Config, DataConfig, SPAIRConfig
from spairkit.data.scenes import Scenes
from spairkit.models.densities import count_success
from spairkit.models.loading import build

LOSSES = [
    4590.182026,
    4516.182242,
    4427.174109,
    4375.826063,
    4253.193307,
    4181.608409,
    4109.491670,
    4006.850215,
    3956.318488,
    3730.029284,
    3778.860765,
    3617.123163,
    3542.024886,
    3420.396889,
    3324.203369,
    3292.547975,
    3187.123216,
    3169.157768,
    3104.302019,
    3118.638800,
]


def losses_of_a_run() -> list[float]:
    config = SPAIRConfig(
        backbone_channels=(8, 12),
        features=10,
        hidden=12,
        passthrough=6,
        what=5,
        encoder_hidden=(16,),
        decoder_hidden=(16,),
        object_size=8,
        background="solid",
    )
    scenes = Scenes(DataConfig(image_height=40, image_width=52, max_objects=4), "train")
    model = build(Config(model=config)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    totals = []
    for step in range(20):
        losses = model(
            scenes.batch(torch.arange(4 * step, 4 * step + 4)).images.double(),
            success=count_success(step, 1e6, 0.0125, 3.0, "exponential"),
            training_wheels=step < 5,
            generator=torch.Generator().manual_seed(step),
        )
        optimiser.zero_grad()
        losses.total.mean().backward()
        optimiser.step()
        totals.append(float(losses.total.detach().mean()))
    return totals


def test_losses_equal_the_recorded_ones() -> None:
    assert losses_of_a_run() == pytest.approx(LOSSES, rel=1e-5)
