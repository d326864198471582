"""Linear stand-ins for the networks: every row by itself, so that gradients and batches can be checked by hand."""

import torch
from torch import nn

from pointcept_kd.host.point import offset2batch


class FakeCondition:
    """Mean of each scan (b, 3), and which of them are dropped."""

    def __init__(self, mean, dropped=None):
        self.mean = mean
        self.dropped = torch.zeros(len(mean), dtype=torch.bool) if dropped is None else dropped

    def drop(self, scans=None):
        return FakeCondition(self.mean, torch.ones_like(self.dropped) if scans is None else scans)


class FakeEncoder(nn.Module):
    """The mean of each scan's points, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, coord, offset):
        scan = offset2batch(offset)
        sums = coord.new_zeros(len(offset), 3).index_add(0, scan, self.norm(coord))
        return FakeCondition(self.weight * sums / torch.bincount(scan)[:, None])


class FakeDenoiser(nn.Module):
    """Noise linear in the point, the time and the scan's mean."""

    def __init__(self, seed=0, size=0.3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.point = nn.Parameter(size * torch.randn(3, 3, generator=generator))
        self.time = nn.Parameter(size * torch.randn(3, generator=generator))
        self.scan = nn.Parameter(size * torch.randn(3, 3, generator=generator))
        self.calls = []

    def forward(self, x, offset, t, condition):
        self.calls.append((torch.is_grad_enabled(), self.training))
        batch = offset2batch(offset)
        mean = condition.mean * ~condition.dropped[:, None]
        return x @ self.point + t[batch, None] / 1000 * self.time + (mean @ self.scan)[batch]

    def guided(self, x, offset, t, condition, scale):
        null = self(x, offset, t, condition.drop())
        return null + scale * (self(x, offset, t, condition) - null)


def scans(counts=(6, 9), seed=0, times=5):
    """A batch dict of partial and complete clouds."""
    generator = torch.Generator().manual_seed(seed)
    coord = torch.cat([torch.randn(n, 3, generator=generator) + i for i, n in enumerate(counts)])
    complete = torch.cat(
        [torch.randn(n * times, 3, generator=generator) + i for i, n in enumerate(counts)]
    )
    ends = torch.tensor(counts).cumsum(0)
    names = [f"scan{i}" for i in range(len(counts))]
    return dict(
        coord=coord, offset=ends, complete=complete, complete_offset=ends * times, name=names
    )
