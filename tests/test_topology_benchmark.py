"""The opponents of benchmarks/topology.py compute what its tables say they compute."""

import pytest
import torch

from benchmarks import topology
from pointcept_kd.ops.persistence import chamfer_diagrams, h0_deaths


@pytest.mark.parametrize("channels", topology.CHANNELS)
def test_all_edges_give_the_exact_deaths(channels):
    points = topology.features(150, channels, 1).requires_grad_()
    by_edge, exact = topology.union_find_deaths(points), h0_deaths(points)
    torch.testing.assert_close(by_edge, exact, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(d.square().sum(), points)[0] for d in (by_edge, exact)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_the_published_route_finds_the_first_merges_alone():
    points = topology.features(300, 64, 0)
    bars, merges = topology.published_diagram(points)
    exact = h0_deaths(points).square()
    assert 100 < merges < 299
    torch.testing.assert_close(bars[:merges, 1], exact[:merges], rtol=1e-4, atol=0)
    assert bars[:merges, 0].count_nonzero() == 0


def test_chamfer_of_all_pairs():
    a, b = torch.randn(20, 2), torch.randn(30, 2)
    torch.testing.assert_close(topology.pairwise_chamfer(a, b), chamfer_diagrams(a, b))


@pytest.mark.parametrize("name", topology.LOSSES)
def test_every_route_has_a_gradient(name):
    if "H1" in name and not topology.has_engine():
        pytest.skip("GUDHI is not installed: pip install 'pointcept_kd[topology]'")
    teacher = topology.features(120, 32, 0)
    student = topology.features(120, 16, 1).requires_grad_()
    value = topology.LOSSES[name](student, teacher)
    value.backward()
    assert value.ndim == 0
    assert float(value.detach()) > 0
    assert float(student.grad.abs().sum()) > 0


def test_both_steps_have_the_same_loss_and_gradients(tmp_path):
    pytest.importorskip(
        "embreex", reason="embreex is not installed: pip install 'pointcept_kd[sim]'"
    )
    distiller, batch = topology.distiller_and_batch("tiny", tmp_path)
    teacher = distiller.teachers["teacher"].network
    found = []
    for graph in (True, False):
        torch.manual_seed(3)
        distiller.zero_grad()
        teacher.requires_grad_(graph)
        if graph:
            loss = topology.through_the_teacher(distiller, batch)
        else:
            loss = distiller(dict(batch))["loss"]
        loss.backward()
        grads = [p.grad for p in distiller.student.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat([g.flatten() for g in grads])))
        touched = [p.grad is not None for p in teacher.parameters()]
        assert any(touched) == graph
        teacher.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
