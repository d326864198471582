"""Point Transformer V3: keys, counts, an independent plain forward, and what a user may rely on."""

import pytest
import torch
import torch.nn.functional as F

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.host.point import Point
from pointcept_kd.networks import DefaultSegmentorV2, PointTransformerV3
from pointcept_kd.networks.layers import BatchNorm, DropPath, ramp
from pointcept_kd.ops.curves import encode

from .clouds import cloud, only, randomise_norms

ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
SMALL = {
    "in_channels": 4,
    "order": ORDERS,
    "stride": (2, 2),
    "enc_depths": (1, 2, 2),
    "enc_channels": (8, 8, 16),
    "enc_num_head": (1, 2, 4),
    "enc_patch_size": (16, 16, 16),
    "dec_depths": (2, 1),
    "dec_channels": (12, 16),
    "dec_num_head": (2, 4),
    "dec_patch_size": (8, 16),  # not the encoder's: the kept patches must tell them apart
    "drop_path": 0.0,
}
STUDENT = {
    "in_channels": 4,
    "order": ORDERS,
    "enc_depths": (1, 1, 1, 2, 1),
    "enc_channels": (16, 16, 32, 64, 128),
    "enc_num_head": (1, 1, 2, 4, 8),
    "enc_patch_size": (1024,) * 5,
    "dec_depths": (1, 1, 1, 1),
    "dec_channels": (64, 64, 128, 128),
    "dec_num_head": (2, 2, 4, 8),
    "dec_patch_size": (1024,) * 4,
    "drop_path": 0.15,
}


def small(**changes):
    torch.manual_seed(0)
    network = PointTransformerV3(**{**SMALL, **changes})
    randomise_norms(network)
    return network


def on_paper(config, head=None):
    with torch.device("meta"):
        backbone = PointTransformerV3(**config)
        return backbone if head is None else DefaultSegmentorV2(head, 64, backbone)


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------ keys, shapes and counts


def table(c):
    """Every state-dict entry and its shape, from the published layout."""
    out = {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            out[f"{name}.{leaf}"] = (width,)
        out[f"{name}.num_batches_tracked"] = ()

    def line(name, to, *back):
        out[f"{name}.weight"], out[f"{name}.bias"] = (to, *back), (to,)

    def block(name, w, h):
        line(f"{name}.cpe.0", w, 3, 3, 3, w)
        line(f"{name}.cpe.1", w, w)
        for leaf in ("cpe.2", "norm1.0", "norm2.0"):
            line(f"{name}.{leaf}", w)
        line(f"{name}.attn.qkv", 3 * w, w)
        line(f"{name}.attn.proj", w, w)
        line(f"{name}.mlp.0.fc1", h * w, w)
        line(f"{name}.mlp.0.fc2", w, h * w)

    enc, dec = c["enc_channels"], c["dec_channels"]
    out["embedding.stem.conv.weight"] = (enc[0], 5, 5, 5, c["in_channels"])
    norm("embedding.stem.norm", enc[0])
    for s, depth in enumerate(c["enc_depths"]):
        if s:
            line(f"enc.enc{s}.down.proj", enc[s], enc[s - 1])
            norm(f"enc.enc{s}.down.norm.0", enc[s])
        for i in range(depth):
            block(f"enc.enc{s}.block{i}", enc[s], 4)
    for s, depth in enumerate(c["dec_depths"]):
        coarse = enc[-1] if s == len(dec) - 1 else dec[s + 1]
        line(f"dec.dec{s}.up.proj.0", dec[s], coarse)
        norm(f"dec.dec{s}.up.proj.1", dec[s])
        line(f"dec.dec{s}.up.proj_skip.0", dec[s], enc[s])
        norm(f"dec.dec{s}.up.proj_skip.1", dec[s])
        for i in range(depth):
            block(f"dec.dec{s}.block{i}", dec[s], 4)
    return out


DEFAULT = {
    "in_channels": 4,
    "enc_depths": (2, 2, 2, 6, 2),
    "enc_channels": (32, 64, 128, 256, 512),
    "dec_depths": (2, 2, 2, 2),
    "dec_channels": (64, 64, 128, 256),
}


@pytest.mark.parametrize(
    ("given", "full"), [({"in_channels": 4}, DEFAULT), (SMALL, SMALL), (STUDENT, STUDENT)]
)
def test_keys_and_shapes(given, full):
    made = {k: tuple(v.shape) for k, v in on_paper(given).state_dict().items()}
    assert made == table(full)


def test_registration_order():
    backbone = on_paper({"in_channels": 4})
    assert [n for n, _ in backbone.named_children()] == ["embedding", "enc", "dec"]
    assert [n for n, _ in backbone.dec.named_children()] == ["dec3", "dec2", "dec1", "dec0"]
    assert [n for n, _ in backbone.enc.enc1.named_children()] == ["down", "block0", "block1"]
    assert [n for n, _ in backbone.dec.dec0.named_children()] == ["up", "block0", "block1"]
    with_parameters = [n for n, m in backbone.enc.enc0.block0.named_children() if count(m)]
    assert with_parameters == ["cpe", "norm1", "attn", "norm2", "mlp"]


def test_published_counts():
    teacher = on_paper({"in_channels": 4}, head=19)
    assert (count(teacher), len(teacher.state_dict())) == (46_159_507, 488)
    assert count(teacher.backbone) == 46_158_272
    student = on_paper(STUDENT)
    assert count(student) == 2_776_304
    with torch.device("meta"):
        assert count(DefaultSegmentorV2(16, 64, student)) == 2_777_344
    assert count(on_paper({"in_channels": 4}, head=16)) == 46_159_312
    expected = {
        "teacher": (
            83_008,
            332_096,
            1_323_648,
            15_788_288,
            21_121_536,
            5_449_728,
            1_364_992,
            342_528,
            336_384,
        ),
        "student": (10_512, 10_816, 42_112, 332_096, 666_112, 682_880, 678_784, 174_528, 170_432),
    }
    for name, network in (("teacher", teacher.backbone), ("student", student)):
        stages = [*network.enc, *network.dec]
        assert tuple(count(s) for s in stages) == expected[name]
    assert (count(teacher.backbone.embedding), count(student.embedding)) == (16_064, 8_032)


@pytest.mark.parametrize("width", [16, 64, 512])
def test_closed_form_of_a_block(width):
    with torch.device("meta"):
        network = PointTransformerV3(
            stride=(),
            enc_depths=(1,),
            enc_channels=(width,),
            enc_num_head=(1,),
            enc_patch_size=(8,),
            enc_mode=True,
        )
    assert count(network.enc.enc0.block0) == 40 * width**2 + 17 * width


def test_relative_positions_add_a_table():
    network = small(enable_rpe=True)
    bound = int((4 * 16) ** (1 / 3) * 2)
    assert network.enc.enc2.block0.attn.rpe.rpe_table.shape == (3 * (2 * bound + 1), 4)
    batch = cloud([70, 20])
    before = network.eval()(batch).feat
    with torch.no_grad():
        network.dec.dec0.block0.attn.rpe.rpe_table.normal_()
    assert not torch.allclose(network(batch).feat, before)


def test_drop_path_ramps():
    network = on_paper({"in_channels": 4})
    drops = [m.probability for m in network.modules() if isinstance(m, DropPath)]
    enc = [0.3 * i / 13 for i in range(14)]
    dec = [0.3 * i / 7 for i in (7, 6, 5, 4, 3, 2, 1, 0)]
    assert drops == pytest.approx(enc + dec)
    assert ramp(0.3, 1) == [0.0]


# ------------------------------------------------------------------ arithmetic


def dense_conv(cells, x, weight, bias=None):
    """Convolution on a dense grid, read at the voxels."""
    side = int(cells.max()) + 1
    grid = x.new_zeros(x.shape[1], side, side, side)
    grid[:, cells[:, 0], cells[:, 1], cells[:, 2]] = x.t()
    out = F.conv3d(grid[None], weight.permute(0, 4, 1, 2, 3), bias, padding=weight.shape[1] // 2)[0]
    return out[:, cells[:, 0], cells[:, 1], cells[:, 2]].t()


class Plain:
    """The network of one scan in evaluation, read from the paper and a state dict, with loops and dense grids."""

    def __init__(self, state, config, legacy):
        self.state, self.config, self.legacy = state, config, legacy

    def line(self, name, x):
        return x @ self.state[f"{name}.weight"].t() + self.state[f"{name}.bias"]

    def layer_norm(self, name, x):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def batch_norm(self, name, x):
        x = (x - self.state[f"{name}.running_mean"]) / (
            self.state[f"{name}.running_var"] + 1e-3
        ).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name, x, order, heads, size):
        n, width = x.shape
        q, k, v = (t.view(n, heads, -1) for t in self.line(f"{name}.qkv", x).split(width, 1))
        out = torch.zeros_like(q)
        if n <= size:
            patches = [(order, n)]
        else:
            patches = []
            for start in range(0, n, size):
                own = order[start : start + size]
                patches.append(
                    (
                        own + order[start - (size - len(own)) : start] if len(own) < size else own,
                        len(own),
                    )
                )
        for rows, own in patches:
            for h in range(heads):
                logits = q[rows[:own], h] @ k[rows, h].t() * q.shape[2] ** -0.5
                out[rows[:own], h] = logits.exp() / logits.exp().sum(1, keepdim=True) @ v[rows, h]
        return self.line(f"{name}.proj", out.reshape(n, width))

    def block(self, name, level, heads, size, number):
        s, x = self.state, level["feat"]
        y = dense_conv(
            level["cells"], level["sparse"], s[f"{name}.cpe.0.weight"], s[f"{name}.cpe.0.bias"]
        )
        x = x + self.layer_norm(f"{name}.cpe.2", self.line(f"{name}.cpe.1", y))
        order = level["orders"][number % len(level["orders"])]
        x = x + self.attention(
            f"{name}.attn", self.layer_norm(f"{name}.norm1.0", x), order, heads, size
        )
        hidden = F.gelu(self.line(f"{name}.mlp.0.fc1", self.layer_norm(f"{name}.norm2.0", x)))
        branch = self.line(f"{name}.mlp.0.fc2", hidden)
        level["feat"] = x + branch
        level["sparse"] = branch if self.legacy else level["feat"]

    def level(self, cells, feat, depth):
        orders = [
            torch.argsort(encode(cells, None, depth, o)).tolist() for o in self.config["order"]
        ]
        return {"cells": cells, "feat": feat, "sparse": feat, "orders": orders}

    def __call__(self, cells, feat):
        c = self.config
        stem = dense_conv(cells, feat, self.state["embedding.stem.conv.weight"])
        bits = int(cells.max() + 1).bit_length()
        levels = [self.level(cells, F.gelu(self.batch_norm("embedding.stem.norm", stem)), bits)]
        inverses = []
        for s, depth in enumerate(c["enc_depths"]):
            if s:
                fine = levels[-1]
                coarse, inverse = torch.unique(fine["cells"] // 2, dim=0, return_inverse=True)
                x = self.line(f"enc.enc{s}.down.proj", fine["feat"])
                x = torch.stack([x[inverse == j].max(0).values for j in range(len(coarse))])
                levels.append(
                    self.level(
                        coarse, F.gelu(self.batch_norm(f"enc.enc{s}.down.norm.0", x)), bits - s
                    )
                )
                inverses.append(inverse)
            for i in range(depth):
                heads, size = c["enc_num_head"][s], c["enc_patch_size"][s]
                self.block(f"enc.enc{s}.block{i}", levels[-1], heads, size, i)
        for s in reversed(range(len(c["dec_depths"]))):
            name, below, here = f"dec.dec{s}.up", levels.pop(), levels[-1]
            up = F.gelu(
                self.batch_norm(f"{name}.proj.1", self.line(f"{name}.proj.0", below["feat"]))
            )
            skip = F.gelu(
                self.batch_norm(
                    f"{name}.proj_skip.1", self.line(f"{name}.proj_skip.0", here["feat"])
                )
            )
            here["feat"], here["sparse"] = skip + up[inverses[s]], skip
            for i in range(c["dec_depths"][s]):
                self.block(
                    f"dec.dec{s}.block{i}", here, c["dec_num_head"][s], c["dec_patch_size"][s], i
                )
        return levels[0]["feat"]


@pytest.mark.parametrize(
    ("order", "legacy"),
    [(("z", "hilbert-trans"), False), (("hilbert", "z-trans"), True), (("hilbert",), False)],
)
def test_independent_plain_forward(order, legacy):
    """Codes of pooled levels come from shifting; the plain network encodes each level anew."""
    changes = {"order": order, "legacy_cpe": legacy}
    network = small(**changes).double().eval()
    batch = cloud([90], high=7, dtype=torch.float64)
    expected = Plain(network.state_dict(), {**SMALL, **changes}, legacy)(
        batch["grid_coord"], batch["feat"]
    )
    made = network(batch).feat
    assert torch.allclose(made, expected, atol=1e-9, rtol=0)


def test_legacy_flow_is_another_network():
    batch = cloud([90])
    new, old = small().eval(), small(legacy_cpe=True).eval()
    old.load_state_dict(new.state_dict())
    assert (new(batch).feat - old(batch).feat).abs().max() > 0.01


def test_post_norm_runs():
    batch = cloud([50])
    pre, post = small().eval(), small(pre_norm=False).eval()
    post.load_state_dict(pre.state_dict())
    assert not torch.allclose(pre(batch).feat, post(batch).feat)


# ------------------------------------------------------------------ what a user may rely on


def test_rows_in_input_order_and_untouched_batch():
    batch = cloud([80, 1, 30])
    copy = {k: v.clone() for k, v in batch.items()}
    out = small().eval()(batch)
    assert isinstance(out, Point)
    assert out.feat.shape == (111, 12)
    assert torch.equal(out.grid_coord, batch["grid_coord"])
    assert "pooling_parent" not in out
    assert batch.keys() == copy.keys()
    assert all(torch.equal(batch[k], copy[k]) for k in copy)


def test_evaluation_is_deterministic():
    network, batch = small().eval(), cloud([80, 30])
    assert torch.equal(network(batch).feat, network(batch).feat)


def test_orders_are_shuffled_in_training_only():
    batch = cloud([20])
    tiny = {"enc_depths": (1, 1, 1), "enc_mode": True}
    network = small(**tiny)

    def orders():
        points = [network(batch) for _ in range(6)]
        return {tuple(p.order) for p in points} | {tuple(p.pooling_parent.order) for p in points}

    assert len(orders()) > 3
    network.eval()
    assert orders() == {ORDERS}
    network = small(**tiny, shuffle_orders_in_eval=True).eval()
    assert len(orders()) > 3
    network = small(**tiny, shuffle_orders=False)
    assert orders() == {ORDERS}


@pytest.mark.parametrize("seed", [0, 1])
def test_scans_of_a_batch_do_not_see_each_other(seed):
    network = small().eval()
    batch = cloud([80, 1, 7, 45], seed=seed)
    together = network(batch).feat
    ends = [0, *batch["offset"].tolist()]
    for scan in range(4):
        alone = network(only(batch, scan)).feat
        assert torch.allclose(alone, together[ends[scan] : ends[scan + 1]], atol=1e-5)


def test_row_order_does_not_matter():
    network = small().eval()
    batch = cloud([80, 40])
    p = torch.cat([torch.randperm(80), 80 + torch.randperm(40)])
    mixed = {k: v if k == "offset" else v[p] for k, v in batch.items()}
    assert torch.allclose(network(mixed).feat, network(batch).feat[p], atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_gradient_reaches_every_parameter(legacy):
    network = small(legacy_cpe=legacy, enable_rpe=True).train()
    out = network(cloud([90, 40])).feat
    (out * torch.randn_like(out)).sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_one_point_scans_train():
    batch = cloud([1])
    network = small().train()
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    network(batch).feat.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
    after = network.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before), (
        "one row says nothing about statistics"
    )
    out = small().train()(cloud([1, 1])).feat
    assert torch.isfinite(out).all()


def test_single_row_norm():
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm1d(3).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    row = torch.randn(1, 3)
    assert torch.equal(ours(row), theirs(row))
    rows = torch.randn(5, 3)
    assert torch.equal(ours(rows), theirs.train()(rows))


def test_duplicate_voxels_and_an_empty_last_sample():
    batch = cloud([60, 40])
    batch["grid_coord"][10:30] = batch["grid_coord"][30:50]
    batch["offset"] = torch.tensor([60, 100, 100])
    network = small().train()
    out = network(batch)
    out.feat.sum().backward()
    assert torch.isfinite(out.feat).all()
    assert out.offset.tolist() == [60, 100, 100]


def test_encoder_mode():
    network = small(enc_mode=True).eval()
    assert not any(k.startswith("dec") for k in network.state_dict())
    batch = cloud([80, 30, 0])
    point = network(batch)
    sizes = [len(point.feat)]
    while "pooling_parent" in point:
        parent, inverse = point.pooling_parent, point.pooling_inverse
        assert torch.equal(parent.grid_coord >> 1, point.grid_coord[inverse])
        assert torch.equal(parent.batch, point.batch[inverse])
        mean = torch.stack([parent.coord[inverse == j].mean(0) for j in range(len(point.feat))])
        assert torch.allclose(point.coord, mean, atol=1e-6)
        assert point.offset.tolist()[1:] == [len(point.feat)] * 2
        assert point.serialized_depth == parent.serialized_depth - 1
        for code, order, inv in zip(
            point.serialized_code, point.serialized_order, point.serialized_inverse
        ):
            assert (code[order].diff() > 0).all()
            assert torch.equal(order[inv], torch.arange(len(order)))
        point = parent
        sizes.append(len(point.feat))
    assert sizes == sorted(sizes)
    assert len(sizes) == 3
    assert torch.equal(point.grid_coord, batch["grid_coord"])
    assert small(cls_mode=True).enc_mode is True


def test_pooling_stops_where_no_bits_are_left():
    batch = cloud([8], high=2)
    network = small(stride=(8, 2), enc_mode=True).eval()
    assert len(network(batch).pooling_parent.feat) == 8, "depth 2 has no 3 levels to drop"


def test_autocast():
    network, batch = small().eval(), cloud([70, 20])
    exact = network(batch).feat
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = network(batch).feat
    assert made.dtype in (torch.bfloat16, torch.float32)
    assert (made - exact).abs().max() < 0.2 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network.train()(batch).feat.float().sum()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


def test_prompt_driven_norm():
    network = small(
        pdnorm_bn=True, pdnorm_ln=True, pdnorm_adaptive=True, pdnorm_conditions=("A", "B")
    )
    keys = network.state_dict().keys()
    for key in (
        "embedding.stem.norm.norm.1.running_var",
        "enc.enc1.down.norm.0.norm.0.weight",
        "enc.enc0.block0.cpe.2.norm.1.bias",
        "dec.dec0.block0.norm1.0.norm.0.weight",
        "dec.dec0.up.proj.1.modulation.1.weight",
    ):
        assert key in keys
    network.eval()
    with torch.no_grad():
        network.dec.dec0.block0.norm1[0].norm[1].weight.mul_(3)
    batch = {**cloud([50]), "context": torch.randn(1, 256)}
    a = network({**batch, "condition": "A"}).feat
    b = network({**batch, "condition": ["B"]}).feat
    assert not torch.allclose(a, b)
    assert not torch.allclose(
        a, network({**batch, "condition": "A", "context": torch.randn(1, 256)}).feat
    )
    with pytest.raises(InputError, match="condition 'C'.*A, B"):
        network({**batch, "condition": "C"})
    with pytest.raises(InputError, match="condition None"):
        network(batch)
    batch.pop("context")
    with pytest.raises(InputError, match="context"):
        network({**batch, "condition": "A"})
    one = small(pdnorm_bn=True, pdnorm_decouple=False, pdnorm_affine=False)
    assert "embedding.stem.norm.norm.running_mean" in one.state_dict()
    assert "embedding.stem.norm.norm.weight" not in one.state_dict()
    assert one(cloud([30])).feat.shape == (30, 12)


def test_registered_under_the_published_name():
    assert MODELS.get("PT-v3m1") is MODELS.get("kd.PT-v3m1") is PointTransformerV3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": ("z", "z_trans")}, "z_trans.*choose one or more of z, z-trans"),
        ({"order": ()}, "choose one or more"),
        ({"enc_depths": (1, 1)}, "enc_depths.*expected 3 entries"),
        ({"dec_patch_size": (16,)}, "dec_patch_size.*expected 2 entries"),
        ({"stride": (3, 2)}, "power of two"),
        ({"enc_num_head": (3, 2, 4)}, "8 is not divisible by its 3 heads"),
    ],
)
def test_bad_arguments(changes, words):
    with pytest.raises(InputError, match=words):
        small(**changes)


def test_bad_batches():
    network = small()
    with pytest.raises(InputError, match="in_channels=4 but `feat` has 3 columns"):
        network(cloud([5], channels=3))
    batch = cloud([5])
    batch.pop("feat")
    with pytest.raises(InputError, match="no `feat`"):
        network(batch)
    with pytest.raises(InputError, match="no points"):
        network(cloud([0]))
