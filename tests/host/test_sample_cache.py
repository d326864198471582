"""Sample caches: equal values, one copy per machine, nothing left behind, whoever dies."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pointcept_kd.host import InputError, sample_cache, shared_blocks
from pointcept_kd.host.loader import DefaultDataset
from pointcept_kd.host.sample_cache import SharedCache, key_of

if not Path(shared_blocks.FOLDER).is_dir():
    pytest.skip("counts blocks in /dev/shm, which this system has not", allow_module_level=True)


def write_scan(folder, points, value=None):
    rng = np.random.default_rng(points)
    folder.mkdir(parents=True, exist_ok=True)
    coord = rng.normal(size=(points, 3)) if value is None else np.full((points, 3), value)
    np.save(folder / "coord.npy", coord)
    np.save(folder / "strength.npy", rng.random(points))
    np.save(folder / "segment.npy", rng.integers(0, 4, points))


@pytest.fixture
def root(tmp_path):
    for i, points in enumerate((40, 1, 25)):
        write_scan(tmp_path / "train" / f"scan{i}", points)
    return tmp_path


def blocks(dataset_or_cache):
    cache = getattr(dataset_or_cache, "_cache", dataset_or_cache)
    key = cache if isinstance(cache, str) else cache.key
    return sorted(n for n in os.listdir(shared_blocks.FOLDER) if n.startswith(f"pkd_{key}"))


def forked(target, *arguments):
    """Run in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            equal(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("cache", [True, "memory", "shared"])
def test_values_are_those_of_the_files(root, cache):
    plain = DefaultDataset("train", str(root))
    cached = DefaultDataset("train", str(root), cache=cache, loop=2)
    for _ in range(2):
        for i in range(6):
            equal(plain.load(i), cached.load(i))


@pytest.mark.parametrize("cache", ["memory", "shared"])
def test_samples_are_read_once_and_copies_leave(root, cache):
    dataset = DefaultDataset("train", str(root), cache=cache)
    kept = DefaultDataset("train", str(root)).load(0)
    write_scan(root / "train" / "scan1", 1, 5.0)
    for _ in range(3):
        sample = dataset.load(0)
        equal(kept, sample)
        write_scan(root / "train" / "scan0", 40, 7.0)
        for key in ("coord", "strength", "segment"):
            sample[key][:] = 9  # what transforms do
        sample["more"] = 1
    assert (dataset.load(1)["coord"] == 5).all()


def test_every_plain_value_survives():
    sample = dict(
        coord=np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
        rows=np.arange(9)[::3],
        empty=np.zeros((0, 3), np.int16),
        flags=np.array([True, False]),
        names=np.array(["a", "bcd"]),
        pose=np.array(2.5),
        time=np.float64(0.1),
        count=np.int32(4),
        name="scan é",
        nothing=None,
        images=[np.ones((2, 3, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)],
        nested=dict(a=(1, 2.5, True), b=[]),
        half={0: np.float16(1.5)},
    )
    cache = SharedCache(key_of(dict(test="plain values")), 1)
    assert cache.get(0) is None
    cache.put(0, sample)
    back = cache.get(0)
    equal({k: np.ascontiguousarray(v) if k == "coord" else v for k, v in sample.items()}, back)
    assert back["coord"].flags.writeable
    assert back["coord"].flags.owndata


@pytest.mark.parametrize("value", [object(), {"a": [object()]}, np.array([object()])])
def test_values_that_cannot_be_shared(value):
    cache = SharedCache(key_of(dict(test="odd values")), 1)
    with pytest.raises(InputError, match=r"sample s: .*odd.* is a .*use cache='memory'"):
        cache.put(0, dict(name="s", odd=value))
    assert blocks(cache) == [f"pkd_{cache.key}.lock"]


def test_the_key_says_what_the_samples_are(root):
    def key(*args, **options):
        return DefaultDataset(*args, **options, cache="shared")._cache.key

    own = key("train", str(root))
    assert own == key(split="train", data_root=str(root) + "/.", loop=3, transform=[])
    assert own != key("train", str(root), ignore_index=255)
    assert own != key(["train"], str(root))
    (root / "train" / "scan3").mkdir()
    assert own != key("train", str(root))

    class Other(DefaultDataset):
        def __init__(self, *args, odd=0, **options):
            super().__init__(*args, **options)

    others = [Other("train", str(root), odd=odd, cache="shared")._cache.key for odd in (0, 1, 0)]
    assert others[0] == others[2] != others[1]
    assert key_of(dict(a={"y", "x"}, b=np.ones(3))) == key_of(dict(b=np.ones(3), a={"x", "y"}))
    assert key_of(dict(b=np.ones(3))) != key_of(dict(b=np.ones((3, 1))))
    unknown = object()
    assert key_of(dict(a=unknown)) != key_of(dict(a=unknown))
    assert len(f"/pkd_{own}_{10**7}") <= 31  # the limit of macOS


@pytest.mark.parametrize("cache", ["disk", 1.5, {}])
def test_other_values_of_cache(root, cache):
    with pytest.raises(InputError, match="use False .* 'memory' .* or 'shared'"):
        DefaultDataset("train", str(root), cache=cache)


def test_a_system_without_record_locks(root, monkeypatch):
    monkeypatch.setattr(sample_cache, "fcntl", None)
    with pytest.raises(InputError, match="use cache='memory'"):
        DefaultDataset("train", str(root), cache="shared")


# ---- several processes ---------------------------------------------------------------------------

RANKS = """
import json, multiprocessing, os, sys
import numpy as np
from torch.utils.data import DataLoader
from pointcept_kd.host.loader import DefaultDataset

def rank(root, number, channel):
    dataset = DefaultDataset("train", root, cache="shared")
    with open(f"{root}/rank{number}.json", "w") as file:
        json.dump([dataset._cache.key, float(dataset.load(0)["coord"].sum())], file)

def first(batch):
    return float(batch[0]["coord"].sum())

if __name__ == "__main__":
    root = sys.argv[1]
    dataset = DefaultDataset("train", root, cache="shared")
    spawn = multiprocessing.get_context("spawn")
    for number in range(2):
        process = spawn.Process(target=rank, args=(root, number, None))
        process.start()
        process.join()
        np.save(f"{root}/train/scan0/coord.npy", np.ones((40, 3)))
    own = [name for name in os.listdir("/dev/shm") if dataset._cache.key in name]
    sums = {}
    for context in ("fork", "spawn"):
        loader = DataLoader(
            dataset, num_workers=1, multiprocessing_context=context, collate_fn=first,
            persistent_workers=True,
        )
        sums[context] = list(loader)
        np.save(f"{root}/train/scan1/coord.npy", np.zeros((1, 3)))
    print(json.dumps([dataset._cache.key, own, sums, [n for n in os.listdir("/dev/shm") if dataset._cache.key in n]]))
"""


def test_ranks_and_loading_processes_share_one_copy_that_ends_with_them(root):
    expected = [
        float(DefaultDataset("train", str(root)).load(i)["coord"].sum(dtype=np.float32))
        for i in range(3)
    ]
    script = root / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script), str(root)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Python's resource tracker reports here what it thinks has leaked, or what it fails to find.
    assert done.stderr == ""
    key, after_ranks, sums, at_the_end = json.loads(done.stdout)
    ranks = [json.loads((root / f"rank{i}.json").read_text()) for i in range(2)]
    # The second rank ran after the file had changed: what it has can only come from the block.
    assert ranks == [[key, pytest.approx(expected[0], rel=1e-4)]] * 2
    # The ranks have ended; their blocks stay as long as the first process needs them.
    assert sorted(after_ranks) == sorted([f"pkd_{key}.lock", f"pkd_{key}_0"])
    assert sums["fork"] == pytest.approx(expected, rel=1e-4)
    assert sums["spawn"] == pytest.approx(expected, rel=1e-4)
    assert len(at_the_end) == 4
    assert blocks(key) == []


def test_the_last_owner_frees_the_blocks(root):
    first = DefaultDataset("train", str(root), cache="shared")
    second = DefaultDataset("train", str(root), cache="shared")
    key = first._cache.key
    first.load(0)
    copy_ = pickle.loads(pickle.dumps(second))
    del first
    assert len(blocks(key)) == 2
    forked(lambda: DefaultDataset("train", str(root), cache="shared").load(1))
    assert len(blocks(key)) == 3
    del second
    assert len(blocks(key)) == 3
    equal(copy_.load(1), DefaultDataset("train", str(root)).load(1))
    del copy_
    assert blocks(key) == []


def kill_while_writing(dataset):
    def dies(name, size):
        os.kill(os.getpid(), signal.SIGKILL)

    shared_blocks.reserve = dies
    dataset.load(0)


def kill_after_writing(dataset):
    dataset.load(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_leaves_no_half_block(root):
    dataset = DefaultDataset("train", str(root), cache="shared")
    assert forked(kill_while_writing, dataset) == -signal.SIGKILL
    assert blocks(dataset)[-1].endswith("_0")  # half of it, without the mark
    assert dataset._cache.get(0) is None
    equal(dataset.load(0), DefaultDataset("train", str(root)).load(0))
    kept = dataset._cache.get(0)
    assert kept is not None  # written anew over what the dead one left
    equal(kept, DefaultDataset("train", str(root)).load(0))
    assert forked(kill_after_writing, dataset) == -signal.SIGKILL
    equal(kept, dataset.load(0))
    key = dataset._cache.key
    del dataset
    assert blocks(key) == []


def test_an_empty_block_of_a_killed_writer(root):
    dataset = DefaultDataset("train", str(root), cache="shared")
    Path(shared_blocks.FOLDER, dataset._cache.name(0)).touch()  # killed before it got a size
    equal(dataset.load(0), DefaultDataset("train", str(root)).load(0))
    assert dataset._cache.get(0) is not None


def test_a_killed_run_is_cleaned_up_by_the_next_one(root):
    def run():
        kill_after_writing(DefaultDataset("train", str(root), cache="shared"))

    assert forked(run) == -signal.SIGKILL
    key = DefaultDataset("train", str(root), cache="shared")._cache.key
    assert blocks(key) == []
    assert forked(run) == -signal.SIGKILL
    write_scan(root / "train" / "scan0", 40, 3.0)
    dataset = DefaultDataset("train", str(root), cache="shared")  # with the same key
    assert (dataset.load(0)["coord"] == 3).all()


def test_a_busy_sample_is_read_from_its_file(root):
    dataset = DefaultDataset("train", str(root), cache="shared")
    dataset.load(0)
    ready, go = multiprocessing.Pipe(), multiprocessing.Pipe()

    def hold():
        with dataset._cache._locked(0, write=True) as locked:
            ready[1].send(locked)
            go[0].recv()

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert ready[0].recv()
    write_scan(root / "train" / "scan0", 40, 3.0)
    assert (dataset.load(0)["coord"] == 3).all()
    go[1].send(None)
    process.join(60)
    assert not (dataset.load(0)["coord"] == 3).all()


def test_a_block_that_comes_after_the_end_is_taken_back(root):
    dataset = DefaultDataset("train", str(root), cache="shared")
    os.pwrite(dataset._cache._lock, b"1", 0)  # what the last owner does before it frees
    dataset.load(0)
    assert blocks(dataset) == [f"pkd_{dataset._cache.key}.lock"]


# ---- memory --------------------------------------------------------------------------------------


def test_little_shared_memory_is_told_once(root, monkeypatch, caplog):
    real = os.statvfs(shared_blocks.FOLDER)
    full = [*real[:4], 1000, *real[5:]]  # f_bavail

    def statvfs(path):
        return os.statvfs_result(full) if path == shared_blocks.FOLDER else real

    monkeypatch.setattr(os, "statvfs", statvfs)
    datasets = [DefaultDataset("train", str(root), cache="shared") for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for dataset in datasets:
            for i in range(3):
                equal(dataset.load(i), DefaultDataset("train", str(root)).load(i))
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert "does not fit into /dev/shm" in told[0]
    assert "--shm-size" in told[0]
    assert blocks(datasets[0]) == [f"pkd_{datasets[0]._cache.key}.lock"]


def test_memory_taken_by_others_at_the_last_moment(root, monkeypatch, caplog):
    def taken(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", taken)
    dataset = DefaultDataset("train", str(root), cache="shared")
    equal(dataset.load(0), DefaultDataset("train", str(root)).load(0))
    assert blocks(dataset) == [f"pkd_{dataset._cache.key}.lock"]
    assert "does not fit" in caplog.text


def test_a_batch_worth_of_memory_is_left_to_others():
    status = os.statvfs(shared_blocks.FOLDER)
    assert shared_blocks.kept_free() >= status.f_blocks * status.f_frsize // 10
    assert shared_blocks.kept_free() >= 256 << 20
