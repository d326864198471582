"""The refiner's loss against loops; training and use; where its checkpoints come from."""

import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pointcept_kd.completion.refinement import (
    CompletionRefinement,
    load_refinement,
    refinement_loss,
)
from pointcept_kd.host import MODELS, InputError, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch
from pointcept_kd.networks.denoiser import Refiner
from tools import convert

from ..test_convert_completion import entries

SIZE = dict(type="kd.Refiner", cr=0.125, voxel_size=0.4)


class Spread(nn.Module):
    """Six offsets that are linear in the point."""

    def __init__(self, copies=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.2 * torch.randn(3, copies, 3, generator=generator))

    def forward(self, coord, offset):
        return torch.einsum("ni,ikj->nkj", coord, self.weight)


def clouds(counts=(7, 4), times=2, seed=0, spread=4.0):
    """A batch of noisy points and scenes of `times` as many."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor(counts).cumsum(0)
    coord = spread * torch.rand(int(ends[-1]), 3, generator=generator)
    complete = spread * torch.rand(times * int(ends[-1]), 3, generator=generator)
    return dict(coord=coord, offset=ends, complete=complete, complete_offset=times * ends)


def by_loops(moved, scene, ends, scene_ends):
    """Mean over scans of both mean squared distances to the nearest point."""

    def one_way(source, others):
        total = 0.0
        for p in source.tolist():
            total += min(sum((a - b) ** 2 for a, b in zip(p, q)) for q in others.tolist())
        return total / len(source)

    values, begin, start = [], 0, 0
    for end, stop in zip(ends.tolist(), scene_ends.tolist()):
        a, b = moved[begin:end], scene[start:stop]
        values.append(one_way(a, b) + one_way(b, a))
        begin, start = end, stop
    return sum(values) / len(values)


# --- loss -----------------------------------------------------------------------------------------


def test_loss_by_hand():
    moved = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 3]])
    scene = torch.tensor([[0.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    # First scan: squares 0 and 1 there, 0 and 4 back: 0.5 + 2. Second: 4 + 4.
    loss = refinement_loss(moved, scene, torch.tensor([2, 3]), torch.tensor([2, 3]))
    assert float(loss) == (2.5 + 8) / 2


def test_loss_against_loops():
    batch = clouds((5, 9, 3))
    ends = batch["offset"], batch["complete_offset"]
    loss = refinement_loss(batch["coord"].double(), batch["complete"].double(), *ends)
    expected = by_loops(batch["coord"], batch["complete"], *ends)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_loss_of_half_precision_is_computed_in_full():
    batch = clouds()
    coord, complete = batch["coord"].half(), batch["complete"]
    ends = batch["offset"], batch["complete_offset"]
    loss = refinement_loss(coord, complete, *ends)
    assert torch.equal(loss, refinement_loss(coord.float(), complete, *ends))


def test_gradient():
    batch = clouds((4, 3))
    ends = batch["offset"], batch["complete_offset"]
    moved = batch["coord"].double().requires_grad_()
    scene = batch["complete"].double()
    assert torch.autograd.gradcheck(lambda x: refinement_loss(x, scene, *ends), moved)


def test_properties():
    batch = clouds()
    ends = batch["offset"], batch["complete_offset"]
    same = refinement_loss(batch["coord"], batch["coord"], ends[0], ends[0])
    assert float(same) == 0
    one, two = batch["coord"], batch["complete"]
    mixed = torch.cat([one[:7].flip(0), one[7:].flip(0)])
    assert refinement_loss(mixed, two, *ends) == pytest.approx(refinement_loss(one, two, *ends))
    swapped = refinement_loss(two, one, *ends[::-1])
    assert swapped == pytest.approx(refinement_loss(one, two, *ends))


def test_a_scan_without_points():
    batch = clouds()
    with pytest.raises(ValueError, match="scan 1"):
        refinement_loss(
            batch["coord"], batch["complete"], torch.tensor([11, 11]), batch["complete_offset"]
        )


def on_two(cfg):
    """Each process has some of three scans; together they have the loss and the gradient of all."""
    rank = runtime.comm.get_rank()
    batch = clouds((4, 7, 5))
    scene = batch["complete"].double()
    moved = batch["coord"].double().requires_grad_()
    everything = refinement_loss(moved, scene, batch["offset"], batch["complete_offset"])
    everything.backward()
    begin, end = ((0, 1), (1, 3))[rank]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), batch["offset"]])
    ends = batch["offset"][begin:end] - starts[begin]
    rows = slice(int(starts[begin]), int(starts[end]))
    own = batch["coord"][rows].double().requires_grad_()
    with joint_batch():
        loss = refinement_loss(own, scene[2 * rows.start : 2 * rows.stop], ends, 2 * ends)
    loss.backward()
    torch.testing.assert_close(loss, everything)
    torch.testing.assert_close(own.grad, 2 * moved.grad[rows])  # processes average gradients


@pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and forks"
)
def test_two_processes_have_the_loss_of_all_scans(monkeypatch):
    multiprocessing.set_forkserver_preload([__name__])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(on_two, 2, Config({"device": "cpu"}))


# --- model ----------------------------------------------------------------------------------------


def test_training_compares_the_moved_points():
    model = CompletionRefinement(Spread()).train()
    batch = clouds()
    outputs = model(batch)
    moved = []
    for p, offsets in zip(batch["coord"], model.network(batch["coord"], batch["offset"])):
        moved += [(p + d).detach() for d in offsets]
    ends = 6 * batch["offset"], batch["complete_offset"]
    expected = by_loops(torch.stack(moved), batch["complete"], *ends)
    assert set(outputs) == {"loss", "loss_chamfer"}
    assert float(outputs["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert not outputs["loss_chamfer"].requires_grad
    outputs["loss"].backward()
    assert model.network.weight.grad.abs().sum() > 0


def test_it_learns():
    torch.manual_seed(0)
    model = CompletionRefinement(SIZE).train()
    batch = clouds((60, 40), spread=6.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.6 * losses[0]


def test_refine_by_hand():
    model = CompletionRefinement(Spread(copies=2)).train()
    points, ends = torch.tensor([[1.0, 0, 0], [0, 0, 2]]), torch.tensor([1, 2])
    moved, rows = model.refine(points, ends)
    expected = torch.stack(
        [p + d for p in points for d in (p @ model.network.weight.flatten(1)).view(2, 3)]
    )
    torch.testing.assert_close(moved, expected)
    assert rows.tolist() == [2, 4]
    assert not moved.requires_grad
    assert model.training  # as it was


def test_a_scan_does_not_depend_on_its_batch():
    torch.manual_seed(1)
    model = CompletionRefinement(SIZE)
    model.train()(clouds((60, 40)))  # running statistics other than those of the beginning
    model.eval()
    batch = clouds((60, 0, 40), spread=6.0)
    points, ends = model.refine(batch["coord"], batch["offset"])
    assert ends.tolist() == [360, 360, 600]
    begin = 0
    for number, end in enumerate(batch["offset"].tolist()):
        scan = batch["coord"][begin:end]
        alone, rows = model.refine(scan, torch.tensor([len(scan)]))
        start = ends[number - 1] if number else 0
        assert torch.equal(alone, points[start : ends[number]])
        assert rows.tolist() == [6 * len(scan)]
        begin = end
    nothing, rows = model.refine(batch["coord"][:0], batch["offset"][:0])
    assert (tuple(nothing.shape), rows.tolist()) == ((0, 3), [])


def test_evaluation_drops_what_is_far_away():
    model = CompletionRefinement(Spread(), max_range=5.0).eval()
    batch = clouds()
    batch["coord"][[0, 8]] += 40.0
    outputs = model(batch)
    near = batch["coord"].norm(dim=1) < 5
    assert not near.all()
    first = int(near[:7].sum())
    expected = model.refine(batch["coord"][near], torch.tensor([first, int(near.sum())]))
    assert torch.equal(outputs["completed"], expected[0])
    assert torch.equal(outputs["completed_offset"], expected[1])


def test_bad_input():
    batch = clouds()
    with pytest.raises(InputError, match="max_range must be positive"):
        CompletionRefinement(Spread(), max_range=0.0)
    with pytest.raises(InputError, match=r"offset \[7, 10\] does not divide 11 points"):
        CompletionRefinement(Spread()).refine(batch["coord"], torch.tensor([7, 10]))
    flat = CompletionRefinement(nn.Identity())
    flat.network.forward = lambda coord, offset: coord
    with pytest.raises(InputError, match=r"gives \(11, 3\) for 11 points"):
        flat.train()(batch)


# --- checkpoints ----------------------------------------------------------------------------------


def trained(folder):
    """A run's folder with a model of another size than the published one."""
    torch.manual_seed(2)
    model = MODELS.build(dict(type="kd.CompletionRefinement", network=SIZE, max_range=20.0))
    (folder / "model").mkdir(parents=True)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(dict(epoch=1, state_dict=state), folder / "model" / "model_last.pth")
    entry = dict(type="kd.CompletionRefinement", network=SIZE, max_range=20.0)
    Config(dict(model=entry)).dump(folder / "config.py")
    return model, folder / "model" / "model_last.pth"


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_a_training_s_checkpoint_with_the_config_beside_it(tmp_path):
    model, path = trained(tmp_path / "run")
    loaded = load_refinement(path)
    assert same_weights(loaded, model)
    assert loaded.max_range == 20
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_named_config_goes_first(tmp_path):
    model, path = trained(tmp_path / "run")
    config = tmp_path / "other.py"
    (tmp_path / "run" / "config.py").rename(config)
    assert same_weights(load_refinement(str(path), str(config)), model)
    Config(dict(model=dict(type="kd.Denoiser", cr=0.125))).dump(config)
    with pytest.raises(InputError, match=r"other\.py, has Denoiser, expected a refiner"):
        load_refinement(path, config)
    Config(dict(epoch=1)).dump(config)
    with pytest.raises(InputError, match=r"other\.py, has no model"):
        load_refinement(path, config)


def test_without_a_config_it_has_the_published_size(tmp_path):
    _, path = trained(tmp_path / "run")
    (tmp_path / "run" / "config.py").unlink()
    with pytest.raises(InputError, match="checkpoint of another width"):
        load_refinement(path)


def test_a_converted_file_says_its_size(tmp_path):
    released, made = tmp_path / "refine_net.ckpt", tmp_path / "run" / "model" / "refiner.pth"
    torch.save({"state_dict": entries("refiner", "model_refine.", 5)}, released)
    convert.main(["refiner", str(released), "--out", str(made)])
    # A config beside it that is of something else does not count.
    Config(dict(model=dict(type="kd.Denoiser"))).dump(tmp_path / "run" / "config.py")
    content = torch.load(made)
    loaded = load_refinement(made)
    assert isinstance(loaded.network, Refiner)
    for key, value in content["state_dict"].items():
        assert torch.equal(loaded.network.state_dict()[key], value)


def test_a_checkpoint_of_something_else(tmp_path):
    _, path = trained(tmp_path / "run")
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, path)
    with pytest.raises(InputError, match="matches only 0 of"):
        load_refinement(path)
    with pytest.raises(InputError, match="does not exist"):
        load_refinement(tmp_path / "none.pth")
