"""The operators inside a CUDA graph: they neither wait for the GPU nor derive shapes from data."""

import pytest
import torch

from spairkit.presence import presence_kl
from spairkit.rendering import render


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("relaxed", [False, True])
def test_replayed_graph_equals_eager_calls(relaxed: bool) -> None:
    device = torch.device("cuda")
    rgba = torch.rand(2, 4, 14, 14, 4, device=device, requires_grad=True)
    corner = 20 * torch.rand(2, 4, 2, device=device)
    boxes = torch.cat([corner, corner + 15], -1)
    logits = torch.randn(2, 4, device=device, requires_grad=True)
    background = torch.rand(2, 3, 48, 48, device=device)
    success = torch.tensor(0.5, device=device)

    def step() -> list[torch.Tensor]:
        presence = torch.sigmoid(logits)
        image = render(rgba, boxes, logits, presence, background, importance_floor=0.01)
        kl = presence_kl(logits, presence, success, relaxed=relaxed)
        loss = image.square().sum() + kl.sum()
        return [loss.detach(), *torch.autograd.grad(loss, [rgba, logits])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    with torch.no_grad():
        rgba.uniform_()
        logits.normal_()
        success.fill_(0.9)
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)
