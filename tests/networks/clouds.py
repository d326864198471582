"""Small voxel clouds for the tests of networks."""

import torch


def cloud(counts, channels=4, high=12, classes=3, dtype=torch.float32, seed=0):
    """A batch dict of scans with `counts` distinct voxels each, in random order."""
    g = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(high**3, generator=g)[:count] for count in counts]
    flat = torch.cat(picks)
    cells = torch.stack([flat // high**2, flat // high % high, flat % high], 1)
    n = len(flat)
    return {
        "coord": cells.to(dtype) * 0.05,
        "grid_coord": cells,
        "feat": torch.randn(n, channels, generator=g, dtype=dtype),
        "segment": torch.randint(-1, classes, (n,), generator=g),
        "offset": torch.tensor(counts).cumsum(0),
    }


def randomise_norms(network, seed=1):
    """Give every norm running statistics and an affine map that are not the identity."""
    g = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean") or ("norm" in name and name.endswith("bias")):
            value.copy_(torch.randn(value.shape, generator=g) * 0.1)
        elif name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=g) + 0.5)


def only(batch, scan):
    """One scan of a batch, alone."""
    ends = [0, *batch["offset"].tolist()]
    rows = slice(ends[scan], ends[scan + 1])
    alone = {k: v[rows] for k, v in batch.items() if k != "offset"}
    return {**alone, "offset": torch.tensor([ends[scan + 1] - ends[scan]])}
