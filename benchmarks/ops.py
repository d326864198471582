"""Time the operations the package is built on against the alternatives they were chosen over.

    python benchmarks/ops.py [--quick] [--threads 1 2] [--out rows.json]

Sections: sparse convolution forward and backward (spconv's CPU wheel at one thread, where it is
installed, and plain autograd per tap), Hilbert codes (Skilling's transform on arrays of bits),
segment maximum with its gradient (torch's own), and the CPU seconds of `import pointcept_kd` on top
of `import torch`. Alternatives take turns in every round and the least time of each counts, so a
busy machine disturbs both alike. The scene is a real scan where POINTCEPT_KD_SAMPLES has one
(default `../shared/data` beside the project) and a simulated sheet of cells otherwise.

spconv is a benchmark opponent only. Its CPU kernels give wrong rows with two or more threads and
its backward pass asks for a CUDA stream, so it runs in a process of its own, held at one thread,
with a stream of 0.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pointcept_kd.ops.curves import hilbert
from pointcept_kd.ops.grid import CellKeys, unique_cells
from pointcept_kd.ops.kernel_map import KernelMap
from pointcept_kd.ops.scatter import segment_max
from pointcept_kd.ops.sparse import SparseConvTensor, submanifold_conv

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, object]


# --- scene and clock ------------------------------------------------------------------------------


def scene() -> tuple[Tensor, str]:
    """Points (n, 3) in metres and a line that says where they come from."""
    samples = Path(os.environ.get("POINTCEPT_KD_SAMPLES", ROOT.parent / "shared" / "data"))
    scan = samples / "semantickitti/dataset/sequences/00/velodyne/000000.bin"
    if scan.exists():
        points = np.fromfile(scan, dtype=np.float32).reshape(-1, 4)[:, :3]
        return torch.from_numpy(points.copy()), "SemanticKITTI sequence 00, scan 000000"
    g = torch.Generator().manual_seed(0)
    # Returns thin out with range, as on a street: log-uniform radius on a slightly wavy ground.
    radius = 3 * torch.exp(torch.rand(124_000, generator=g) * 3)
    angle = 2 * torch.pi * torch.rand(124_000, generator=g)
    x, y = radius * angle.cos(), radius * angle.sin()
    z = 0.3 * torch.sin(x / 5) + 0.3 * torch.cos(y / 7)
    # A third of them stands on walls.
    z[::3] += 4 * torch.rand(len(z[::3]), generator=g)
    return torch.stack((x, y, z), dim=1), "simulated sheet (no sample scan found)"


def voxels(points: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Occupied cells (m, 3) from 0 in sorted order, and the cell number of every point."""
    cells = torch.floor(points / size).long()
    cells -= cells.amin(0)
    batch = torch.zeros(len(cells), dtype=torch.int64)
    grid = CellKeys.fit(batch, cells)
    unique, inverse, _ = unique_cells(grid.pack(batch, cells))
    return grid.unpack(unique)[1], inverse


def cpu_ms(call: Callable[[], object]) -> Callable[[], float]:
    """`call` as an alternative of `least_ms` by its CPU time, which other work on the machine stretches less."""

    def timed() -> float:
        start = time.process_time()
        call()
        return (time.process_time() - start) * 1e3

    return timed


def least_ms(alternatives: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Least milliseconds of each alternative, taking turns for some `seconds`, three turns at least.

    An alternative that returns a float has timed itself, in milliseconds.
    """
    least = dict.fromkeys(alternatives, float("inf"))
    begin, turn = time.perf_counter(), 0
    while turn <= 3 or time.perf_counter() - begin < seconds:
        for name, call in alternatives.items():
            start = time.perf_counter()
            own = call()
            spent = own if isinstance(own, float) else (time.perf_counter() - start) * 1e3
            if turn:  # the first turn warms up
                least[name] = min(least[name], spent)
        turn += 1
    return least


# --- sparse convolution ---------------------------------------------------------------------------


def example(cells: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices (n, 4), features, weight (c, 3, 3, 3, c) and an output gradient."""
    g = torch.Generator().manual_seed(channels)
    indices = torch.cat((cells.new_zeros(len(cells), 1), cells), dim=1)
    features = torch.randn(len(cells), channels, generator=g)
    weight = torch.randn(channels, 3, 3, 3, channels, generator=g) / channels
    return indices, features, weight, torch.randn(len(cells), channels, generator=g)


def with_gradients(
    convolve: Callable[[Tensor, Tensor], Tensor], features: Tensor, weight: Tensor, grad: Tensor
) -> list[Tensor]:
    """Output and the gradients of features and weight."""
    features, weight = features.detach().requires_grad_(), weight.detach().requires_grad_()
    out = convolve(features, weight)
    return [out.detach(), *torch.autograd.grad(out, (features, weight), grad)]


def plain_autograd(features: Tensor, weight: Tensor, pairs: KernelMap) -> Tensor:
    """The same sum over taps left to autograd."""
    kernels = weight.flatten(1, 3).permute(1, 2, 0)
    out = features @ kernels[pairs.centre]
    start = 0
    for tap, count in enumerate(pairs.counts):
        part = slice(start, start + count)
        out = out.index_add(0, pairs.dst[part], features[pairs.src[part]] @ kernels[tap])
        start += count
    return out


def spconv_worker(folder: Path) -> None:
    """Answer each number of channels on stdin with the milliseconds of one forward and backward."""
    torch.set_num_threads(1)
    import spconv.pytorch as spconv
    from spconv.pytorch import cppcore, ops

    ops.get_current_stream = cppcore.get_current_stream = lambda: 0
    cells = torch.from_numpy(np.load(folder / "cells.npy"))
    shape = (cells.amax(0) + 1).tolist()
    ready = {}
    for line in sys.stdin:
        channels = int(line)
        if channels not in ready:
            indices, features, weight, grad = example(cells, channels)
            conv = spconv.SubMConv3d(channels, channels, 3, bias=False, indice_key="k")
            tensor = spconv.SparseConvTensor(features, indices.int(), shape, 1)
            conv(tensor)
            conv.weight = torch.nn.Parameter(weight)
            ready[channels] = conv, tensor, features.requires_grad_(), grad
        conv, tensor, features, grad = ready[channels]
        start = time.perf_counter()
        out = conv(tensor.replace_feature(features)).features
        grads = torch.autograd.grad(out, (features, conv.weight), grad)
        spent = (time.perf_counter() - start) * 1e3
        np.savez(folder / f"{channels}.npz", *(t.detach().numpy() for t in (out, *grads)))
        print(f"ms {spent}", flush=True)


class Spconv:
    """The worker process, or a reason why there is none."""

    def __init__(self, cells: Tensor) -> None:
        self.process: subprocess.Popen | None = None
        self.missing = ""
        if importlib.util.find_spec("spconv") is None:
            self.missing = "spconv is not installed"
            return
        self.folder = tempfile.TemporaryDirectory()
        np.save(Path(self.folder.name) / "cells.npy", cells.numpy())
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--spconv-worker", self.folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )

    def run(self, channels: int) -> float:
        """Milliseconds of one forward and backward."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError(self.missing)
        self.process.stdin.write(f"{channels}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ms "):
                return float(line[3:])
        raise SystemExit(
            "the spconv process ended early: run this file with --spconv-worker to see why"
        )

    def results(self, channels: int) -> list[Tensor]:
        """Output and gradients of the last run."""
        stored = np.load(Path(self.folder.name) / f"{channels}.npz")
        return [torch.from_numpy(stored[name]) for name in stored.files]

    def close(self) -> None:
        """End the process and remove its files."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
            self.folder.cleanup()


def time_sparse(cells: Tensor, threads: list[int], seconds: float) -> list[Row]:
    """Submanifold 3 x 3 x 3 convolution, forward and backward, by channels and threads."""
    rows: list[Row] = []
    spconv = Spconv(cells)
    for channels in (32, 64):
        indices, features, weight, grad = example(cells, channels)
        x = SparseConvTensor(features, indices, None, 1)
        pairs = x._cells.submanifold((3, 3, 3), (1, 1, 1))

        def ours(f: Tensor, w: Tensor, x=x) -> Tensor:
            return submanifold_conv(x.replace_feature(f), w).features

        def plain(f: Tensor, w: Tensor, pairs=pairs) -> Tensor:
            return plain_autograd(f, w, pairs)

        def timed(convolve, count, data=(features, weight, grad)) -> Callable[[], None]:
            def call() -> None:
                torch.set_num_threads(count)
                with_gradients(convolve, *data)

            return call

        alternatives: dict[str, Callable[[], object]] = {}
        for count in threads:
            alternatives[f"ours {count}"] = timed(ours, count)
            alternatives[f"plain {count}"] = timed(plain, count)
        if not spconv.missing:
            alternatives["spconv"] = lambda c=channels: spconv.run(c)
        least = least_ms(alternatives, seconds)
        error = None
        if not spconv.missing:
            torch.set_num_threads(1)
            pairs_of = zip(with_gradients(ours, features, weight, grad), spconv.results(channels))
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs_of)
        for count in threads:
            mine = least[f"ours {count}"]
            rows.append(
                {
                    "channels": channels,
                    "threads": count,
                    "ours ms": mine,
                    "plain autograd ms": least[f"plain {count}"],
                    "plain / ours": least[f"plain {count}"] / mine,
                    "spconv 1 thread ms": least.get("spconv"),
                    "spconv / ours": least["spconv"] / mine if "spconv" in least else None,
                    "difference to spconv": error,
                }
            )
    spconv.close()
    if spconv.missing:
        print(f"note: {spconv.missing}; its column stays empty", file=sys.stderr)
    return rows


def time_maps(cells: Tensor, threads: list[int], seconds: float) -> list[Row]:
    """Neighbour maps, which are made once per scan and kernel."""
    indices = torch.cat((cells.new_zeros(len(cells), 1), cells), dim=1)
    features = torch.zeros(len(cells), 1)
    kinds: dict[str, Callable[[SparseConvTensor], object]] = {
        "submanifold 3": lambda x: x._cells.submanifold((3, 3, 3), (1, 1, 1)),
        "submanifold 5": lambda x: x._cells.submanifold((5, 5, 5), (1, 1, 1)),
        "kernel 2, stride 2": lambda x: x._cells.strided((2, 2, 2), (2, 2, 2), (0, 0, 0)),
        "kernel 3, stride 2": lambda x: x._cells.strided((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    }
    rows: list[Row] = []
    for kind, make in kinds.items():
        row: Row = {"map": kind}
        for count in threads:
            torch.set_num_threads(count)

            def call(make=make) -> None:
                make(SparseConvTensor(features, indices, None, 1))

            row[f"{count} thread(s) ms"] = least_ms({kind: call}, seconds)[kind]
        rows.append(row)
    return rows


# --- Hilbert codes --------------------------------------------------------------------------------


def hilbert_of_bits(cells: Tensor, depth: int) -> Tensor:
    """Skilling's transform (AIP Conf. Proc. 707, 2004) on an (n, 3, depth) array of single bits."""
    places = torch.arange(depth - 1, -1, -1)
    bits = (cells.unsqueeze(2) >> places & 1).bool()
    first = bits[:, 0]
    for high in range(depth - 1):
        for axis in range(3):
            # Where the bit is set, invert the lower bits of x; elsewhere exchange them with x's.
            taken = bits[:, axis, high, None]
            lower_x, lower = first[:, high + 1 :], bits[:, axis, high + 1 :]
            swapped = (lower_x ^ lower) & ~taken
            lower ^= swapped
            lower_x ^= swapped | taken if axis else taken
    bits[:, 1] ^= bits[:, 0]
    bits[:, 2] ^= bits[:, 1]
    # Each set bit of the last axis inverts all lower bits of every axis.
    turns = bits[:, 2].long().cumsum(1) - bits[:, 2].long()
    bits ^= (turns % 2).bool().unsqueeze(1)
    weights = 1 << torch.arange(3 * depth - 1, -1, -1)
    return (bits.transpose(1, 2).flatten(1) * weights).sum(1)


def time_hilbert(cells: Tensor, threads: list[int], seconds: float) -> list[Row]:
    """Codes of all voxels."""
    depth = int(cells.max()).bit_length()
    if not torch.equal(hilbert(cells, depth), hilbert_of_bits(cells, depth)):
        raise SystemExit("the two Hilbert codes differ: the comparison would be meaningless")
    rows: list[Row] = []
    for count in threads:
        torch.set_num_threads(count)
        least = least_ms(
            {
                "ours": lambda: hilbert(cells, depth),
                "bits": lambda: hilbert_of_bits(cells, depth),
            },
            seconds,
        )
        rows.append(
            {
                "voxels": len(cells),
                "depth": depth,
                "threads": count,
                "ours ms": least["ours"],
                "arrays of bits ms": least["bits"],
                "bits / ours": least["bits"] / least["ours"],
            }
        )
    return rows


# --- segment maximum ------------------------------------------------------------------------------


def time_segment_max(points: Tensor, threads: list[int], seconds: float) -> list[Row]:
    """64 channels of all points onto 40 cm cells, forward and backward."""
    cells, index = voxels(points, 0.4)
    size, g = len(cells), torch.Generator().manual_seed(1)
    grad = torch.randn(size, 64, generator=g)
    normal = torch.randn(len(points), 64, generator=g)
    shuffled = index[torch.randperm(len(index), generator=g)]
    rows: list[Row] = []
    for kind, values, places in (
        ("normal values, scan order", normal, index),
        ("normal values, random order", normal, shuffled),
        ("after ReLU (many ties), scan order", normal.relu(), index),
    ):
        values = values.clone().requires_grad_()
        wide = places.unsqueeze(1).expand(-1, 64)

        def ours(values=values, places=places) -> Tensor:
            return torch.autograd.grad(segment_max(values, places, size), values, grad)[0]

        def own(values=values, wide=wide) -> Tensor:
            # Minus infinity, not zero: torch counts a start value equal to the maximum as a tie.
            start = values.new_full((size, 64), -torch.inf)
            out = start.scatter_reduce(0, wide, values, "amax", include_self=False)
            return torch.autograd.grad(out, values, grad)[0]

        error = float((ours() - own()).abs().max())
        for count in threads:
            torch.set_num_threads(count)
            least = least_ms(
                {"ours": lambda: ours() is None or None, "own": lambda: own() is None or None},
                seconds,
            )
            rows.append(
                {
                    "values": kind,
                    "rows": len(points),
                    "segments": size,
                    "threads": count,
                    "ours ms": least["ours"],
                    "torch autograd ms": least["own"],
                    "torch / ours": least["own"] / least["ours"],
                    "difference": error,
                }
            )
    return rows


# --- import ---------------------------------------------------------------------------------------


def time_import(repeats: int) -> list[Row]:
    """CPU seconds (user and system) of `import pointcept_kd` after `import torch`; medians."""
    code = (
        "import time, torch; before = time.process_time(); import pointcept_kd; "
        "print(before, time.process_time() - before)"
    )
    times = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append([float(v) for v in done.stdout.split()[-2:]])
    torch_s, own_s = np.median(np.array(times), axis=0)
    return [{"repeats": repeats, "import torch s": torch_s, "pointcept_kd on top s": own_s}]


# --- report ---------------------------------------------------------------------------------------


def environment(source: str) -> Row:
    """What a reader needs to judge or repeat the numbers."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [s for s in info.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    try:
        versions["spconv"] = version("spconv")
    except PackageNotFoundError:
        versions["spconv"] = "not installed"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "uncommitted changes": bool(git("status", "--porcelain")),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "versions": versions,
        "scene": source,
    }


def table(rows: list[Row]) -> str:
    """Rows as a markdown table."""

    def cell(value: object) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}"
        return str(value)

    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row[n]) for n in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of the time, for a look")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    parser.add_argument("--spconv-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.threads) < 1:
        parser.error("--threads needs numbers of 1 or more")
    if args.spconv_worker:
        spconv_worker(args.spconv_worker)
        return

    seconds = 0.5 if args.quick else 4.0
    points, source = scene()
    cells, _ = voxels(points, 0.1)
    source = f"{source}: {len(points)} points, {len(cells)} voxels of 10 cm"
    report: Row = {"environment": environment(source)}
    print("# Operations\n")
    print(*(f"- {k}: {v}" for k, v in report["environment"].items()), sep="\n")  # type: ignore[attr-defined]
    sections = {
        "Submanifold convolution 3x3x3, forward + backward": time_sparse(
            cells, args.threads, 4 * seconds
        ),
        "Kernel maps": time_maps(cells, args.threads, seconds / 4),
        "Hilbert codes": time_hilbert(cells, args.threads, seconds),
        "Segment maximum, forward + backward": time_segment_max(points, args.threads, seconds),
        "Import, CPU seconds": time_import(2 if args.quick else 5),
    }
    for title, rows in sections.items():
        print(f"\n## {title}\n\n{table(rows)}")
    report.update(sections)
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
