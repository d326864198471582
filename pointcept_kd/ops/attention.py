"""Attention inside patches of a serialised point cloud (Point Transformer V3, arXiv:2312.10035).

Each scan's points, in the order of a space-filling curve, are cut into patches of K neighbours, and full softmax
attention runs inside a patch. A scan of n points is cut by itself:

* n <= K: one patch of n points;
* n > K: patches of K points; when K does not divide n, the last patch holds the n mod K remaining points followed
  by copies of the last K - (n mod K) points of the patch before. Copies serve as keys and values only.

So a scan's patches do not depend on the other scans of its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .backend import flash_attention

# From the (m, l) rows of m patches to an additive bias (m, heads, l, l) on their attention logits.
BiasFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PatchGroup:
    """Patches that one attention call takes: rows `start : start + size` of the packed rows.

    `pad` is None when all patches have `length` points. Otherwise patch j's points are the packed rows `pad[j]`
    (counted from `start`), of which `valid[j]` are real, and `keep` lists the real places row by row.
    """

    start: int
    size: int
    length: int
    pad: Tensor | None = None
    valid: Tensor | None = None
    keep: Tensor | None = None


@dataclass(frozen=True)
class PatchLayout:
    """Where every point goes: the patches of all scans, one behind the other ("packed").

    `rows` (t,): the point in each packed row, copies included. `slots` (n,): the packed row of each point's own
    result. `starts` (p + 1,) int32: the packed row where each patch begins, then t. `longest`: points in the longest
    patch.
    """

    rows: Tensor
    slots: Tensor
    starts: Tensor
    longest: int
    groups: tuple[PatchGroup, ...]

    def through(self, order: Int[Tensor, " n"], inverse: Int[Tensor, " n"]) -> "PatchLayout":
        """The same patches for points that are not stored in serialised order.

        Args:
            order: the point at each serialised position.
            inverse: the serialised position of each point.
        """
        return replace(self, rows=order[self.rows], slots=self.slots[inverse])


def patch_layout(
    counts: Sequence[int], patch_size: int, device: torch.device | str = "cpu"
) -> PatchLayout:
    """Cut scans of `counts` points, stored one behind the other in serialised order, into patches.

    Raises:
        ValueError: for a patch size below 1.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    size = patch_size
    n = torch.tensor(counts, dtype=torch.int64).reshape(-1)
    first = n.cumsum(0) - n
    is_long = n >= size  # a scan of exactly K points is a full patch as well

    # Full patches, of all scans in one block.
    patches = torch.where(is_long, -(-n // size), 0)
    scan = torch.repeat_interleave(patches)
    number = torch.arange(scan.numel()) - (patches.cumsum(0) - patches)[scan]
    begin, end = first[scan] + number * size, (first + n)[scan]
    position = begin[:, None] + torch.arange(size)
    # Beyond the scan's end, the place one patch earlier: exactly the copies described above.
    own = position < end[:, None]
    full = torch.where(own, position, position - size).reshape(-1)

    # Short scans, sorted by length; lengths with equal bit length share a call, which pads less than double.
    short = torch.nonzero(~is_long & (n > 0)).reshape(-1)
    short = short[torch.argsort(n[short], stable=True)]
    lengths = n[short]
    packed_first = full.numel() + lengths.cumsum(0) - lengths
    inside = torch.repeat_interleave(lengths)
    tail = (
        first[short][inside] + torch.arange(inside.numel()) - (packed_first - full.numel())[inside]
    )

    slots = torch.empty(int(n.sum()), dtype=torch.int64)
    slots[full[own.reshape(-1)]] = torch.nonzero(own.reshape(-1)).reshape(-1)
    slots[tail] = full.numel() + torch.arange(tail.numel())
    starts = torch.cat(
        [torch.arange(scan.numel()) * size, packed_first, packed_first.new_tensor([0])]
    )
    starts[-1] = full.numel() + tail.numel()

    groups = [PatchGroup(0, full.numel(), size)] if scan.numel() else []
    listed = lengths.tolist()
    a = 0
    while a < len(listed):
        b = a + 1
        while b < len(listed) and listed[b].bit_length() == listed[a].bit_length():
            b += 1
        groups.append(_short_group(int(packed_first[a]), lengths[a:b], device))
        a = b
    return PatchLayout(
        rows=torch.cat([full, tail]).to(device),
        slots=slots.to(device),
        starts=starts.to(torch.int32).to(device),
        longest=size if scan.numel() else max(listed, default=0),
        groups=tuple(groups),
    )


def _short_group(start: int, lengths: Tensor, device: torch.device | str) -> PatchGroup:
    """Whole scans of increasing length as one group, padded to the longest if they differ."""
    total, longest = int(lengths.sum()), int(lengths[-1])
    if int(lengths[0]) == longest:
        return PatchGroup(start, total, longest)
    place = torch.arange(longest)
    valid = place < lengths[:, None]
    pad = (lengths.cumsum(0) - lengths)[:, None] + torch.minimum(place, lengths[:, None] - 1)
    keep = torch.nonzero(valid.reshape(-1)).reshape(-1)
    return PatchGroup(start, total, longest, pad.to(device), valid.to(device), keep.to(device))


def patch_attention(
    qkv: Float[Tensor, "n 3 h d"],
    layout: PatchLayout,
    scale: float | None = None,
    dropout: float = 0.0,
    bias: BiasFunction | None = None,
    enable_flash: bool = False,
    upcast: bool = False,
) -> Float[Tensor, "n h d"]:
    """softmax(scale * q k^T + bias) v inside each patch of the layout.

    Args:
        qkv: query, key and value of each point; any float type.
        layout: from `patch_layout`, for the points as they are stored (see `PatchLayout.through`).
        scale: default d**-0.5.
        dropout: probability of dropping an attention weight.
        bias: from the (m, l) point numbers of m patches to a bias (m, h, l, l), e.g. relative positions.
        enable_flash: flash-attn may be used (bfloat16, or float16 on devices without it); needs no bias.
        upcast: compute in at least float32, also under autocast.

    Returns:
        each point's own result, in the type of `qkv`.
    """
    n, _, heads, width = qkv.shape
    if n == 0:
        return qkv[:, 2]
    # index_select, not [...]: its gradient is an index_add, which is several times faster on CPU.
    packed = qkv.reshape(n, -1).index_select(0, layout.rows).view(-1, 3, heads, width)
    flash = flash_attention(enable_flash and bias is None and not upcast, qkv.is_cuda)
    if flash is not None and bias is None and not upcast:
        half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        out = flash(
            packed if packed.dtype in (torch.float16, torch.bfloat16) else packed.to(half),
            layout.starts,
            max_seqlen=layout.longest,
            dropout_p=dropout,
            softmax_scale=scale,
        ).to(qkv.dtype)
    elif upcast:
        wide = packed if packed.dtype == torch.float64 else packed.float()
        with torch.autocast(qkv.device.type, enabled=False):
            out = _grouped(wide, layout, scale, dropout, bias).to(qkv.dtype)
    else:
        out = _grouped(packed, layout, scale, dropout, bias).to(qkv.dtype)
    return out.reshape(-1, heads * width).index_select(0, layout.slots).view(n, heads, width)


def _grouped(
    packed: Tensor,
    layout: PatchLayout,
    scale: float | None,
    dropout: float,
    bias: BiasFunction | None,
) -> Tensor:
    """One call of PyTorch's attention per group of patches; results in packed order."""
    results = []
    for group in layout.groups:
        block = packed[group.start : group.start + group.size]
        rows = layout.rows[group.start : group.start + group.size]
        mask: Tensor | None = None
        if group.pad is None or group.valid is None:
            rows = rows.view(-1, group.length)
        else:
            block = block.index_select(0, group.pad.reshape(-1))
            rows, mask = rows[group.pad], group.valid[:, None, None, :]
        block = block.view(*rows.shape, *block.shape[1:])
        q, k, v = (part.transpose(1, 2) for part in block.unbind(2))
        if bias is not None:
            added = bias(rows).to(q.dtype)
            mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
        out = (
            F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
            .transpose(1, 2)
            .flatten(0, 1)
        )
        results.append(out if group.keep is None else out.index_select(0, group.keep))
    return results[0] if len(results) == 1 else torch.cat(results)


def relative_position_bias(
    positions: Int[Tensor, "n 3"], rows: Int[Tensor, "m l"], table: Float[Tensor, "entries h"]
) -> Float[Tensor, "m h l l"]:
    """Learned bias of each pair of points in a patch from their offset in voxels.

    The table has 3 (2b + 1) rows: for each axis one row per offset -b ... b; larger offsets are clamped, and the
    three axes' entries are summed.
    """
    each = table.shape[0] // 3
    bound = (each - 1) // 2
    place = positions[rows]
    offset = (place[:, :, None] - place[:, None, :]).clamp(-bound, bound) + bound
    offset = offset + each * torch.arange(3, device=offset.device)
    return table[offset].sum(3).permute(0, 3, 1, 2)
