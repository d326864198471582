"""Attention inside cubic and spherical windows with contextual relative encoding (SphereFormer, arXiv:2303.12766).

For tokens i, j of one window, q already scaled, and rows e_a(i, j) = c_a(i) - c_a(j) + 23 of the cells c (0 .. 23, see
`pointcept_kd.ops.windows`) along the axes a; the r axis of spherical windows takes `exponential_rows(r_i - r_j)`:

    logit(i, j) = q_i . k_j + q_i . sum_a TQ[e_a(i, j), a] + k_j . sum_a TK[e_a(i, j), a]
    A(i, .)     = softmax over the tokens j of the window
    out_i       = sum_j A(i, j) (v_j + sum_a TV[e_a(i, j), a])

"buckets" (default): windows padded to common lengths. Each token's products with all rows are one matrix product, of
which every pair reads its three entries; values are encoded through the histogram of the weights over rows, so nothing
of the size pairs x channels exists. Of the pairs only the weights are kept for the gradient.

"reduction": along an axis with cells the row depends on c_i - c_j alone. With one-hot cells appended to queries, keys
and values, encoded attention over such axes is plain attention over longer vectors:

    q' = [q | G_a | 1(c_a(i))],  k' = [k | 1(c_a(j)) | H_a],  v' = [v | 1(c_a(j))]
    G_a[m] = q . TQ[c_a(i) - m + 23, a],  H_a[m] = k . TK[m - c_a(j) + 23, a]

and the extra outputs are histograms over the keys' cells, which TV then multiplies. It is exact, and lets kernels for
plain attention of several lengths do cubic windows: PyTorch's per bucket, flash-attn on CUDA if the network asks for it
(`enable_flash`, in half precision). The r axis is not of that form: its entries are added per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pointcept_kd.host import InputError
from pointcept_kd.ops.backend import flash_attention
from pointcept_kd.ops.windows import (
    QUANTA,
    Chunk,
    Windows,
    exponential_rows,
    spherical,
    windows,
)

from .layers import DropPath, Linear

METHODS = ("buckets", "reduction")
CELLS = ("window", "reference")
# Rows of a table: differences of cells -23 .. 23; 48 where the third axis is exponential.
ROWS = 2 * QUANTA - 1
# Places per window up to which copying the weights for all axes is cheaper than three steps per token.
_SHORT = 16


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    divided: Windows,
    query_table: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    a: float | None = None,
    method: str = "buckets",
    enable_flash: bool = False,
    pairs: int | None = None,
) -> Tensor:
    """Encoded attention inside every window; computed in at least float32, also under autocast.

    Args:
        q, k, v: (n, h, d), of which q is scaled already.
        divided: the windows of the n tokens.
        query_table, key_table, value_table: (rows, 3, h, d); rows 47, or 48 with `a`.
        a: width of the first bins of the third axis, metres; None for cells along all three.
        method: "buckets" or "reduction".
        enable_flash: of "reduction" without `a`: flash-attn on CUDA, where it is installed.
        pairs: padded pairs per chunk, see `Windows.chunks`.

    Returns:
        (n, h, d), float32, or float64 for float64.

    Raises:
        InputError: for an unknown method and for shapes that do not fit.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is none of {', '.join(METHODS)}")
    n, heads, width = q.shape
    rows = ROWS if a is None else ROWS + 1
    for name, tensor, shape in (
        ("k", k, (n, heads, width)),
        ("v", v, (n, heads, width)),
        ("cells", divided.cells, (n, 3)),
        ("query_table", query_table, (rows, 3, heads, width)),
        ("key_table", key_table, (rows, 3, heads, width)),
        ("value_table", value_table, (rows, 3, heads, width)),
    ):
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}: expected {shape}")
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, *tables = (
            t if t.dtype == torch.float64 else t.float()
            for t in (q, k, v, query_table, key_table, value_table)
        )
        if not n:
            return q + k + v
        if method == "buckets":
            return _Encoded.apply(q, k, v, *tables, divided, a, pairs, torch.is_grad_enabled())
        return _reduced(q, k, v, tables, divided, a, enable_flash, pairs)


# ------------------------------------------------------------------------------------------------------------ buckets


def _pair_rows(divided: Windows, chunk: Chunk, a: float | None, rows: int) -> Tensor:
    """Entry e_a(i, j) + a rows of a flattened (3, rows) table for every pair, int64 (w, i, 3, j)."""
    cells = divided.cells[chunk.rows]
    made = cells.unsqueeze(3) - cells.transpose(1, 2).contiguous().unsqueeze(1)
    made = made.contiguous()
    made += torch.arange(3, device=made.device).mul_(rows).add_(QUANTA - 1).unsqueeze(1)
    if a is not None:
        r = divided.u[:, 2][chunk.rows]
        made[:, :, 2] = exponential_rows(r.unsqueeze(2) - r.unsqueeze(1), a).add_(2 * rows)
    return made


def _read(entries: Tensor, places: Tensor) -> Tensor:
    """Sum over axes of the entries (h, w, i, 3 rows) that each pair has, (h, w, i, j)."""
    h, w, length, _ = entries.shape
    index = places.view(1, w, length, -1).expand(h, -1, -1, -1)
    return entries.gather(3, index).view(h, w, length, 3, length).sum(3)


def _count(weights: Tensor, places: Tensor, entries: int) -> Tensor:
    """The transpose of `_read`: weights (h, w, i, j) added up by entry, (h, w, i, entries)."""
    h, w, length, _ = weights.shape
    made = weights.new_zeros(h, w, length, entries)
    if length > _SHORT:
        for axis in range(3):
            made.scatter_add_(3, places[:, :, axis].expand(h, -1, -1, -1), weights)
        return made
    index = places.view(1, w, length, -1).expand(h, -1, -1, -1)
    spread = weights.unsqueeze(3).expand(-1, -1, -1, 3, -1).reshape(h, w, length, -1)
    return made.scatter_add_(3, index, spread)


def _mirrored(places: Tensor, a: float | None) -> Tensor:
    """The entries of pairs read from the side of the key: (w, j, 3, i).

    Along axes with cells that is the transpose and also, of a table turned upside down, the same as from the side of
    the query. The exponential axis is not symmetric at 0.
    """
    return places if a is None else places.transpose(1, 3).contiguous()


def _flat(table: Tensor) -> Tensor:
    """(rows, 3, h, d) as (h, 3 rows, d)."""
    return table.permute(2, 1, 0, 3).flatten(1, 2)


def _unflat(table: Tensor, rows: int) -> Tensor:
    """The inverse of `_flat`."""
    return table.unflatten(1, (3, rows)).permute(2, 1, 0, 3)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """(h, w, l, c) by (h, c, o): one product per head."""
    return torch.bmm(x.flatten(1, 2), matrix).view(*x.shape[:3], -1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum over tokens of the outer products of x (h, w, l, c) and y (h, w, l, o), (h, c, o)."""
    return torch.bmm(x.flatten(1, 2).transpose(1, 2), y.flatten(1, 2))


class _Encoded(torch.autograd.Function):
    """Encoded attention, chunk by chunk, with its gradient written out; rows are computed anew for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tq: Tensor,
        tk: Tensor,
        tv: Tensor,
        divided: Windows,
        a: float | None,
        pairs: int | None,
        keep: bool,
    ) -> Tensor:
        rows, flat = len(tq), [_flat(t) for t in (tq, tk if a is not None else tk.flip(0), tv)]
        tq_t, tk_t, values = flat[0].transpose(1, 2), flat[1].transpose(1, 2), flat[2]
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        kept = []
        for chunk in divided.chunks(pairs):
            if chunk.length == 1:
                token = chunk.rows[:, 0]
                out.index_copy_(0, token, v.index_select(0, token) + _own(tv, a))
                continue
            cq, ck, cv = (_take(t, chunk) for t in (q, k, v))
            places = _pair_rows(divided, chunk, a, rows)
            mirrored = _mirrored(places, a)
            logits = torch.matmul(cq, ck.transpose(2, 3))
            logits += _read(_times(cq, tq_t), places)
            logits += _read(_times(ck, tk_t), mirrored).transpose(2, 3)
            if chunk.valid is not None:
                logits.masked_fill_(~chunk.valid[:, None], -torch.inf)
            weights = logits.softmax(3)
            made = torch.matmul(weights, cv)
            made += _times(_count(weights, places, 3 * rows), values)
            _put(out, made, chunk)
            if keep:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, tq, tk, tv, *kept)
        ctx.divided, ctx.a, ctx.pairs = divided, a, pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tq, tk, tv, *kept = ctx.saved_tensors
        divided, a, rows = ctx.divided, ctx.a, len(tq)
        fq, fk, fv = (_flat(t) for t in (tq, tk if a is not None else tk.flip(0), tv))
        d_fq, d_fk, d_fv = (torch.zeros_like(t) for t in (fq, fk, fv))
        d_q, d_k, d_v = (torch.zeros_like(t) for t in (q, k, v))
        d_own = torch.zeros_like(tv)
        weights_of = iter(kept)
        with torch.autocast(q.device.type, enabled=False):
            for chunk in divided.chunks(ctx.pairs):
                if chunk.length == 1:
                    token = chunk.rows[:, 0]
                    some = grad.index_select(0, token)
                    d_v.index_copy_(0, token, some)
                    for axis, row in enumerate(_own_rows(a)):
                        d_own[row, axis] += some.sum(0)
                    continue
                weights = next(weights_of)
                cq, ck, cv, d_out = (_take(t, chunk) for t in (q, k, v, grad))
                if chunk.valid is not None:
                    d_out = d_out * chunk.valid[:, :, None]
                places = _pair_rows(divided, chunk, a, rows)
                mirrored = _mirrored(places, a)
                d_fv += _inner(_count(weights, places, 3 * rows), d_out)
                d_weights = torch.matmul(d_out, cv.transpose(2, 3))
                d_weights += _read(_times(d_out, fv.transpose(1, 2)), places)
                d_logits = d_weights.sub_((d_weights * weights).sum(3, keepdim=True)).mul_(weights)
                of_rows = _count(d_logits, places, 3 * rows)
                of_columns = _count(d_logits.transpose(2, 3), mirrored, 3 * rows)
                d_fq += _inner(of_rows, cq)
                d_fk += _inner(of_columns, ck)
                _put(d_q, torch.matmul(d_logits, ck) + _times(of_rows, fq), chunk)
                turned = d_logits.transpose(2, 3)
                _put(d_k, torch.matmul(turned, cq) + _times(of_columns, fk), chunk)
                _put(d_v, torch.matmul(weights.transpose(2, 3), d_out), chunk)
        d_tk = _unflat(d_fk, rows)
        d_tables = (_unflat(d_fq, rows), d_tk if a is not None else d_tk.flip(0))
        return d_q, d_k, d_v, *d_tables, _unflat(d_fv, rows) + d_own, None, None, None, None


def _own_rows(a: float | None) -> tuple[int, int, int]:
    """Rows of a token with itself."""
    return (QUANTA - 1, QUANTA - 1, QUANTA - 1 if a is None else QUANTA)


def _own(table: Tensor, a: float | None) -> Tensor:
    """What a token's own rows sum to, (h, d): the encoding in a window of one token."""
    x, y, z = _own_rows(a)
    return table[x, 0] + table[y, 1] + table[z, 2]


def _take(x: Tensor, chunk: Chunk) -> Tensor:
    """Rows (n, h, d) of a chunk as (h, w, length, d)."""
    flat = x.flatten(1).index_select(0, chunk.rows.reshape(-1))
    return flat.view(*chunk.rows.shape, *x.shape[1:]).permute(2, 0, 1, 3).contiguous()


def _put(out: Tensor, made: Tensor, chunk: Chunk) -> None:
    """Write the real places of (h, w, length, d) to their rows of out (n, h, d)."""
    out.index_copy_(0, chunk.tokens, _real(made, chunk))


def _real(made: Tensor, chunk: Chunk) -> Tensor:
    """The real places of (h, w, length, d) as rows (m, h, d), in the order of `chunk.tokens`."""
    rows = made.permute(1, 2, 0, 3).flatten(0, 1)
    return rows if chunk.kept is None else rows.index_select(0, chunk.kept)


# ---------------------------------------------------------------------------------------------------------- reduction


def _reduced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    divided: Windows,
    a: float | None,
    enable_flash: bool,
    pairs: int | None,
) -> Tensor:
    """Attention over vectors lengthened by one-hot cells."""
    n, heads, width = q.shape
    axes = 3 if a is None else 2
    cells = divided.cells[:, :axes]
    steps = torch.arange(QUANTA, device=q.device)
    ahead = cells.unsqueeze(2) - steps + (QUANTA - 1)  # (n, axes, 24): row of (token, cell m)
    behind = 2 * (QUANTA - 1) - ahead
    tq, tk, tv = ([_flat(t).unflatten(1, (3, -1))[:, x] for x in range(3)] for t in tables)

    def products(x: Tensor, table: list[Tensor], rows: Tensor) -> Tensor:
        parts = [
            torch.einsum("nhd,hrd->nhr", x, table[axis]).gather(
                2, rows[:, axis, None].expand(-1, heads, -1)
            )
            for axis in range(axes)
        ]
        return torch.cat(parts, 2)

    cell = F.one_hot(cells, QUANTA).to(q.dtype).flatten(1).unsqueeze(1).expand(-1, heads, -1)
    long_q = torch.cat([q, products(q, tq, ahead), cell], 2)
    long_k = torch.cat([k, cell, products(k, tk, behind)], 2)
    long_v = torch.cat([v, cell], 2)
    flash = flash_attention(enable_flash and a is None, q.is_cuda) if a is None else None
    if flash is not None:
        made = _flash(flash, long_q, long_k, long_v, divided)
        radial = None
    else:
        radial = None if a is None else (tq[2], tk[2], tv[2], a)
        made = _plain(long_q, long_k, long_v, q, k, divided, radial, pairs)
    out, shares = made[..., :width], made[..., width:]
    for axis in range(axes):
        share = shares[..., axis * QUANTA : (axis + 1) * QUANTA]
        # From histograms over the cells of keys to ones over rows.
        spread = share.new_zeros(n, heads, len(tables[2]))
        spread = spread.scatter_add(2, ahead[:, axis, None].expand(-1, heads, -1), share)
        out = out + torch.einsum("nhr,hrd->nhd", spread, tv[axis])
    return out


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    short_q: Tensor,
    short_k: Tensor,
    divided: Windows,
    radial: tuple[Tensor, Tensor, Tensor, float] | None,
    pairs: int | None,
) -> Tensor:
    """softmax(q k^T) v per bucket; with `radial` the r axis is added per pair, its values to the first columns."""
    chunks = divided.chunks(pairs)
    place = torch.cat([chunk.tokens for chunk in chunks])
    given = [q, k, v]
    if radial is not None:
        given.append(torch.einsum("nhd,hrd->nhr", short_q, radial[0]))
        given.append(torch.einsum("nhd,hrd->nhr", short_k, radial[1]))
    # Cut from one rearranged tensor: the gradient of a gather per chunk would be as large as all tokens.
    counts = [len(chunk.tokens) for chunk in chunks]
    pieces = zip(*(x.index_select(0, place).split(counts) for x in given))
    made = []
    for chunk, piece in zip(chunks, pieces):
        cq, ck, cv, *by = (_padded(x, chunk) for x in piece)
        mask = None if chunk.valid is None else chunk.valid[:, None]
        if radial is None:
            out = F.scaled_dot_product_attention(cq, ck, cv, mask, scale=1.0)
        else:
            r = divided.u[:, 2][chunk.rows]
            rows = exponential_rows(r.unsqueeze(2) - r.unsqueeze(1), radial[3])
            rows = rows.expand(cq.shape[0], -1, -1, -1)
            logits = torch.matmul(cq, ck.transpose(2, 3)) + by[0].gather(3, rows)
            logits = logits + by[1].gather(3, rows.transpose(2, 3)).transpose(2, 3)
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf)
            weights = logits.softmax(3)
            share = weights.new_zeros(*weights.shape[:3], ROWS + 1).scatter_add(3, rows, weights)
            width = radial[2].shape[2]
            encoded = F.pad(_times(share, radial[2]), (0, v.shape[2] - width))
            out = torch.matmul(weights, cv) + encoded
        made.append(_real(out, chunk))
    return torch.cat(made).index_select(0, torch.argsort(place))


def _padded(x: Tensor, chunk: Chunk) -> Tensor:
    """The rows (m, h, d) of `chunk.tokens` as (h, w, length, d)."""
    if chunk.valid is not None:
        x = x.index_select(0, chunk.valid.flatten().cumsum(0) - 1)
    return x.unflatten(0, chunk.rows.shape).permute(2, 0, 1, 3)


def _flash(flash: Any, q: Tensor, k: Tensor, v: Tensor, divided: Windows) -> Tensor:
    """The same by flash-attn over the tokens in order of windows, values padded to the width of keys."""
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    width = v.shape[2]
    packed = torch.stack([q, k, F.pad(v, (0, k.shape[2] - width))], 1).to(half)
    packed = packed.index_select(0, divided.order)
    ends = F.pad(divided.sizes.cumsum(0), (1, 0)).to(torch.int32)
    made = flash(
        packed, ends, max_seqlen=int(divided.sizes.max()), dropout_p=0.0, softmax_scale=1.0
    )
    back = torch.empty_like(divided.order).scatter_(
        0, divided.order, torch.arange(len(q), device=q.device)
    )
    return made[..., :width].to(q.dtype).index_select(0, back)


# -------------------------------------------------------------------------------------------------------------- block


def window_plan(
    levels: int,
    cubic: float | Sequence[float],
    spherical_window: Sequence[float],
    cubic_factor: float = 2.0,
    angle_factor: float = 2.0,
    cells: str = "window",
) -> list[dict[str, tuple[float, ...]]]:
    """Windows of `SphereFormerBlock` at every level: keys `cubic`, `spherical`, `spherical_cell`.

    Args:
        levels: how many.
        cubic: size of the first level's cubic window, metres, one number or three.
        spherical_window: theta and beta in degrees and r in metres of the first level's.
        cubic_factor, angle_factor: what cubic windows, and theta and beta, grow by from level to level; r does not.
        cells: "window": 24 cells along every axis, as SphereFormer was published. "reference": all levels have the
            spherical cells that the level after the last would have, as the released teacher's code runs, where one
            array was shared and multiplied in place; then only a few of the 24 cells differ.

    Raises:
        InputError: for another name, no levels, and sizes or factors that are not positive.
    """
    if cells not in CELLS:
        raise InputError(f"cells={cells!r} is none of {', '.join(CELLS)}")
    boxes = _triple(cubic, "cubic"), _triple(spherical_window, "spherical")
    if levels < 1 or min(cubic_factor, angle_factor) <= 0:
        raise InputError(
            f"levels={levels}, cubic_factor={cubic_factor}, angle_factor={angle_factor}: all must be above 0"
        )

    def grown(level: int) -> tuple[float, float, float]:
        theta, beta, r = boxes[1]
        return theta * angle_factor**level, beta * angle_factor**level, r

    plan = []
    for level in range(levels):
        wide = grown(level)
        fine = tuple(w / QUANTA for w in (wide if cells == "window" else grown(levels)))
        box = tuple(w * cubic_factor**level for w in boxes[0])
        plan.append(dict(cubic=box, spherical=wide, spherical_cell=fine))
    return plan


def _triple(value: float | Sequence[float], name: str) -> tuple[float, float, float]:
    values = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(values) != 3 or not all(
        isinstance(v, (int, float)) and 0 < v < float("inf") for v in values
    ):
        raise InputError(f"{name}={value!r}: expected one or three finite numbers above 0")
    x, y, z = (float(v) for v in values)
    return x, y, z


class WindowAttention(nn.Module):
    """Half of the heads attend in cubic windows, the others in spherical ones; arguments as `SphereFormerBlock`."""

    def __init__(self, dim: int, head_size: int, a: float, method: str, enable_flash: bool) -> None:
        super().__init__()
        if head_size < 1 or dim < 1 or dim % head_size:
            raise InputError(f"dim={dim}, head_size={head_size}: dim must be a multiple of it")
        heads = dim // head_size
        if heads < 2:
            raise InputError(
                f"dim={dim}, head_size={head_size}: that is {heads} head, and cubic and spherical windows need one "
                "each; take a wider block or smaller heads"
            )
        if method not in METHODS:
            raise InputError(f"method={method!r} is none of {', '.join(METHODS)}")
        if not 0 < a < float("inf"):
            raise InputError(f"a={a}: expected a finite number of metres above 0")
        self.heads, self.head_size, self.a = heads, head_size, a
        self.cubic_heads = heads // 2
        self.method, self.enable_flash = method, enable_flash
        for suffix, rows, own in (
            ("", ROWS, self.cubic_heads),
            ("_sphere", ROWS + 1, heads - self.cubic_heads),
        ):
            for role in ("query", "key", "value"):
                table = nn.Parameter(torch.empty(rows, 3, own, head_size))
                nn.init.trunc_normal_(table, std=0.02)
                self.register_parameter(f"relative_pos_{role}_table{suffix}", table)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, feat: Tensor, cubic: Windows, sphere: Windows) -> Tensor:
        """Attend among tokens (n, dim) inside both divisions."""
        n, dim = feat.shape
        q, k, v = self.qkv(feat).view(n, 3, self.heads, self.head_size).unbind(1)
        q = q * self.head_size**-0.5
        split, made = self.cubic_heads, []
        for heads, divided, suffix, a in (
            (slice(None, split), cubic, "", None),
            (slice(split, None), sphere, "_sphere", self.a),
        ):
            tables = (
                getattr(self, f"relative_pos_{role}_table{suffix}")
                for role in ("query", "key", "value")
            )
            made.append(
                window_attention(
                    q[:, heads],
                    k[:, heads],
                    v[:, heads],
                    divided,
                    *tables,
                    a,
                    self.method,
                    self.enable_flash,
                )
            )
        # Back to the type of the layers around, which autocast then may narrow again.
        return self.proj(torch.cat(made, 1).view(n, dim).to(feat.dtype))


class SphereFormerBlock(nn.Module):
    """x + DropPath(attention(LN x)), then x + DropPath(MLP(LN x)) over the tokens of a batch of scans.

    Knows nothing of convolutions: tokens are features with a position and a sample. State-dict keys are those of the
    released code.

    Args:
        dim: width; a multiple of `head_size`, at least two heads.
        cubic: size of cubic windows, metres, one number or three.
        spherical: size of spherical windows: theta, beta in degrees, r in metres.
        head_size: channels per head.
        drop_path: probability of dropping a residual branch of a token.
        a: width of the first bins of differences in r, metres.
        origin: where the grids of windows begin: "min" or "zero", see `pointcept_kd.ops.windows`.
        wrap: whether theta = 360 is theta = 0; published: no.
        spherical_cell: size of the cells of spherical windows; by default windows / 24.
        method: "buckets" or "reduction", which give the same; see the module.
        enable_flash: of "reduction": flash-attn in cubic windows on CUDA.

    Raises:
        InputError: for sizes that do not fit and unknown names.
    """

    def __init__(
        self,
        dim: int,
        cubic: float | Sequence[float],
        spherical: Sequence[float],
        head_size: int = 16,
        drop_path: float = 0.0,
        a: float = 0.0125,
        origin: str = "min",
        wrap: bool = False,
        spherical_cell: Sequence[float] | None = None,
        method: str = "buckets",
        enable_flash: bool = False,
    ) -> None:
        super().__init__()
        self.cubic, self.spherical = _triple(cubic, "cubic"), _triple(spherical, "spherical")
        self.spherical_cell = (
            tuple(w / QUANTA for w in self.spherical)
            if spherical_cell is None
            else _triple(spherical_cell, "spherical_cell")
        )
        if origin not in ("min", "zero"):
            raise InputError(f"origin={origin!r} is none of min, zero")
        if not 0 <= drop_path < 1:
            raise InputError(f"drop_path={drop_path}: expected 0 or more and below 1")
        self.origin, self.wrap = origin, wrap
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, head_size, a, method, enable_flash)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", Linear(4 * dim, dim))

    def divide(self, xyz: Tensor, batch: Tensor) -> tuple[Windows, Windows]:
        """Cubic and spherical windows of tokens at xyz (n, 3), metres, in samples (n,).

        They depend on nothing else and may be kept for another call with the same tokens.

        Raises:
            InputError: for positions that are not finite or so far apart that windows cannot be numbered.
        """
        try:
            cubic = windows(xyz, batch, self.cubic, self.origin)
            u = spherical(xyz, self.wrap)
            return cubic, windows(u, batch, self.spherical, self.origin, self.spherical_cell)
        except ValueError as error:
            raise InputError(f"windows of attention: {error}") from error

    def forward(
        self,
        feat: Tensor,
        xyz: Tensor,
        batch: Tensor,
        divided: tuple[Windows, Windows] | None = None,
    ) -> Tensor:
        """(n, dim) to (n, dim); `divided` is what `divide` gave for the same xyz and batch.

        Raises:
            InputError: for rows that do not fit, and as `divide`.
        """
        n = len(feat)
        if tuple(xyz.shape) != (n, 3) or tuple(batch.shape) != (n,):
            raise InputError(
                f"xyz {tuple(xyz.shape)} and batch {tuple(batch.shape)} do not fit {n} tokens: expected (n, 3), (n,)"
            )
        cubic, sphere = self.divide(xyz, batch) if divided is None else divided
        feat = feat + self.drop_path(self.attn(self.norm1(feat), cubic, sphere))
        return feat + self.drop_path(self.mlp(self.norm2(feat)))
