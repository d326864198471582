"""The gradient-guided term: values by hand, loops from the formula, real networks with and without half precision."""

import math

import pytest
import torch
from torch import nn

from pointcept_kd.distillers.base import Distiller, Outputs, Term
from pointcept_kd.distillers.gradient import GradientGuided, gradient_map, map_loss, task_gradient
from pointcept_kd.distillers.taps import Activation
from pointcept_kd.host import MODELS, TERMS, InputError

from ..networks.clouds import cloud, only


def loop_map(feat, grad, scan, normalize):
    """The formula, a scan, a channel and a cell at a time."""
    result = [0.0] * len(feat)
    for number in set(scan):
        rows = [i for i, s in enumerate(scan) if s == number]
        weight = [sum(abs(grad[i][c]) for i in rows) / len(rows) for c in range(len(feat[0]))]
        values = [sum(w * f for w, f in zip(weight, feat[i])) for i in rows]
        if normalize == "minmax":
            span = max(values) - min(values) + 1e-6
            values = [(v - min(values)) / span for v in values]
        elif normalize == "zscore":
            mean = sum(values) / len(values)
            square = sum((v - mean) ** 2 for v in values)
            deviation = math.sqrt(square / (len(values) - 1)) if len(values) > 1 else 0.0
            values = [(v - mean) / (deviation + 1e-6) for v in values]
        for i, v in zip(rows, values):
            result[i] = v
    return result


def loop_loss(student, teacher):
    total = 0.0
    for a, b in zip(student, teacher):
        gap = abs(a - b)
        total += gap * gap / 2 if gap < 1 else gap - 0.5
    return total / len(student)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_hand_values():
    feat, grad = tensor((1, 2), (3, 4)), tensor((0.5, -1), (-0.5, 3))
    assert gradient_map(feat, grad, normalize="none").tolist() == [4.5, 9.5]
    assert gradient_map(feat, grad).tolist() == pytest.approx([0, 0.9999998], abs=1e-9)
    z = gradient_map(feat, grad, normalize="zscore").tolist()
    assert z == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)
    assert map_loss(tensor(0, 1), tensor(0.25, 0.5)).item() == pytest.approx(0.078125, abs=1e-12)
    assert map_loss(tensor(0, 3), tensor(0, 0)).item() == pytest.approx((0 + 2.5) / 2)


def real_case():
    feat = tensor((1, 0), (0, 2), (1, 1)).requires_grad_()
    return feat, nn.functional.cross_entropy(feat, torch.tensor([0, 1, 0]))


def test_a_real_loss():
    feat, loss = real_case()
    assert loss.item() == pytest.approx(0.3777790, abs=1e-6)
    grad = task_gradient(loss, feat, torch.tensor(1.0))
    rows = [(-0.0896471, 0.0896471), (0.0397343, -0.0397343), (-0.1666667, 0.1666667)]
    for row, expected in zip(grad.tolist(), rows):
        assert row == pytest.approx(expected, abs=1e-6)
    values = gradient_map(feat, grad, normalize="none").tolist()
    assert values == pytest.approx([0.0986827, 0.1973654, 0.1973654], abs=1e-6)
    assert gradient_map(feat, grad).tolist() == pytest.approx([0, 0.99999, 0.99999], abs=1e-5)
    larger = gradient_map(feat, task_gradient(loss * 1000, feat, torch.tensor(1.0)))
    torch.testing.assert_close(larger, gradient_map(feat, grad), rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalize", ["minmax", "zscore", "none"])
def test_equals_loops_scan_by_scan(normalize):
    feat, grad = torch.randn(2, 40, 7, dtype=torch.float64)
    scan = torch.randint(0, 3, (40,))
    scan[7] = 4  # a scan of one cell, and none of number 3
    found = gradient_map(feat, grad, scan, normalize)
    expected = loop_map(feat.tolist(), grad.tolist(), scan.tolist(), normalize)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    if normalize != "none":
        assert found[7] == 0
    alone = gradient_map(feat[scan == 1], grad[scan == 1], normalize=normalize)
    torch.testing.assert_close(found[scan == 1], alone, rtol=1e-12, atol=1e-12)
    order = torch.randperm(40)
    moved = gradient_map(feat[order], grad[order], scan[order], normalize)
    torch.testing.assert_close(moved, found[order], rtol=1e-9, atol=1e-9)
    other = torch.randn(40, dtype=torch.float64) * 3
    assert map_loss(found, other).item() == pytest.approx(loop_loss(expected, other.tolist()))


@pytest.mark.parametrize("normalize", ["minmax", "zscore", "none"])
def test_gradients(normalize):
    feat, grad = torch.randn(2, 12, 5, dtype=torch.float64)
    scan = torch.tensor([0] * 7 + [1] * 4 + [2])
    target = torch.rand(12, dtype=torch.float64)
    leaf, guest = feat.clone().requires_grad_(), target.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f: map_loss(gradient_map(f, grad, scan, normalize), target), leaf
    )
    weights = grad.clone().requires_grad_()
    map_loss(gradient_map(leaf, weights, scan, normalize), guest).backward()
    assert weights.grad is None
    assert guest.grad is None
    if normalize == "minmax":  # the ends of the range pull, too
        with torch.no_grad():
            values = gradient_map(feat, grad, scan, "none")[:7]
        assert leaf.grad[[int(values.argmin()), int(values.argmax())]].abs().min() > 0


@pytest.mark.parametrize("normalize", ["minmax", "zscore", "none"])
def test_constant_maps_and_no_cells(normalize):
    feat = torch.ones(4, 3, requires_grad=True)
    value = gradient_map(feat, torch.ones(4, 3), normalize=normalize)
    value.square().sum().backward()
    assert torch.isfinite(feat.grad).all()
    if normalize != "none":
        assert value.tolist() == [0.0] * 4
    nothing = gradient_map(feat[:0], torch.ones(0, 3), normalize=normalize)
    loss = map_loss(nothing, torch.zeros(0))
    assert loss.item() == 0
    assert loss.requires_grad


def test_half_precision_is_widened():
    feat, grad = torch.randn(2, 9, 4).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient_map(feat, grad)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient_map(feat.float(), grad.float()), rtol=0, atol=0)


class Shouting(torch.autograd.Function):
    """Identity whose backward multiplies by 1000 in half precision, which overflows above 65."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.half() * 1000).to(grad.dtype)


def test_gradients_that_overflow_are_asked_for_smaller():
    feat = torch.tensor([[1.0, -2.0]], requires_grad=True)
    loss = (Shouting.apply(feat) * torch.tensor([[1.0, 3.0]])).sum()
    grad = task_gradient(loss, feat, torch.tensor(100.0))
    torch.testing.assert_close(grad, torch.tensor([[1e5, 3e5]]), rtol=1e-3, atol=0)
    assert torch.isnan(task_gradient(loss * math.nan, feat, torch.tensor(1.0))).all()


def test_gradient_of_what_was_widened():
    half = torch.randn(3, 4).half().requires_grad_()
    for source in (half, half * 1):
        loss = (source.float() ** 2).sum()
        grad = task_gradient(loss, source.float(), torch.tensor(1.0))
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, 2 * half.detach().float(), rtol=1e-2, atol=1e-3)


def test_losses_that_do_not_fit_are_refused():
    feat = torch.randn(3, 2, requires_grad=True)
    other = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(InputError, match="does not depend on the tapped features"):
        task_gradient(other.sum(), feat, torch.tensor(1.0))
    with pytest.raises(InputError, match="does not depend on the tapped features"):
        task_gradient(other.sum(), feat * 2, torch.tensor(1.0))
    with pytest.raises(InputError, match="has no gradient"):
        task_gradient(feat.detach().sum(), feat, torch.tensor(1.0))
    with pytest.raises(
        InputError, match=r"'minmx' is none of minmax, zscore, none; nearest: minmax"
    ):
        GradientGuided(normalize="minmx")
    with pytest.raises(InputError, match="none of minmax"):
        gradient_map(feat, feat, normalize="l2")


# ----------------------------------------------------------------------------- as a term


def outputs(feat, head, labels, batch=None, cells=None):
    """What a network hands a term: features at `enc_out`, class scores, and the loss that both lead to."""
    leaf = feat.clone().requires_grad_()
    out = Outputs(enc_out=Activation(leaf, batch, cells), logits=Activation(leaf @ head))
    out.loss = nn.functional.cross_entropy(leaf @ head, labels)
    return out


def test_the_term_is_the_formula_on_both_networks():
    torch.manual_seed(0)
    widths, n = (3, 5), 10
    batch, cells = torch.tensor([0] * 6 + [1] * 4), torch.randperm(200)[: 3 * n].view(n, 3)
    labels = torch.randint(0, 4, (n,))
    feats = [torch.randn(n, w, dtype=torch.float64) for w in widths]
    heads = [torch.randn(w, 4, dtype=torch.float64) for w in widths]
    order = torch.randperm(n)
    student = outputs(feats[0], heads[0], labels, batch, cells)
    moved = outputs(feats[1][order], heads[1], labels[order], batch[order], cells[order])
    hot = nn.functional.one_hot(labels, 4)
    grads = [((f @ h).softmax(1) - hot) @ h.T for f, h in zip(feats, heads)]  # of n times the loss
    maps = [
        loop_map(f.tolist(), g.tolist(), batch.tolist(), "minmax") for f, g in zip(feats, grads)
    ]
    value = GradientGuided()(student, moved, {})
    assert value.item() == pytest.approx(loop_loss(*maps), abs=1e-9)
    value.backward()
    assert student["enc_out"].feat.grad.abs().sum() > 0
    assert moved["enc_out"].feat.grad is None
    # Without normalisation the loss is of the mean, not of the sum.
    raw = GradientGuided(normalize="none")(student, moved, {}).item()
    small = [
        loop_map(f.tolist(), (g / n).tolist(), batch.tolist(), "none") for f, g in zip(feats, grads)
    ]
    assert raw == pytest.approx(loop_loss(*small), abs=1e-9)


def test_rows_are_matched_by_cell():
    where = torch.tensor([(0, 0, 0), (0, 0, 1), (1, 0, 0)])
    feat, head = torch.randn(3, 4), torch.randn(4, 3)
    labels, scan = torch.tensor([0, 2, 1]), torch.zeros(3, dtype=torch.int64)
    order = torch.tensor([2, 0, 1])
    teacher = outputs(feat, head, labels, scan, where)
    student = outputs(feat[order], head, labels[order], scan, where[order])
    assert GradientGuided()(student, teacher, {}).item() == pytest.approx(0, abs=1e-12)
    shifted = outputs(feat, head, labels, scan, where + torch.tensor([0, 0, 1]))
    with pytest.raises(InputError, match="cover different cells"):
        GradientGuided()(student, shifted, {})


def test_plain_tensors_find_their_scans_by_the_offset():
    feat, head, labels = torch.randn(6, 4), torch.randn(4, 3), torch.randint(0, 3, (6,))
    scan = torch.tensor([0, 0, 0, 0, 1, 1])
    cells = torch.arange(18).view(6, 3)
    guest = torch.randn(6, 4)
    expected = GradientGuided()(
        outputs(feat, head, labels, scan, cells), outputs(guest, head, labels, scan, cells), {}
    )
    pair = outputs(feat, head, labels), outputs(guest, head, labels)
    torch.testing.assert_close(GradientGuided()(*pair, {"offset": torch.tensor([4, 6])}), expected)
    one = GradientGuided()(*pair, {"offset": torch.tensor([9])})
    assert one.item() > 0
    with pytest.raises(
        InputError, match="enc_out of the student hands out a plain tensor of 6 rows"
    ):
        GradientGuided()(*pair, {"offset": torch.tensor([4, 9])})


def test_a_network_without_a_loss_is_refused():
    feat, head, labels = torch.randn(6, 4), torch.randn(4, 3), torch.randint(0, 3, (6,))
    pair = outputs(feat, head, labels), outputs(feat, head, labels)
    pair[1].loss = None
    with pytest.raises(InputError, match="the teacher returned no loss"):
        GradientGuided()(*pair, {"offset": torch.tensor([6])})


# --------------------------------------------------------------------------- real networks

CRITERIA = [
    dict(type="CrossEntropyLoss", loss_weight=1.0, ignore_index=-1),
    dict(type="LovaszLoss", mode="multiclass", loss_weight=1.0, ignore_index=-1),
]
PATHS = dict(enc_out="backbone.enc", dec_in="backbone.dec.dec1.up.proj")


def net(width, drop_path=0.0):
    """A PTv3 of three levels; its decoder begins with `2 * width` channels."""
    return dict(
        type="DefaultSegmentorV2",
        num_classes=3,
        backbone_out_channels=width,
        backbone=dict(
            type="PT-v3m1",
            in_channels=4,
            order=("z", "hilbert"),
            stride=(2, 2),
            enc_depths=(1, 1, 1),
            enc_channels=(width, 2 * width, 4 * width),
            enc_num_head=(1, 2, 4),
            enc_patch_size=(32, 32, 32),
            dec_depths=(1, 1),
            dec_channels=(width, 2 * width),
            dec_num_head=(1, 2),
            dec_patch_size=(32, 32),
            drop_path=drop_path,
        ),
        criteria=CRITERIA,
    )


def pair(tap="enc_out", widths=(8, 16), taps=None, terms=None, **kwargs):
    torch.manual_seed(3)
    taps = taps or {tap: PATHS[tap]}
    guided = dict(type="kd.GradientGuided", tap=tap, weight=10.0, **kwargs)
    return Distiller(
        student=dict(model=net(widths[0]), taps=taps),
        teacher=dict(model=net(widths[1], 0.3), weight="random", taps=taps),
        terms=terms or dict(gradient=guided),
    )


class Watch(Term):
    """Keeps what the terms see."""

    needs_teacher_grad = True

    def __init__(self, tap):
        super().__init__()
        self.tap = tap

    def taps(self):
        return {self.tap}, {self.tap}

    def forward(self, student, teacher, batch):
        self.seen = student, teacher
        return student[self.tap].feat[:0].sum()


@pytest.mark.parametrize(("tap", "widths"), [("enc_out", (32, 64)), ("dec_in", (16, 32))])
def test_taps_lie_where_their_names_say(tap, widths):
    TERMS.register_module("TestWatch", module=Watch, force=True)
    model = pair(tap, terms=dict(watch=dict(type="TestWatch", tap=tap)))
    model(cloud((200, 150)))
    of_student, of_teacher = (side[tap] for side in model.terms["watch"].seen)
    assert (of_student.feat.shape[1], of_teacher.feat.shape[1]) == widths
    assert of_teacher.feat.is_leaf
    assert len(of_student.feat) == len(of_teacher.feat) < 100
    assert int(of_student.cells.max()) == 2  # 12 voxels, halved twice


@pytest.mark.parametrize("tap", ["enc_out", "dec_in"])
def test_training_leaves_the_teacher_alone(tap):
    model = pair(tap)
    teacher = model.teachers["teacher"].network
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(5):
        out = model(cloud((200, 150), seed=step))
        assert set(out) == {"loss", "loss_task", "loss_gradient", "weighted_gradient"}
        assert out["loss_gradient"] > 0
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("tap", ["enc_out", "dec_in"])
def test_equals_differentiating_the_whole_teacher(tap):
    model = pair(tap)
    teacher = model.teachers["teacher"].network
    batch = cloud((200, 150))
    seen = []
    path = teacher.get_submodule(PATHS[tap])
    handle = path.register_forward_hook(
        lambda m, i, o: seen.append((o["feat"], o["batch"], o["grid_coord"]))
    )
    teacher.requires_grad_(True)
    loss = teacher(dict(batch))["loss"]
    handle.remove()
    teacher.requires_grad_(False)
    feat, scan, cells = seen[0]
    grad = torch.autograd.grad(loss, feat)[0] * len(batch["feat"])
    expected = gradient_map(feat.detach(), grad, scan)

    term = model.terms["gradient"]
    maps = []
    term._map = lambda *args: maps.append(GradientGuided._map(term, *args)) or maps[-1]
    model(batch)
    assert torch.equal(maps[1].cells, cells)
    torch.testing.assert_close(maps[1].feat[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert maps[0].feat.requires_grad
    assert not maps[1].feat.requires_grad


def test_a_network_taught_by_itself_loses_nothing():
    model = pair(widths=(8, 8))
    model.teachers["teacher"].network.load_state_dict(model.student.state_dict())
    model.student.backbone.shuffle_orders = False
    for module in model.student.modules():
        if hasattr(module, "shuffle_orders"):
            module.shuffle_orders = False
    model.train()
    model.student.eval()
    out = model(cloud((200, 150)))
    assert out["loss_gradient"].item() == pytest.approx(0, abs=1e-8)


def test_scans_count_for_themselves():
    """A batch of two is the mean over the cells of both, the networks being in evaluation mode."""
    entropy = [dict(type="CrossEntropyLoss", ignore_index=-1)]
    torch.manual_seed(0)
    student, teacher = net(8), net(16)
    student["criteria"] = teacher["criteria"] = entropy
    taps = dict(enc_out="backbone.enc")
    model = Distiller(
        student=dict(model=student, taps=taps),
        teacher=dict(model=teacher, weight="random", taps=taps),
        terms=dict(gradient=dict(type="kd.GradientGuided")),
    )
    model.train()
    model.student.eval()
    both = cloud((260, 60))
    both["segment"] = both["segment"].clamp(min=0)
    counts = []
    handle = model.student.backbone.enc.register_forward_hook(
        lambda m, i, o: counts.append(len(o["feat"]))
    )
    values = [model(only(both, scan))["loss_gradient"].item() for scan in (0, 1)]
    handle.remove()
    expected = sum(c * v for c, v in zip(counts, values)) / sum(counts)
    assert model(both)["loss_gradient"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tap", ["enc_out", "dec_in"])
def test_under_autocast(tap, dtype):
    model = pair(tap)
    model.train()
    batch = cloud((300, 150))
    torch.manual_seed(0)
    exact = model(batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(batch)
    assert mixed["loss_gradient"].dtype == torch.float32
    assert mixed["loss_gradient"].item() == pytest.approx(exact["loss_gradient"].item(), rel=0.15)
    mixed["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_two_taps_of_one_teacher_are_refused():
    two = {
        name: dict(type="kd.GradientGuided", tap=name, weight=1.0) for name in ("enc_out", "dec_in")
    }
    model = pair(taps=PATHS, terms=two)
    with pytest.raises(
        InputError, match="another term differentiates the same teacher at a later tap"
    ):
        model(cloud((200,)))


def test_a_cache_cannot_answer_it():
    taps = dict(enc_out="backbone.enc")
    with pytest.raises(InputError, match="differentiates the teacher, which a cache cannot answer"):
        Distiller(
            student=dict(model=net(8), taps=taps),
            teacher=dict(model=net(8), weight="random", taps=taps),
            terms=dict(gradient=dict(type="kd.GradientGuided")),
            teacher_cache="somewhere",
        )


def test_without_labels_the_map_is_flat_and_connected():
    model = pair()
    model.train()
    batch = cloud((200,))
    batch["segment"] = torch.full_like(batch["segment"], -1)
    out = model(batch)
    assert out["loss_gradient"].item() == 0
    out["loss"].backward()


def test_it_is_registered():
    assert isinstance(TERMS.build(dict(type="kd.GradientGuided")), GradientGuided)
    assert MODELS.get("kd.Distiller") is Distiller
