"""Time window attention and the division into windows against the straightforward routes.

    python benchmarks/windows.py [--quick] [--out rows.json]

One thread, CPU milliseconds. Alternatives take turns in every round and the least of each counts; each is checked to
compute the same before it is timed. Tokens are 100,000 voxels of 4 cm (--quick: 20,000) of a real scan where
POINTCEPT_KD_SAMPLES has one (default `../shared/data` beside the project) and of a simulated sheet otherwise; windows
are those of SphereFormer's finest level on SemanticKITTI, 0.3 m, and 2 deg, 2 deg, 80 m.

- Partition: from the index of every token's window to tokens side by side by window. Ours: packed 64-bit keys, sorted
  once. Opponents: `torch.unique(dim=0)` of (scan, index) rows; and that with the sort of its inverse that attention
  then needs. The column "with cells" is all of `windows`: origin, index, cell, and the same sort.
- Attention: 2 heads of 16 channels with relative encoding of queries, keys and values, forward and with all gradients.
  Opponent: the formula over the list of all pairs that share a window, in parts of at most half a million pairs,
  because autograd keeps several vectors of a head's width for each. `reduction` is the form for kernels of plain
  attention, here on PyTorch's.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.ops import Row, cpu_ms, environment, least_ms, scene, table, voxels
from pointcept_kd.networks.window_attention import METHODS, window_attention
from pointcept_kd.ops.scatter import segment_softmax
from pointcept_kd.ops.windows import (
    Windows,
    exponential_rows,
    side_by_side,
    spherical,
    windows,
)

CUBIC = (0.3, 0.3, 0.3)
SPHERICAL = (2.0, 2.0, 80.0)
# Width of the first bins of differences in r, metres.
A = 0.0125
# Pairs that the edge list handles at a time.
PART = 500_000


def tokens(count: int) -> tuple[Tensor, str]:
    """The first point of each of `count` voxels of 4 cm, in random order, and where they come from."""
    points, source = scene()
    cells, inverse = voxels(points, 0.04)
    first = torch.full((len(cells),), len(points)).scatter_reduce_(
        0, inverse, torch.arange(len(points)), "amin"
    )
    chosen = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))[:count]
    return points[first[chosen]], f"{source}: {len(chosen)} of {len(cells)} voxels of 4 cm"


# --- partition ------------------------------------------------------------------------------------


def by_rows(batch: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Number of every token's window among the distinct (scan, index) rows, and tokens per window."""
    rows = torch.cat((batch.unsqueeze(1), index), 1)
    _, inverse, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return inverse, counts


def by_rows_sorted(batch: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the tokens in order, as `side_by_side` gives them."""
    inverse, counts = by_rows(batch, index)
    return torch.argsort(inverse, stable=True), counts.cumsum(0) - counts, counts


def time_partition(xyz: Tensor, seconds: float) -> list[Row]:
    """Division of the tokens into windows."""
    batch = torch.zeros(len(xyz), dtype=torch.int64)
    rows: list[Row] = []
    for kind, u, window in (("cubic", xyz, CUBIC), ("spherical", spherical(xyz), SPHERICAL)):
        u = u.double()
        index = torch.floor((u - u.amin(0)) / torch.tensor(window, dtype=torch.float64)).long()
        pairs = zip(side_by_side(batch, index), by_rows_sorted(batch, index))
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit("the two partitions differ: the comparison would be meaningless")
        least = least_ms(
            {
                "ours": cpu_ms(partial(side_by_side, batch, index)),
                "rows": cpu_ms(partial(by_rows, batch, index)),
                "sorted": cpu_ms(partial(by_rows_sorted, batch, index)),
                "whole": cpu_ms(partial(windows, u, batch, window)),
            },
            seconds,
        )
        rows.append(
            {
                "windows": kind,
                "tokens": len(xyz),
                "number": len(by_rows(batch, index)[1]),
                "ours ms": least["ours"],
                "unique rows ms": least["rows"],
                "unique rows, sorted ms": least["sorted"],
                "unique / ours": least["rows"] / least["ours"],
                "sorted / ours": least["sorted"] / least["ours"],
                "with cells ms": least["whole"],
            }
        )
    return rows


# --- attention ------------------------------------------------------------------------------------


def edges(divided: Windows, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Parts of whole windows: their tokens, and of every pair the place of its query among them, key, and query."""
    total = (divided.sizes**2).cumsum(0)
    begin = 0
    while begin < len(divided.sizes):
        before = int(total[begin - 1]) if begin else 0
        last = int(torch.searchsorted(total, before + most, right=True))
        last = max(last, begin + 1)
        sizes = divided.sizes[begin:last]
        first = int(divided.starts[begin])
        members = divided.order[first : first + int(sizes.sum())]
        keys = sizes.repeat_interleave(sizes)
        start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        place = torch.arange(len(members)).repeat_interleave(keys)
        inside = torch.arange(len(place)) - (keys.cumsum(0) - keys)[place]
        yield members, place, members[start[place] + inside], members[place]
        begin = last


def pair_rows(divided: Windows, i: Tensor, j: Tensor, a: float | None) -> Tensor:
    """Rows of the tables for pairs, (p, 3)."""
    rows = divided.cells[i] - divided.cells[j] + 23
    if a is not None:
        rows[:, 2] = exponential_rows(divided.u[i, 2] - divided.u[j, 2], a)
    return rows


def edge_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], part: Sequence[Tensor], rows: Tensor
) -> Tensor:
    """The formula over pairs, for the tokens of one part."""
    members, place, j, i = part
    encoded = [sum(t[rows[:, axis], axis] for axis in range(3)) for t in tables]
    query, key = q[i], k[j]
    logits = (query * key + query * encoded[0] + key * encoded[1]).sum(2)
    weights = segment_softmax(logits, place, len(members))
    values = weights.unsqueeze(2) * (v[j] + encoded[2])
    return values.new_zeros((len(members), *v.shape[1:])).index_add(0, place, values)


def edge_list(
    inputs: Sequence[Tensor],
    divided: Windows,
    a: float | None,
    parts: Sequence[Sequence[Tensor]],
    grad: Tensor | None,
) -> list[Tensor]:
    """Output, and with `grad` the gradients of all inputs."""
    q, k, v, *tables = inputs
    out = torch.empty_like(v)
    sums = [torch.zeros_like(t) for t in inputs]
    for part in parts:
        rows = pair_rows(divided, part[3], part[2], a)
        with torch.set_grad_enabled(grad is not None):
            made = edge_attention(q, k, v, tables, part, rows)
        out[part[0]] = made.detach()
        if grad is not None:
            for total, more in zip(sums, torch.autograd.grad(made, inputs, grad[part[0]])):
                total += more
    return [out, *(sums if grad is not None else ())]


def ours(
    inputs: Sequence[Tensor], divided: Windows, a: float | None, method: str, grad: Tensor | None
) -> list[Tensor]:
    """The same by `window_attention`."""
    with torch.set_grad_enabled(grad is not None):
        made = window_attention(*inputs[:3], divided, *inputs[3:], a, method)
    return [made.detach(), *(torch.autograd.grad(made, inputs, grad) if grad is not None else ())]


def time_attention(xyz: Tensor, seconds: float, quick: bool) -> list[Row]:
    """Encoded attention in both kinds of windows."""
    batch = torch.zeros(len(xyz), dtype=torch.int64)
    rows: list[Row] = []
    for kind, divided, a in (
        ("cubic", windows(xyz, batch, CUBIC), None),
        ("spherical", windows(spherical(xyz), batch, SPHERICAL), A),
    ):
        g = torch.Generator().manual_seed(1)
        size = 47 if a is None else 48
        shapes = [(len(xyz), 2, 16)] * 3 + [(size, 3, 2, 16)] * 3
        inputs = [
            (torch.randn(s, generator=g) * (1 if s[0] > 48 else 0.3)).requires_grad_()
            for s in shapes
        ]
        grad = torch.randn(shapes[0], generator=g)
        parts = list(edges(divided, PART))
        divided.chunks()
        wanted = edge_list(inputs, divided, a, parts, grad)
        difference = 0.0
        for method in METHODS:
            made = ours(inputs, divided, a, method, grad)
            error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(made, wanted))
            difference = max(difference, error)
        if difference > 1e-4:
            raise SystemExit("the forms of attention differ: the comparison would be meaningless")
        calls: dict[str, Callable[[], object]] = {}
        for name, given in (("forward", None), ("both", grad)):
            calls[f"edges {name}"] = cpu_ms(partial(edge_list, inputs, divided, a, parts, given))
            for method in METHODS[: 1 if quick else None]:
                calls[f"{method} {name}"] = cpu_ms(partial(ours, inputs, divided, a, method, given))
        least = least_ms(calls, seconds)
        for name, text in (("forward", "forward"), ("both", "forward + backward")):
            rows.append(
                {
                    "windows": kind,
                    "tokens": len(xyz),
                    "number": len(divided.sizes),
                    "longest": int(divided.sizes.max()),
                    "pairs": int((divided.sizes**2).sum()),
                    "pass": text,
                    "buckets ms": least[f"buckets {name}"],
                    "reduction ms": least.get(f"reduction {name}"),
                    "edge list ms": least[f"edges {name}"],
                    "edge list / buckets": least[f"edges {name}"] / least[f"buckets {name}"],
                    "difference": difference,
                }
            )
    return rows


def main() -> None:
    """Run the sections and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer tokens and turns, for a look")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    xyz, source = tokens(20_000 if args.quick else 100_000)
    report: Row = {"environment": environment(source)}
    print("# Windows\n")
    print(*(f"- {k}: {v}" for k, v in report["environment"].items()), sep="\n", flush=True)  # type: ignore[attr-defined]
    for title, make in {
        "Partition": partial(time_partition, xyz, 1 if args.quick else 15),
        "Attention with relative encoding": partial(time_attention, xyz, 1, args.quick),
    }.items():
        report[title] = rows = make()
        print(f"\n## {title}\n\n{table(rows)}", flush=True)
    if args.out:
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(json.dumps(report, indent=2, default=float) + "\n")
        os.replace(part, args.out)


if __name__ == "__main__":
    main()
