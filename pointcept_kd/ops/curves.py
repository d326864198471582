"""Space-filling curves: one int64 code per voxel, whose order keeps near voxels near.

Two curves, each also with x and y exchanged (`-trans`). The z-order (Morton) code interleaves the bits of x, y, z
with x highest. The Hilbert code is that of J. Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707 (2004),
with x as the first axis; it is computed on whole integers, one step per bit, for all voxels at once.

For both curves `code >> 3 * k` is constant on cubes of side `2**k`, and different cubes have different values: this
is what lets a network pool by shifting codes.
"""

import torch
from jaxtyping import Int
from torch import Tensor

ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
MAX_DEPTH = 16  # 3 * 16 bits of code leave 15 bits of an int64 for the sample index

# Spreading 16 bits to every third bit: after each step the runs of neighbouring bits are half as long.
_SPREAD = (
    (32, 0x001F00000000FFFF),
    (16, 0x001F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


def encode(
    cells: Int[Tensor, "n 3"], batch: Int[Tensor, " n"] | None, depth: int, order: str = "z"
) -> Int[Tensor, " n"]:
    """Code of every voxel, the sample index above bit `3 * depth`.

    Args:
        cells: voxel indices, each in [0, 2**depth).
        batch: sample index of each voxel, at least 0; None for a single sample.
        depth: bits per axis, 1 to 16.
        order: one of `ORDERS`.

    Returns:
        int64 codes; different (sample, voxel) pairs have different codes.

    Raises:
        ValueError: for an unknown order, and for a cloud whose voxels or samples do not fit.
    """
    curve, trans = _parse(order)
    if cells.shape[0] == 0:
        return cells.new_zeros(0, dtype=torch.int64)
    low, high = (int(v) for v in torch.aminmax(cells))
    if low < 0:
        raise ValueError(
            f"voxel indices start at 0, got {low}: subtract each sample's minimum first"
        )
    if depth > MAX_DEPTH or high >> depth:
        fits = 1 << depth if depth < MAX_DEPTH else (1 << MAX_DEPTH) - 1
        raise ValueError(
            f"cloud too large for the code depth: {high + 1} voxels along an axis, at most {fits} fit "
            f"(depth {depth} of {MAX_DEPTH}); use a larger grid_size or crop the cloud"
        )
    if trans:
        cells = cells[:, [1, 0, 2]]
    code = curve(cells, depth)
    if batch is None:
        return code
    first, last = (int(v) for v in torch.aminmax(batch))
    if first < 0 or 3 * depth + (last + 1).bit_length() > 63:
        raise ValueError(
            f"sample indices {first} to {last} do not fit beside {depth} bits per axis in 63 bits; "
            "use smaller batches"
        )
    return code.bitwise_or_(batch.to(torch.int64) << 3 * depth)


def decode(
    codes: Int[Tensor, " n"], depth: int, order: str = "z"
) -> tuple[Int[Tensor, "n 3"], Int[Tensor, " n"]]:
    """The inverse of `encode`: voxel indices and sample index of every code."""
    curve, trans = _parse(order)
    codes = codes.to(torch.int64)
    batch = codes >> 3 * depth
    codes = codes & ((1 << 3 * depth) - 1)
    if curve is hilbert:
        axes = _unhilbert(codes, depth)
    else:
        axes = [_gather_bits(codes >> 2), _gather_bits(codes >> 1), _gather_bits(codes)]
    if trans:
        axes[0], axes[1] = axes[1], axes[0]
    return torch.stack(axes, 1), batch


def z_order(cells: Int[Tensor, "n 3"], depth: int = MAX_DEPTH) -> Int[Tensor, " n"]:
    """Morton code of indices below 2**16: bit 3i+2 is x's bit i, 3i+1 is y's, 3i is z's.

    `depth` does not change the code; it is there so that both curves are called alike.
    """
    x, y, z = (_spread_bits(c) for c in cells.to(torch.int64).unbind(1))
    return (x << 2).bitwise_or_(y << 1).bitwise_or_(z)


def hilbert(cells: Int[Tensor, "n 3"], depth: int) -> Int[Tensor, " n"]:
    """Hilbert code of indices below 2**depth; voxels with consecutive codes share a face."""
    # 32 bits hold an axis and halve the memory that the loop walks through.
    x, y, z = (c.to(torch.int32, copy=True) for c in cells.unbind(1))
    for bit in range(depth - 1, 0, -1):
        below = (1 << bit) - 1
        x.bitwise_xor_(_where_set(x, bit).bitwise_and_(below))
        _turn(x, y, bit, below)
        _turn(x, z, bit, below)
    code = z_order(torch.stack((x, y, z), 1), depth)
    # The interleaved word is a Gray code; a prefix xor turns it into the position on the curve.
    for shift in (1, 2, 4, 8, 16, 32):
        code.bitwise_xor_(code >> shift)
    return code


def _unhilbert(codes: Tensor, depth: int) -> list[Tensor]:
    codes = codes ^ (codes >> 1)
    x, y, z = (_gather_bits(codes >> s) for s in (2, 1, 0))
    for bit in range(1, depth):
        below = (1 << bit) - 1
        _turn(x, z, bit, below)
        _turn(x, y, bit, below)
        x.bitwise_xor_(_where_set(x, bit).bitwise_and_(below))
    return [x, y, z]


def _turn(x: Tensor, other: Tensor, bit: int, below: int) -> None:
    """Skilling's step, in place: invert x's lower bits where the other axis has the bit, else exchange theirs."""
    flip = _where_set(other, bit)
    swap = (x ^ other).bitwise_and_(below).bitwise_and_(~flip)
    other.bitwise_xor_(swap)
    x.bitwise_xor_(swap.bitwise_or_(flip.bitwise_and_(below)))


def _where_set(value: Tensor, bit: int) -> Tensor:
    """All ones where the bit is set, else 0: a mask without a branch."""
    return (value >> bit).bitwise_and_(1).neg_()


def _spread_bits(value: Tensor) -> Tensor:
    for shift, mask in _SPREAD:
        value = (value | (value << shift)).bitwise_and_(mask)
    return value


def _gather_bits(value: Tensor) -> Tensor:
    value = value & _SPREAD[-1][1]
    masks = [mask for _, mask in _SPREAD[-2::-1]] + [0xFFFF]
    for (shift, _), mask in zip(_SPREAD[::-1], masks):
        value = (value ^ (value >> shift)).bitwise_and_(mask)
    return value


def _parse(order: str):
    """The curve's function, and whether x and y are exchanged."""
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: choose from {', '.join(ORDERS)}")
    name, _, trans = order.partition("-")
    return (hilbert if name == "hilbert" else z_order), bool(trans)
