"""The completion networks: sizes, worked values, a formulation in plain loops, and what callers may rely on."""

import itertools
import math

import numpy as np
import pytest
import torch

from pointcept_kd.host import MODELS, InputError
from pointcept_kd.networks import condition as condition_module
from pointcept_kd.networks.condition import Condition, time_embedding, voxelise
from pointcept_kd.networks.denoiser import PLACES, ConditionEncoder, Denoiser, Refiner

MICRO = 1 / 16  # widths 2, 2, 4, 8, 16, 16, 8, 6, 6
TIMES = torch.tensor([999, 3])


def cloud(sizes, seed=0, spread=1.5, dtype=torch.float32):
    """Scans with a dense half around a few places, so that cells have neighbours, and a sparse one."""
    g = torch.Generator().manual_seed(seed)
    scans = []
    for size in sizes:
        centres = (torch.rand(4, 3, generator=g, dtype=dtype) - 0.5) * 2 * spread
        near = centres[torch.arange(size) % 4]
        reach = torch.where(torch.arange(size) % 3 == 0, spread, 0.12)[:, None]
        scans.append(near + (torch.rand(size, 3, generator=g, dtype=dtype) - 0.5) * 2 * reach)
    return torch.cat(scans), torch.tensor(sizes).cumsum(0)


def randomise(network, seed=0):
    """Statistics, shifts and gates far from the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=g, dtype=value.dtype) + 0.5)
            elif name.endswith(("running_mean", "bn.bias", "bn.weight")):
                value.add_(torch.randn(value.shape, generator=g, dtype=value.dtype) * 0.2)
            elif value.dim() > 1:
                # The initial weights are so small that most of the network would not show in a comparison.
                width = value.shape[-1] * (2 if value.dim() == 5 else 1)
                value.copy_(torch.randn(value.shape, generator=g, dtype=value.dtype) * width**-0.5)
            elif name == "null":
                value.copy_(torch.randn(value.shape, generator=g, dtype=value.dtype))
    return network


def pair(dtype=torch.float64, **options):
    torch.manual_seed(0)
    common = {k: v for k, v in options.items() if k in ("normalisation", "freeze_bn")}
    encoder = randomise(ConditionEncoder(MICRO, **common), 1).to(dtype).eval()
    return encoder, randomise(Denoiser(MICRO, **options), 2).to(dtype).eval()


def scene(dtype=torch.float64, sizes=(70, 50), partial=(20, 14)):
    return *cloud(sizes, 3, dtype=dtype), *cloud(partial, 4, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("kind", "parameters", "entries"),
    [
        (ConditionEncoder, 8_497_952, 150),
        (Denoiser, 24_174_515, 394),
        (Refiner, 21_722_926, 298),
    ],
)
def test_published_sizes(kind, parameters, entries):
    with torch.device("meta"):
        network = kind()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    assert MODELS.get(f"kd.{kind.__name__}") is kind


def test_sizes_of_the_parts():
    with torch.device("meta"):
        network = Denoiser()

    def count(*names):
        return sum(p.numel() for k, p in network.named_parameters() if k.partition(".")[0] in names)

    parts = dict(
        stem=30_368, stage1=119_104, stage2=398_016, stage3=1_590_656, stage4=6_359_808,
        up1=8_588_288, up2=2_278_912, up3=1_190_016, up4=1_165_440, last=2_003,
    )  # fmt: skip
    assert {name: count(name) for name in parts} == parts
    gates = [
        f"{a}{q}{b}" for q in PLACES for a, b in (("latent_", ""), ("latemp_", ""), ("", "_temp"))
    ]
    assert count(*gates) == 2_451_904
    with torch.device("meta"):
        assert sum(p.numel() for p in Refiner().last.parameters()) == 2_318


def test_keys_are_the_published_ones():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Denoiser().state_dict().items()}
    expected = {
        "stem.0.weight": (32, 3, 3, 3, 3),
        "stem.4.bn.running_var": (32,),
        "stage2.0.net.0.weight": (32, 2, 2, 2, 32),
        "stage2.0.net.1.bn.weight": (32,),
        "stage2.1.net.3.weight": (64, 3, 3, 3, 64),
        "stage2.1.downsample.0.weight": (64, 32),
        "stage2.1.downsample.1.bn.num_batches_tracked": (),
        "up1.0.net.0.weight": (256, 2, 2, 2, 256),
        "up1.1.0.net.0.weight": (256, 3, 3, 3, 384),
        "up4.1.0.downsample.0.weight": (96, 128),
        "up4.1.1.net.4.bn.bias": (96,),
        "latent_stage3.2.weight": (256, 256),
        "latemp_up3.0.weight": (128, 512),
        "latemp_stage1.2.bias": (32,),
        "up2_temp.0.weight": (96, 96),
        "last.2.weight": (3, 20),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert "stage1.1.downsample.0.weight" not in shapes


# -------------------------------------------------------------------------------------------------------- worked values


def test_time_embedding():
    made = time_embedding(torch.tensor([1, 999]), 96)
    assert made.shape == (2, 96)
    hand = {
        (0, 0): 0.841470985, (0, 1): 0.732536900, (0, 48): 0.540302306, (0, 49): 0.680727330,
        (1, 0): -0.026460751, (1, 1): -0.953166240, (1, 48): 0.999649853, (1, 49): -0.302446883,
        (1, 47): 0.099733916, (1, 95): 0.995014144,
    }  # fmt: skip
    for place, value in hand.items():
        assert float(made[place]) == pytest.approx(value, abs=1e-8)
    assert math.asin(float(made[0, 1])) == pytest.approx(0.8220412615, abs=1e-9)
    assert time_embedding(torch.tensor([5]), 7)[0, 6] == 0


@pytest.mark.parametrize(("scale", "value"), [(6.0, 13.0), (3.5, 8.0), (1.0, 3.0), (0.0, 1.0)])
def test_guidance_by_hand(monkeypatch, scale, value):
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    monkeypatch.setattr(denoiser, "_gate", lambda voxels, condition, gates: condition is None)
    monkeypatch.setattr(
        denoiser, "_after_stem", lambda stem, null, v, x: torch.full_like(x, 1.0 if null else 3.0)
    )
    made = denoiser.guided(x, offset, TIMES, encoder(c, c_offset), scale)
    assert torch.equal(made, torch.full_like(x, value))


def test_cells_by_hand():
    # Half to even, on both sides of zero; the mean is of the raw coordinates.
    points = torch.tensor([[0.25, 0.75, 1.25], [-0.25, -0.75, -1.25], [0.2, 0.9, 1.1]])
    made = voxelise(points, torch.tensor([3]), 0.5)
    assert made.tensor.indices.tolist() == [[0, 0, -2, -2], [0, 0, 2, 2]]
    assert made.inverse.tolist() == [1, 0, 1]
    assert torch.allclose(made.tensor.features[1], torch.tensor([0.225, 0.825, 1.175]))


def test_coarse_cells_round_down():
    encoder, _ = pair()
    point = torch.tensor([[-1.0, -17.0, 17.0]]) * 0.05
    made = encoder(point, torch.tensor([1]))
    assert made.cells.tolist() == [[0, -16, -32, 16]]
    levels = encoder._encode(encoder._stem(encoder.voxelise(point, torch.tensor([1]))))
    corners = [(level.indices[0, 1:] * 2**i).tolist() for i, level in enumerate(levels)]
    assert [c[0] for c in corners] == [-1, -2, -4, -8, -16]
    assert [c[1] for c in corners] == [-17, -18, -20, -24, -32]


# --------------------------------------------------------------------------------------------------------- plain loops


class Plain:
    """One scan through the networks: dicts from cells to vectors, loops over taps, a gate for every row."""

    def __init__(self, state):
        self.state = {k: v.double().numpy() for k, v in state.items()}

    def norm(self, name, cells):
        s = {
            k: self.state[f"{name}.bn.{k}"]
            for k in ("running_mean", "running_var", "weight", "bias")
        }
        scale = s["weight"] / np.sqrt(s["running_var"] + 1e-5)
        return {u: (f - s["running_mean"]) * scale + s["bias"] for u, f in cells.items()}

    def same(self, name, cells):
        weight, out = self.state[f"{name}.weight"], {}
        for u in cells:
            total = 0
            for o in itertools.product((-1, 0, 1), repeat=3):
                v = tuple(a + b for a, b in zip(u, o))
                if v in cells:
                    total = total + weight[:, o[0] + 1, o[1] + 1, o[2] + 1] @ cells[v]
            out[u] = total
        return out

    def down(self, name, cells):
        weight, out = self.state[f"{name}.weight"], {}
        for u, f in cells.items():
            p = tuple(math.floor(a / 2) for a in u)
            i, j, k = (a - 2 * b for a, b in zip(u, p))
            out[p] = out.get(p, 0) + weight[:, i, j, k] @ f
        return out

    def up(self, name, cells, fine):
        weight, out = self.state[f"{name}.weight"], {}
        for u in fine:
            p = tuple(math.floor(a / 2) for a in u)
            i, j, k = (a - 2 * b for a, b in zip(u, p))
            out[u] = weight[:, i, j, k] @ cells[p]
        return out

    def relu(self, cells):
        return {u: np.maximum(f, 0) for u, f in cells.items()}

    def residual(self, name, cells):
        out = self.relu(self.norm(f"{name}.net.1", self.same(f"{name}.net.0", cells)))
        out = self.norm(f"{name}.net.4", self.same(f"{name}.net.3", out))
        if f"{name}.downsample.0.weight" in self.state:
            matrix = self.state[f"{name}.downsample.0.weight"]
            cells = self.norm(f"{name}.downsample.1", {u: matrix @ f for u, f in cells.items()})
        return self.relu({u: f + cells[u] for u, f in out.items()})

    def mlp(self, name, vector, last=None):
        for layer in (0, 2):
            w, b = self.state[f"{name}.{layer}.weight"], self.state[f"{name}.{layer}.bias"]
            vector = w @ vector + b
            if layer == 0:
                vector = np.where(vector > 0, vector, 0.1 * vector)
        return vector

    def cells(self, points):
        groups = {}
        for p in points:
            groups.setdefault(tuple(int(v) for v in np.round(p / 0.05)), []).append(p)
        return {u: np.mean(ps, axis=0) for u, ps in groups.items()}

    def encode(self, cells, gate=lambda name, cells, stride: cells):
        x = self.relu(self.norm("stem.1", self.same("stem.0", cells)))
        levels = [self.relu(self.norm("stem.4", self.same("stem.3", x)))]
        for i in (1, 2, 3, 4):
            x = gate(f"stage{i}", levels[-1], 2 ** (i - 1))
            x = self.relu(self.norm(f"stage{i}.0.net.1", self.down(f"stage{i}.0.net.0", x)))
            levels.append(self.residual(f"stage{i}.2", self.residual(f"stage{i}.1", x)))
        return levels

    def decode(self, levels, gate=lambda name, cells, stride: cells):
        x = levels[4]
        for i in (1, 2, 3, 4):
            skip = levels[4 - i]
            x = gate(f"up{i}", x, 2 ** (5 - i))
            x = self.relu(self.norm(f"up{i}.0.net.1", self.up(f"up{i}.0.net.0", x, skip)))
            x = {u: np.concatenate([x[u], skip[u]]) for u in skip}
            x = self.residual(f"up{i}.1.1", self.residual(f"up{i}.1.0", x))
        return x

    def of_points(self, points, cells):
        return np.stack(
            [self.mlp("last", cells[tuple(int(v) for v in np.round(p / 0.05))]) for p in points]
        )


def plain_noise(denoiser, encoder, points, partial, t, centre=False, null=False):
    known = Plain(encoder.state_dict())
    told = {(0, 0, 0): np.zeros(3)} if null else known.cells(partial)
    coarse = {tuple(16 * a for a in u): f for u, f in known.encode(told)[4].items()}
    net = Plain(denoiser.state_dict())
    half = net.state["stage1_temp.0.weight"].shape[1] // 2
    angles = [t * 10000 ** (-k / (half - 1)) for k in range(half)]
    waves = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def gate(name, cells, stride):
        out = {}
        for u, f in cells.items():
            corner = [stride * a + (stride / 2 if centre else 0) for a in u]

            def order(v, corner=corner):
                place = [a + (8 if centre else 0) for a in v]
                return sum((a - b) ** 2 for a, b in zip(corner, place)), v

            g = net.mlp(f"latent_{name}", coarse[min(coarse, key=order)])
            h = net.mlp(f"{name}_temp", waves)
            both = np.concatenate([h, g] if name == "up1" else [g, h])
            out[u] = f * net.mlp(f"latemp_{name}", both)
        return out

    levels = net.encode(net.cells(points), gate)
    return net.of_points(points, net.decode(levels, gate))


@pytest.mark.parametrize("match", ["corner", "centre"])
@torch.no_grad()
def test_denoiser_against_plain_loops(match):
    encoder, denoiser = pair(match=match)
    x, offset, c, c_offset = scene()
    condition = encoder(c, c_offset)
    made = denoiser(x, offset, TIMES, condition)
    nothing = denoiser(x, offset, TIMES, condition.drop())
    begin = begin_c = 0
    for scan, (end, end_c) in enumerate(zip(offset.tolist(), c_offset.tolist())):
        points, partial = x[begin:end].numpy(), c[begin_c:end_c].numpy()
        t = int(TIMES[scan])
        expected = plain_noise(denoiser, encoder, points, partial, t, match == "centre")
        assert np.abs(made[begin:end].numpy() - expected).max() < 1e-9 * np.abs(expected).max()
        if scan == 1:
            expected = plain_noise(denoiser, encoder, points, partial, t, null=True)
            assert np.abs(nothing[begin:end].numpy() - expected).max() < 1e-9
        begin, begin_c = end, end_c
    assert (made - nothing).abs().max() > 1e-3 * made.abs().max()


@torch.no_grad()
def test_refiner_against_plain_loops():
    torch.manual_seed(0)
    refiner = randomise(Refiner(MICRO)).double().eval()
    x, offset = cloud([60], 5, dtype=torch.float64)
    made = refiner(x, offset)
    assert made.shape == (60, 6, 3)
    net = Plain(refiner.state_dict())
    expected = np.tanh(net.of_points(x.numpy(), net.decode(net.encode(net.cells(x.numpy())))))
    assert np.abs(made.flatten(1).numpy() - expected).max() < 1e-9
    assert 1e-3 < float(made.abs().max()) <= 1


# ------------------------------------------------------------------------------------------------------------- matching


def brute(cells, known, stride, match):
    """Row of the nearest, by all distances in plain integers; of equals the smallest cell."""
    found = []
    for scan, *u in cells.tolist():
        shift = (stride, 16) if match == "centre" else (0, 0)
        best = min(
            (sum((2 * stride * a + shift[0] - 2 * b - shift[1]) ** 2 for a, b in zip(u, v)), v, row)
            for row, (of, *v) in enumerate(known.tolist())
            if of == scan
        )
        found.append(best[2])
    return found


def lattice(seed=0, scans=2, count=40):
    g = torch.Generator().manual_seed(seed)
    cells = torch.randint(-3, 3, (count, 3), generator=g) * 16
    scan = torch.randint(0, scans, (count, 1), generator=g)
    # In any order: what is taken among equals depends on the cells alone.
    known = torch.cat((scan, cells), 1).unique(dim=0)
    return known[torch.randperm(len(known), generator=g)]


@pytest.mark.parametrize("stride", [1, 2, 8, 16])
@pytest.mark.parametrize("match", ["corner", "centre"])
def test_nearest_cell_with_ties(stride, match):
    known = lattice()
    g = torch.Generator().manual_seed(1)
    # Steps of 8 cells make many equal distances.
    u = torch.randint(-8, 8, (60, 3), generator=g) * max(1, 8 // stride)
    cells = torch.cat((torch.arange(60)[:, None] // 30, u), 1)
    told = Condition(known, torch.zeros(len(known), 4), 2, 0.05)
    expected = brute(cells, known, stride, match)
    assert told.rows_of(cells, stride, match).tolist() == expected
    dropped = told.drop(torch.tensor([False, True])).rows_of(cells, stride, match)
    assert dropped[:30].tolist() == expected[:30]
    assert dropped[30:].tolist() == [len(known) + 1] * 30


def test_both_searches_agree():
    g = torch.Generator().manual_seed(0)
    query = torch.randint(-50, 50, (3000, 3), generator=g) * 4
    support = (torch.randint(-6, 6, (400, 3), generator=g) * 32).unique(dim=0)
    tree = condition_module.cKDTree(support.double().numpy())
    found = condition_module._in_tree(query, tree)
    assert torch.equal(found, condition_module._in_blocks(query, support))
    squares = (query[:, None] - support[None]).square().sum(-1)
    tied = (squares == squares.amin(1, keepdim=True)).sum(1) > 1
    assert 100 < int(tied.sum()) < 2900
    # A sphere around a point: all equal, the first is taken.
    corners = torch.tensor(sorted(itertools.product((-5, 5), repeat=3)))
    sphere = condition_module.cKDTree(corners.double().numpy())
    middle = torch.zeros(1, 3, dtype=torch.int64)
    assert condition_module._in_tree(middle, sphere).tolist() == [0]
    assert condition_module._in_blocks(middle, corners).tolist() == [0]
    far = torch.tensor([[2**21, -(2**21), 2**21]])
    assert condition_module._in_tree(far, sphere).tolist() == [5]
    assert condition_module._in_blocks(far, corners).tolist() == [5]


def test_one_search_per_level(monkeypatch):
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    calls = []
    original = Condition.rows_of
    monkeypatch.setattr(
        Condition,
        "rows_of",
        lambda self, cells, s, m: calls.append(s) or original(self, cells, s, m),
    )
    denoiser.guided(x, offset, TIMES, encoder(c, c_offset), 3.5)
    assert sorted(calls) == [1, 2, 4, 8, 16]


# --------------------------------------------------------------------------------------------------------- equivalences


@torch.no_grad()
def test_gate_per_cell_is_the_gate_per_row():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    voxels = denoiser.voxelise(x, offset)
    gates = denoiser._gates(voxels, told, TIMES)
    levels = denoiser._encode(denoiser._stem(voxels))
    waves = time_embedding(TIMES, denoiser.widths[8])
    for name, (level, _, out) in PLACES.items():
        cells = levels[level].indices
        rows = told.rows_of(cells, 2**level, "corner")
        g = getattr(denoiser, f"latent_{name}")(told.features[rows])
        h = getattr(denoiser, f"{name}_temp")(waves)[cells[:, 0]]
        both = torch.cat((h, g) if name == "up1" else (g, h), 1)
        expected = getattr(denoiser, f"latemp_{name}")(both)
        assert expected.shape == (len(cells), denoiser.widths[out])
        assert torch.allclose(gates[name][rows], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("null", "training"), [("cloud", False), ("cloud", True), ("learned", False)]
)
@torch.no_grad()
def test_guidance_is_two_calls(null, training):
    encoder, denoiser = pair(null=null)
    denoiser.train(training)
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    one, none = denoiser(x, offset, TIMES, told), denoiser(x, offset, TIMES, told.drop())
    assert torch.allclose(none, denoiser(x, offset, TIMES, encoder.null(2))) or null == "learned"
    assert float((one - none).abs().max()) > 1e-3
    for scale, expected in ((3.5, none + 3.5 * (one - none)), (1.0, one), (0.0, none)):
        made = denoiser.guided(x, offset, TIMES, told, scale)
        assert torch.allclose(made, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_dropped_scans():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    made = denoiser(x, offset, TIMES, told.drop(torch.tensor([False, True])))
    assert torch.allclose(made[:70], denoiser(x, offset, TIMES, told)[:70], atol=1e-6)
    assert torch.allclose(made[70:], denoiser(x, offset, TIMES, told.drop())[70:], atol=1e-6)
    _, own = pair(null="learned")
    assert torch.allclose(own(x, offset, TIMES, None), own(x, offset, TIMES, told.drop()))


@torch.no_grad()
def test_row_order_and_batch():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    together = denoiser.guided(x, offset, TIMES, told, 3.5)
    p = torch.cat((torch.randperm(70), 70 + torch.randperm(50)))
    assert torch.allclose(denoiser.guided(x[p], offset, TIMES, told, 3.5), together[p], atol=1e-12)
    shuffled = encoder(c[torch.cat((torch.randperm(20), 20 + torch.randperm(14)))], c_offset)
    assert torch.equal(shuffled.cells, told.cells)
    assert torch.allclose(shuffled.features, told.features, atol=1e-12)
    for scan, (rows, of) in enumerate(((slice(70), slice(20)), (slice(70, 120), slice(20, 34)))):
        part, of_part = x[rows], c[of]
        alone = encoder(of_part, torch.tensor([len(of_part)]))
        made = denoiser.guided(part, torch.tensor([len(part)]), TIMES[scan : scan + 1], alone, 3.5)
        assert torch.allclose(made, together[rows], atol=1e-12)
    # The other order of the scans.
    turned = torch.cat((x[70:], x[:70]))
    told = encoder(torch.cat((c[20:], c[:20])), torch.tensor([14, 34]))
    made = denoiser.guided(turned, torch.tensor([50, 120]), TIMES.flip(0), told, 3.5)
    assert torch.allclose(made, torch.cat((together[70:], together[:70])), atol=1e-12)


@pytest.mark.parametrize("kind", ["instance", "group"])
def test_norms_of_one_scan(kind):
    encoder, denoiser = pair(normalisation=kind)
    encoder.train(), denoiser.train()
    x, offset, c, c_offset = scene()
    together = denoiser(x, offset, TIMES, encoder(c, c_offset))
    alone = encoder(c[20:], torch.tensor([14]))
    made = denoiser(x[70:], torch.tensor([50]), TIMES[1:], alone)
    assert torch.allclose(made, together[70:], atol=1e-12)
    denoiser.eval()
    assert torch.equal(denoiser(x, offset, TIMES, encoder(c, c_offset)), together)
    assert not any("running" in key for key in denoiser.state_dict())


def test_norm_against_torch():
    from pointcept_kd.networks.denoiser import Norm
    from pointcept_kd.ops.sparse import SparseConvTensor

    g = torch.Generator().manual_seed(0)
    cells = torch.cat((torch.tensor([0] * 9 + [1] * 6)[:, None], torch.arange(45).view(15, 3)), 1)
    x = SparseConvTensor(torch.randn(15, 12, generator=g), cells, None, 2)
    for kind, groups in (("instance", 12), ("group", 4)):
        made = Norm(12, kind)(x).features
        for rows in (slice(9), slice(9, 15)):
            rectangle = x.features[rows].t()[None]
            expected = torch.nn.functional.group_norm(rectangle, groups)[0].t()
            assert torch.allclose(made[rows], expected, atol=1e-5)


@torch.no_grad()
def test_moving_by_whole_coarse_cells():
    g = torch.Generator().manual_seed(0)
    cells = torch.randint(-40, 40, (80, 3), generator=g)
    # Well inside their cells, where rounding has no say.
    x = (cells + (torch.rand(80, 3, generator=g) - 0.5) * 0.8).double() * 0.05
    step = torch.tensor([3, -5, 2])
    encoder, denoiser = pair()
    offset = torch.tensor([80])
    here, there = (denoiser.voxelise(p, offset) for p in (x, x + 0.8 * step.double()))
    assert torch.equal(here.inverse, there.inverse)
    told, moved = (encoder(p[:20], torch.tensor([20])) for p in (x, x + 0.8 * step.double()))
    assert torch.equal(told.cells[:, 1:] + 16 * step, moved.cells[:, 1:])
    for level, (a, b) in enumerate(
        zip(*(denoiser._encode(denoiser._stem(v)) for v in (here, there)))
    ):
        assert torch.equal(a.indices[:, 1:] + step * 16 // 2**level, b.indices[:, 1:])
        for match in ("corner", "centre"):
            found = told.rows_of(a.indices, 2**level, match)
            assert torch.equal(found, moved.rows_of(b.indices, 2**level, match))


@torch.no_grad()
def test_cells_are_shared_between_networks():
    encoder, denoiser = pair()
    _, other = pair(null="learned")
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    voxels = denoiser.voxelise(x, offset)
    for network in (denoiser, other):
        made = network(x, offset, TIMES, told, voxels)
        assert torch.equal(made, network(x, offset, TIMES, told))
    with pytest.raises(InputError, match="voxels of 120 points in 2 scans at 0.05 m do not fit 70"):
        denoiser(x[:70], offset[:1], TIMES[:1], told, voxels)


# ------------------------------------------------------------------------------------------------------------ weights


@torch.no_grad()
def test_scan_parts_follow_the_weights():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene(sizes=(20, 15))
    told = encoder(c, c_offset)
    before = denoiser(x, offset, TIMES, told)
    projected = []
    original, denoiser._project = (
        denoiser._project,
        lambda rows: projected.append(1) or original(rows),
    )
    assert torch.allclose(
        denoiser(x, offset, TIMES + 1, told),
        denoiser(x, offset, TIMES + 1, encoder(c, c_offset)),
        rtol=0,
        atol=1e-10,
    )
    assert len(projected) == 1  # for the second condition only

    def check():
        nonlocal before
        fresh = denoiser(x, offset, TIMES, encoder(c, c_offset))
        made = denoiser(x, offset, TIMES, told)
        assert torch.allclose(made, fresh, rtol=0, atol=1e-10)
        assert not torch.allclose(fresh, before, rtol=0, atol=1e-8)
        before = fresh

    for kind, lr in ((torch.optim.SGD, 1e-4), (torch.optim.Adam, 1e-3)):
        optimiser = kind(denoiser.parameters(), lr=lr)
        optimiser.zero_grad()
        with torch.enable_grad():
            denoiser(x, offset, TIMES, told).square().sum().backward()
        optimiser.step()
        check()
    denoiser.load_state_dict({k: v * 0.9 for k, v in denoiser.state_dict().items()})
    check()
    _, other = pair(null="learned")
    assert torch.equal(other(x, offset, TIMES, told), other(x, offset, TIMES, encoder(c, c_offset)))
    other.null.add_(1.0)
    assert torch.equal(
        other(x, offset, TIMES, told.drop()), other(x, offset, TIMES, encoder(c, c_offset).drop())
    )


@pytest.mark.parametrize("null", ["cloud", "learned"])
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_gradient_reaches_everything(kind, null):
    encoder, denoiser = pair(normalisation=kind, null=null)
    encoder.train(), denoiser.train()
    x, offset, c, c_offset = scene(sizes=(90, 80), partial=(60, 50))
    x.requires_grad_(True)
    told = encoder(c, c_offset).drop(torch.tensor([False, True]))
    out = denoiser(x, offset, TIMES, told)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for network in (encoder, denoiser):
        for name, p in network.named_parameters():
            assert p.grad is not None, name
            assert float(p.grad.abs().max()) > 0, name
    assert bool((x.grad.abs().sum(1) > 0).all())


def test_gradcheck():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene(sizes=(9, 7), partial=(4, 3))
    x.requires_grad_(True)
    weights = {
        name: p.detach().clone().requires_grad_(True)
        for name, p in denoiser.named_parameters()
        if name
        in ("latent_up1.0.weight", "latemp_stage2.0.weight", "up3_temp.2.bias", "last.0.weight")
        or name == "stem.0.weight"
    }
    names = list(weights)
    told = encoder(c, c_offset).detach()

    def run(x, features, *values):
        held = Condition(told.cells, features, 2, 0.05, told.null)
        return torch.func.functional_call(
            denoiser, dict(zip(names, values)), (x, offset, TIMES, held)
        )

    features = told.features.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(run, (x, features, *weights.values()), fast_mode=True, eps=1e-7)


def test_frozen_normalisation():
    encoder, denoiser = pair(freeze_bn=True)
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset).detach()
    before = denoiser(x, offset, TIMES, told)
    state = {k: v.clone() for k, v in denoiser.state_dict().items()}
    torch.nn.ModuleList([denoiser]).train()
    assert denoiser.training
    assert torch.equal(denoiser(x, offset, TIMES, told), before)
    assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
    denoiser.freeze_bn(False)
    assert not torch.equal(denoiser(x, offset, TIMES, told), before)
    assert not torch.equal(
        denoiser.state_dict()["stem.1.bn.running_mean"], state["stem.1.bn.running_mean"]
    )
    denoiser.freeze_bn()
    assert not any(m.training for m in denoiser.modules() if isinstance(m, torch.nn.BatchNorm1d))


def test_null_cloud_leaves_statistics_alone():
    encoder, _ = pair()
    expected = encoder.null_feature()
    encoder.train()
    encoder.stage4[2].net[1].bn.eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    assert torch.equal(encoder.null_feature(), expected)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert encoder.stem[1].bn.training
    assert not encoder.stage4[2].net[1].bn.training
    told = encoder.null(3)
    assert told.dropped.tolist() == [True] * 3
    assert told.cells.tolist() == [[i, 0, 0, 0] for i in range(3)]
    assert torch.equal(told.features[2], expected)


@torch.no_grad()
def test_autocast():
    encoder, denoiser = pair(torch.float32)
    x, offset, c, c_offset = scene(torch.float32)
    exact = denoiser.guided(x, offset, TIMES, encoder(c, c_offset), 2.0)
    told = encoder(c, c_offset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = denoiser.guided(x, offset, TIMES, told, 2.0)
    assert made.dtype == torch.float32
    assert 0 < float((made - exact).abs().max()) < 0.2 * float(exact.abs().max())
    # Precision is part of what is kept with the scan.
    assert torch.equal(denoiser.guided(x, offset, TIMES, told, 2.0), exact)


# ---------------------------------------------------------------------------------------------------- edges, bad input


def test_single_points():
    encoder, denoiser = pair()
    refiner = randomise(Refiner(MICRO))
    point, one = torch.tensor([[3.0, -4.0, 1.0]]), torch.tensor([1])
    for training in (False, True):
        for network in (encoder, denoiser, refiner):
            network.train(training)
        made = denoiser.guided(point, one, 7, encoder(point, one), 3.5)
        assert made.shape == (1, 3)
        assert bool(made.isfinite().all())
        assert refiner(point, one).shape == (1, 6, 3)
    # A scan of the cloud may be empty, and two points of a cell have one value.
    denoiser.eval(), encoder.eval()
    told = encoder(torch.cat((point, point + 1)), torch.tensor([1, 2]))
    made = denoiser(torch.cat((point, point)), torch.tensor([2, 2]), TIMES, told)
    assert torch.equal(made[0], made[1])


def test_bad_input():
    encoder, denoiser = pair()
    x, offset, c, c_offset = scene()
    told = encoder(c, c_offset)
    with pytest.raises(InputError, match="partial scan 1 of the batch has no points"):
        encoder(c, torch.tensor([20, 20, 34]))
    with pytest.raises(InputError, match="x has no points|coord has no points"):
        denoiser(x[:0], torch.tensor([0, 0]), TIMES, told)
    with pytest.raises(InputError, match="condition has no cells"):
        denoiser(x, offset, TIMES, Condition(told.cells[:0], told.features[:0], 2, 0.05))
    keep = told.cells[:, 0] == 0
    with pytest.raises(InputError, match="no cell of scan 1"):
        denoiser(x, offset, TIMES, Condition(told.cells[keep], told.features[keep], 2, 0.05))
    with pytest.raises(InputError, match="the condition has 2 scans, the points have 1"):
        denoiser(x, torch.tensor([120]), 5, told)
    with pytest.raises(InputError, match="cells of 0.1 m, the denoiser of 0.05 m"):
        denoiser(x, offset, TIMES, Condition(told.cells, told.features, 2, 0.1))
    with pytest.raises(InputError, match="8 channels, the denoiser takes 16; .* same cr"):
        denoiser(x, offset, TIMES, Condition(told.cells, told.features[:, :8], 2, 0.05))
    with pytest.raises(InputError, match="nothing stands for 'no scan'"):
        denoiser(x, offset, TIMES, None)
    with pytest.raises(InputError, match="guidance is towards a condition"):
        denoiser.guided(x, offset, TIMES, None, 3.5)
    with pytest.raises(InputError, match="one time for each of 2 scans"):
        denoiser(x, offset, torch.tensor([1, 2, 3]), told)
    with pytest.raises(InputError, match="offset must hold the ends"):
        denoiser(x, torch.tensor([70, 119]), TIMES, told)
    with pytest.raises(InputError, match="offset must hold the ends"):
        denoiser(x, torch.tensor([130, 120]), TIMES, told)
    for value in (math.nan, math.inf, 1e30, 1e5):
        spoiled = x.clone()
        spoiled[7, 1] = value
        with pytest.raises(
            InputError, match="not finite or farther away than 52429 m, first in row 7"
        ):
            denoiser(spoiled, offset, TIMES, told)
    with pytest.raises(InputError, match=r"floating point of the shape \(n, 3\)"):
        encoder(torch.zeros(4, 2), torch.tensor([4]))
    with pytest.raises(InputError, match=r"cells \(v, 4\) and features"):
        Condition(told.cells, told.features[:2], 2, 0.05)
    with pytest.raises(InputError, match=r"dropped must be bool \(2,\)"):
        told.drop(torch.tensor([True]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"match": "edge"}, "match='edge' is none of corner, centre"),
        ({"null": "zero"}, "null='zero' is none of cloud, learned"),
        ({"normalisation": "layer"}, "normalisation='layer' is none of batch, instance, group"),
        ({"cr": 0.01}, "cr=0.01: at least 1 / 32"),
        ({"voxel_size": 0.0}, "voxel_size=0.0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(InputError, match=text):
        Denoiser(**{"cr": MICRO, **options})


@pytest.mark.cuda
@torch.no_grad()
def test_cuda_is_the_cpu():
    encoder, denoiser = pair(torch.float32)
    x, offset, c, c_offset = scene(torch.float32, sizes=(900, 700), partial=(300, 200))
    told = encoder(c, c_offset)
    expected = denoiser.guided(x, offset, TIMES, told, 3.5)
    encoder.cuda(), denoiser.cuda()
    there = encoder(c.cuda(), c_offset.cuda())
    assert torch.equal(there.cells.cpu(), told.cells)
    made = denoiser.guided(x.cuda(), offset.cuda(), TIMES.cuda(), there, 3.5)
    assert torch.allclose(made.cpu(), expected, atol=1e-4 * float(expected.abs().max()))
    a, b = (
        n.voxelise(p, o) for n, p, o in ((denoiser, x.cuda(), offset.cuda()), (denoiser, x, offset))
    )
    for level in range(5):
        step = 2**level
        cells = torch.cat((b.tensor.indices[:, :1], b.tensor.indices[:, 1:] // step), 1)
        assert torch.equal(
            there.rows_of(cells.cuda(), step, "corner").cpu(), told.rows_of(cells, step, "corner")
        )
    assert torch.equal(a.inverse.cpu(), b.inverse)
