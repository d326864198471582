"""Logs: no doubled lines, JSON that survives a kill, and talk between processes."""

import json
import logging
import math
import re
import sys
import types

import pytest
import torch
import torch.distributed as dist

from pointcept_kd.host import InputError, comm, log
from pointcept_kd.host.log import JsonlWriter, Writer, get_root_logger, read_jsonl


@pytest.fixture(autouse=True)
def _fresh_logger():
    logger = logging.getLogger(log.NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_console_line_and_file(tmp_path, capsys):
    logger = get_root_logger(tmp_path / "sub" / "train.log")
    again = get_root_logger(tmp_path / "sub" / "train.log")
    logger.info("hello")
    logger.debug("not shown")
    assert again is logger
    line = r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO\] hello\n$"
    assert re.match(line, capsys.readouterr().err)
    assert re.match(line, (tmp_path / "sub" / "train.log").read_text())


def test_another_file_replaces_the_first(tmp_path):
    get_root_logger(tmp_path / "a.log").info("one")
    get_root_logger(tmp_path / "b.log").info("two")
    get_root_logger().info("three")
    assert (tmp_path / "a.log").read_text().count("\n") == 1
    assert (tmp_path / "b.log").read_text().count("\n") == 2


def test_append_and_overwrite(tmp_path):
    path = tmp_path / "a.log"
    path.write_text("old\n")
    get_root_logger(path, "a").info("new")
    assert path.read_text().startswith("old\n")
    get_root_logger(tmp_path / "other.log")
    get_root_logger(path, "w").info("only")
    assert "old" not in path.read_text()


def test_colour_on_a_terminal_only(capsys, monkeypatch):
    logger = get_root_logger()
    logger.error("plain")
    assert "\033" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    logger.error("red")
    assert "\033[31m" in capsys.readouterr().err


def test_other_ranks_write_errors_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    logger = get_root_logger(tmp_path / "a.log")
    logger.warning("quiet")
    logger.error("loud")
    text = capsys.readouterr().err
    assert "loud" in text
    assert "quiet" not in text
    assert not (tmp_path / "a.log").exists()


def test_unwritable_paths(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write the log"):
        get_root_logger(blocked / "a.log")
    with pytest.raises(InputError, match="cannot write the log"):
        JsonlWriter(blocked / "log.jsonl")


def test_jsonl_round_trip_without_closing(tmp_path):
    writer = JsonlWriter(tmp_path / "log.jsonl")
    writer.add("train/loss", torch.tensor(0.5), 3)
    writer.add("val/mIoU", math.nan, torch.tensor(4))
    entries = read_jsonl(tmp_path / "log.jsonl")
    assert [(e["tag"], e["value"], e["step"]) for e in entries] == [
        ("train/loss", 0.5, 3),
        ("val/mIoU", None, 4),
    ]
    writer.close()
    writer.close()


@pytest.mark.parametrize("size", [10, 200_000])
def test_jsonl_after_a_kill(tmp_path, size):
    path = tmp_path / "log.jsonl"
    path.write_text('{"tag": "a", "value": 1, "step": 0}\n{"tag": "' + "b" * size)
    assert len(read_jsonl(path)) == 1
    writer = JsonlWriter(path)
    writer.add("c", 2, 1)
    writer.close()
    assert [e["tag"] for e in read_jsonl(path)] == ["a", "c"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_jsonl_with_only_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"tag')
    assert read_jsonl(path) == []
    JsonlWriter(path).close()
    assert path.read_text() == ""


def test_read_jsonl_refuses(tmp_path):
    with pytest.raises(InputError, match="no such log"):
        read_jsonl(tmp_path / "log.jsonl")
    path = tmp_path / "log.jsonl"
    path.write_text('{"tag": 1}\nnonsense\n{"tag": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl:2: not a JSON object"):
        read_jsonl(path)


def test_writer_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(Writer, "_said_missing", False)
    for folder in ("one", "two"):
        writer = Writer(tmp_path / folder)
        writer.add_scalar("train/loss", 1.5, 2)
        writer.close()
        writer.close()
        assert read_jsonl(tmp_path / folder / "log.jsonl")[0]["value"] == 1.5
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1


def test_writer_with_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = Writer(tmp_path)
    writer.add_scalar("train/loss", 1.5, 2)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(2, 1.5)]
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 1


# ----------------------------------------------------------------------------------------- processes


def test_comm_without_a_group(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process()
    comm.synchronize()
    assert comm.all_gather("x") == comm.gather("x") == ["x"]
    assert comm.broadcast("x") == "x"
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert comm.get_local_rank() == 3


class FakeRun:
    def __init__(self):
        self.axes, self.lines, self.finished = {}, [], 0

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished += 1


def test_scalars_go_to_wandb_where_asked(tmp_path, monkeypatch):
    run, asked = FakeRun(), {}
    module = types.ModuleType("wandb")
    module.login = lambda key: asked.update(key=key)
    module.init = lambda **words: asked.update(words) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    cfg = dict(save_path=str(tmp_path / "kd" / "small"), wandb_project=None, wandb_key="secret")
    writer = Writer(tmp_path, tensorboard=False, wandb=log.wandb_run(cfg))
    assert (asked["project"], asked["name"], asked["tags"]) == ("pointcept", "kd/small", ["kd"])
    assert asked["key"] == "secret"
    writer.add_scalar("train_batch/loss", torch.tensor(2.0), 7)
    writer.add_scalar("val/mIoU", 0.5, 1)
    writer.close()
    writer.close()
    assert run.lines == [{"train_batch/loss": 2.0, "Iter": 7}, {"val/mIoU": 0.5, "Epoch": 1}]
    assert run.axes["train_batch/*"] == "Iter"
    assert run.axes["val/*"] == "Epoch"
    assert run.finished == 1


def test_a_refusal_of_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="needs the package wandb: pip install wandb"):
        log.wandb_run(dict(save_path=str(tmp_path)))
    module = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(module, "init", lambda **words: 1 / 0, raising=False)
    with pytest.raises(InputError, match="ZeroDivisionError: division by zero; log in, set WANDB_"):
        log.wandb_run(dict(save_path=str(tmp_path)))


def _two_processes(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    assert (comm.get_world_size(), comm.get_rank()) == (2, rank)
    assert comm.is_main_process() == (rank == 0)
    comm.synchronize()
    assert comm.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert comm.gather(rank, dst=1) == ([0, 1] if rank == 1 else [])
    assert comm.broadcast(rank + 5, src=1) == 6
    # Filled in another order on each process: like must still meet like.
    names = ["b", "a"] if rank else ["a", "b"]
    own = {name: torch.tensor(float(rank + (10 if name == "b" else 0))) for name in names}
    mean = comm.reduce_dict(own)
    assert list(mean) == names
    assert (mean["a"].item(), mean["b"].item()) == (0.5, 10.5)
    assert comm.reduce_dict(own, average=False)["b"].item() == 21.0
    dist.destroy_process_group()


def test_comm_between_two_processes(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path / "meeting"),), nprocs=2)
