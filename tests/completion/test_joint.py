"""Training losses over several processes: values and gradients of the batch that they make together."""

import multiprocessing
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist

from pointcept_kd.completion.diffusion import noise_loss
from pointcept_kd.completion.preference import (
    assistant_loss,
    dpo_loss,
    logistic_preference_loss,
    preference_loss,
)
from pointcept_kd.completion.score import scene_loss, score_surrogate
from pointcept_kd.host import comm, processes, runtime
from pointcept_kd.host.config import Config
from pointcept_kd.host.joint import joint_batch

pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo and fork"
)

# Three scans of 4, 7 and 5 points; the first process has one of them, the second two.
ENDS = torch.tensor([4, 11, 16])
SHARES = [(slice(0, 4), torch.tensor([4])), (slice(4, 16), torch.tensor([7, 12]))]


def losses(clouds, ends):
    """Name to loss of the first cloud, with the others as constants."""
    first, *others = clouds
    cases = {
        "noise": partial(noise_loss, e=others[0]),
        "score": lambda x: score_surrogate(x, others[0], others[1]),
        "chamfer": lambda x: scene_loss(x, others[0], ends, ends),
        "matched": lambda x: scene_loss(x, others[0], ends, ends, "matched"),
        "assistants": lambda x: assistant_loss(x, others[0], x**2, others[1]),
        "preference": lambda x: preference_loss(x, x**2, *others[:4], 0.7),
        "logistic": lambda x: logistic_preference_loss(x, x**2, *others[:4], ends, 2.0),
        "dpo": lambda x: dpo_loss(x, others[0], others[1], x**2, *others[2:4], ends, 0.3),
    }
    for name, loss in cases.items():
        yield name, loss, first


def check(cfg):
    rank, world = comm.get_rank(), comm.get_world_size()
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.randn(16, 3, dtype=torch.float64, generator=generator) for _ in range(5)]
    rows, ends = SHARES[rank]
    everything = losses(clouds, ENDS)
    own = losses([cloud[rows] for cloud in clouds], ends)
    for (name, loss, x), (_, share, y) in zip(everything, own):
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        expected = loss(x)
        expected.backward()
        with joint_batch():
            value = share(y)
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14, msg=name)
        # What the averaging over processes divides by their number.
        torch.testing.assert_close(
            y.grad, world * x.grad[rows], rtol=1e-10, atol=1e-13, msg=f"gradient of {name}"
        )


def test_losses_are_those_of_all_rows(monkeypatch):
    multiprocessing.set_forkserver_preload(["tests.completion.test_joint"])
    monkeypatch.setattr(processes, "_METHOD", "forkserver")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    runtime.launch(check, 2, Config({"device": "cpu"}))
