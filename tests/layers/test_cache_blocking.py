"""A large batch is run in parts where that cannot be seen in the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.layers.cache_blocking import run_in_parts

LARGE = 3 * 2**19  # numbers of a map of 6 MiB: two images a part


class Counting(nn.Conv2d):
    """Note the size of each batch."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return super().forward(x)


@pytest.fixture
def conv() -> Counting:
    """Return a convolution in evaluation mode that has seen nothing."""
    layer = Counting(3, 4, 3).eval()
    layer.seen = []
    return layer


@torch.no_grad()
def test_large_batches_are_split(conv: Counting) -> None:
    x = torch.randn(5, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = nn.Conv2d.forward(conv, x)
    found = run_in_parts(conv, x, LARGE)
    assert conv.seen == [2, 2, 1]
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    run_in_parts(conv, x, 8)
    assert conv.seen[3:] == [5]
    run_in_parts(conv, x, 100 * LARGE)  # at least one image a part
    assert conv.seen[4:] == [1] * 5


def test_gradients_and_training_mode_see_the_whole_batch(conv: Counting) -> None:
    x = torch.randn(5, 3, 6, 6)
    run_in_parts(conv, x, LARGE)
    with torch.no_grad():
        run_in_parts(conv.train(), x, LARGE)
    assert conv.seen == [5, 5]


@torch.no_grad()
def test_exported_programs_fit_every_batch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return run_in_parts(self.conv, x, LARGE)

    net = Net().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(net, (torch.randn(5, 3, 6, 6),), dynamic_shapes=shapes).module()
    x = torch.randn(3, 3, 6, 6)
    assert torch.allclose(program(x), net(x), atol=1e-6)
