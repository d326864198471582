"""Sparse U-Net: keys, counts, a dense forward, and what a user may rely on."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import SpUNetBase

from .clouds import cloud, only, randomise_norms

SMALL = {
    "in_channels": 4,
    "num_classes": 3,
    "base_channels": 8,
    "channels": (8, 12, 16, 16, 16, 12, 8, 8),
    "layers": (1, 2, 1, 1, 1, 1, 2, 1),
}
DEFAULT = {
    "in_channels": 4,
    "num_classes": 19,
    "base_channels": 32,
    "channels": (32, 64, 128, 256, 256, 128, 96, 96),
    "layers": (2, 3, 4, 6, 2, 2, 2, 2),
}


def small(**changes):
    torch.manual_seed(0)
    network = SpUNetBase(**{**SMALL, **changes})
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() == 5:
                # The initial weights are so small that most of the network would not show in a comparison.
                p.normal_(std=(p.shape[4] * 2) ** -0.5)
            elif name.startswith(("enc", "dec")) and name.endswith("bias"):
                p.normal_(std=0.1)
    randomise_norms(network)
    return network


def table(c):
    out = {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            out[f"{name}.{leaf}"] = (width,)
        out[f"{name}.num_batches_tracked"] = ()

    def blocks(name, width, depth, first):
        for i in range(depth):
            came = first if i == 0 else width
            if came != width:
                out[f"{name}.block{i}.proj.0.weight"] = (width, 1, 1, 1, came)
                norm(f"{name}.block{i}.proj.1", width)
            out[f"{name}.block{i}.conv1.weight"] = (width, 3, 3, 3, came)
            norm(f"{name}.block{i}.bn1", width)
            out[f"{name}.block{i}.conv2.weight"] = (width, 3, 3, 3, width)
            norm(f"{name}.block{i}.bn2", width)

    base, ch, layers = c["base_channels"], c["channels"], c["layers"]
    out["conv_input.0.weight"] = (base, 5, 5, 5, c["in_channels"])
    norm("conv_input.1", base)
    for s in range(4):
        finer = ch[s - 1] if s else base
        out[f"down.{s}.0.weight"] = (ch[s], 2, 2, 2, finer)
        norm(f"down.{s}.1", ch[s])
        blocks(f"enc.{s}", ch[s], layers[s], ch[s])
        out[f"up.{s}.0.weight"] = (ch[7 - s], 2, 2, 2, ch[6 - s])
        norm(f"up.{s}.1", ch[7 - s])
        blocks(f"dec.{s}", ch[7 - s], layers[7 - s], ch[7 - s] + finer)
    out["final.weight"], out["final.bias"] = (c["num_classes"], 1, 1, 1, ch[7]), (c["num_classes"],)
    return out


@pytest.mark.parametrize(
    ("given", "full"), [({"in_channels": 4, "num_classes": 19}, DEFAULT), (SMALL, SMALL)]
)
def test_keys_and_shapes(given, full):
    with torch.device("meta"):
        network = SpUNetBase(**given)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == table(full)


def test_published_counts():
    with torch.device("meta"):
        network = SpUNetBase(4, 19)
    assert sum(p.numel() for p in network.parameters()) == 39_149_747
    assert len(network.state_dict()) == 356


def test_initial_weights():
    network = SpUNetBase(4, 3)
    assert network.enc[1].block0.conv1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (network.final.bias == 0).all()
    down = network.down[2][0].weight
    assert down.abs().max() <= (64 * 8) ** -0.5
    assert down.std().item() == pytest.approx((64 * 8) ** -0.5 / 3**0.5, rel=0.05)


def dense_forward(state, config, cells, feat, side):
    """The same network on dense grids, masked to the occupied cells of each level, in evaluation."""

    def kernel(name):
        weight = state[f"{name}.weight"]
        if weight.shape[1:4] == (1, 1, 1):  # spconv reads such a weight's memory as (in, out)
            weight = weight.reshape(weight.shape[4], weight.shape[0]).t().reshape(weight.shape)
        return weight.permute(0, 4, 1, 2, 3)

    def norm(name, x):
        shape = (1, -1, 1, 1, 1)
        x = (x - state[f"{name}.running_mean"].view(shape)) / (
            state[f"{name}.running_var"].view(shape) + 1e-3
        ).sqrt()
        return x * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)

    def stage(name, depth, x, mask):
        for i in range(depth):
            block = f"{name}.block{i}"
            y = mask * F.relu(
                norm(f"{block}.bn1", F.conv3d(x, kernel(f"{block}.conv1"), padding=1))
            )
            y = norm(f"{block}.bn2", F.conv3d(y, kernel(f"{block}.conv2"), padding=1))
            if f"{block}.proj.0.weight" in state:
                x = norm(f"{block}.proj.1", F.conv3d(x, kernel(f"{block}.proj.0")))
            x = mask * F.relu(x + y)
        return x

    x, y, z = cells.unbind(1)
    grid = feat.new_zeros(1, feat.shape[1], side, side, side)
    grid[0, :, x, y, z] = feat.t()
    mask = feat.new_zeros(1, 1, side, side, side)
    mask[0, 0, x, y, z] = 1
    grid = mask * F.relu(norm("conv_input.1", F.conv3d(grid, kernel("conv_input.0"), padding=2)))
    skips, masks = [grid], [mask]
    for s in range(4):
        mask = F.max_pool3d(mask, 2)
        grid = mask * F.relu(norm(f"down.{s}.1", F.conv3d(grid, kernel(f"down.{s}.0"), stride=2)))
        grid = stage(f"enc.{s}", config["layers"][s], grid, mask)
        skips.append(grid)
        masks.append(mask)
    for s in (3, 2, 1, 0):
        up = F.conv_transpose3d(grid, kernel(f"up.{s}.0").transpose(0, 1), stride=2)
        up = masks[s] * F.relu(norm(f"up.{s}.1", up))
        grid = stage(f"dec.{s}", config["layers"][7 - s], torch.cat([up, skips[s]], 1), masks[s])
    grid = F.conv3d(grid, kernel("final"), state["final.bias"])
    return grid[0, :, x, y, z].t()


def test_dense_forward():
    network = small().double().eval()
    batch = cloud([150], high=16, dtype=torch.float64)
    expected = dense_forward(network.state_dict(), SMALL, batch["grid_coord"], batch["feat"], 16)
    made = network(batch)
    assert expected.std() > 0.01
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)


def test_output_widths_and_encoder_mode():
    batch = cloud([40, 30, 0])
    assert small()(batch).shape == (70, 3)
    assert small(num_classes=0)(batch).shape == (70, 8)
    network = small(enc_mode=True).eval()
    assert network(batch).shape == (3, 3)
    assert not any(k.startswith(("up", "dec")) for k in network.state_dict())
    assert torch.allclose(network(batch)[1:2], network(only(batch, 1)), atol=1e-5)
    assert small(cls_mode=True, num_classes=-1)(batch).shape == (3, 16)


def test_evaluation():
    network = small().eval()
    batch = cloud([60, 1, 40])
    together = network(batch)
    assert torch.equal(together, network(batch))
    assert torch.allclose(network(only(batch, 2)), together[61:], atol=1e-5)
    p = torch.cat([torch.randperm(60), torch.tensor([60]), 61 + torch.randperm(40)])
    mixed = {k: v if k == "offset" else v[p] for k, v in batch.items()}
    assert torch.allclose(network(mixed), together[p], atol=1e-5)


def test_training():
    network = small().train()
    out = network(cloud([90, 70]))
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad.abs().max() > 0, name
    network(cloud([1])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_autocast():
    network, batch = small().eval(), cloud([60])
    exact = network(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(batch)
    assert (made - exact).abs().max() < 0.2 * exact.abs().max()


def test_registration_and_bad_input():
    assert MODELS.get("SpUNet-v1m1") is MODELS.get("kd.SpUNet-v1m1") is SpUNetBase
    with pytest.raises(InputError, match="equally many entries"):
        small(layers=(1, 1))
    with pytest.raises(InputError, match="in_channels=4 but `feat` has 2 columns"):
        small()(cloud([5], channels=2))
    with pytest.raises(InputError, match="no points"):
        small()(cloud([0]))
