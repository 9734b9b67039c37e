"""Twenty seeded updates of a small SPAIR, losses written down: a rewrite may not move them.

A faster way to the same mathematics moves the last digits only. A change of the mathematics moves
them all: it says so in its commit, with these figures anew.
"""

import pytest
import torch

from spairkit.config import DataConfig, SPAIRConfig
from spairkit.data.scenes import Scenes
from spairkit.densities import count_success
from spairkit.models import build

LOSSES = [
    4608.7725,
    4499.6836,
    4418.0366,
    4379.7598,
    4263.9287,
    4168.8164,
    4110.0244,
    4033.4297,
    3921.7004,
    3790.6658,
    3776.4214,
    3641.1733,
    3570.8735,
    3429.3369,
    3336.0994,
    3296.7698,
    3190.1477,
    3174.3618,
    3117.4128,
    3080.5635,
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
    model = build(config, seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    totals = []
    for step in range(20):
        losses = model(
            scenes.batch(torch.arange(4 * step, 4 * step + 4)).images,
            success=count_success(step, 1e6, 0.0125, 3.0, "exponential"),
            training_wheels=step < 5,
            generator=torch.Generator().manual_seed(step),
        )
        optimiser.zero_grad()
        losses.total.mean().backward()
        optimiser.step()
        totals.append(float(losses.total.detach().mean()))
    return totals


def test_losses_are_those_written_down() -> None:
    assert losses_of_a_run() == pytest.approx(LOSSES, rel=1e-4)
