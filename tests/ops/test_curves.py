"""Space-filling curves against worked vectors, a bit-array oracle and the properties that pooling relies on."""

import itertools

import pytest
import torch

from pointcept_kd.ops.curves import ORDERS, decode, encode, hilbert, z_order

# Depth 3, sample 0: codes in the order of ORDERS.
VECTORS = {
    (0, 0, 0): (0, 0, 0, 0),
    (1, 0, 0): (4, 2, 1, 7),
    (0, 1, 0): (2, 4, 7, 1),
    (0, 0, 1): (1, 1, 3, 3),
    (1, 1, 1): (7, 7, 5, 5),
    (3, 5, 6): (238, 350, 176, 400),
    (7, 7, 7): (511, 511, 365, 365),
    (6, 2, 5): (369, 241, 389, 167),
}


def bits_of(value, depth):
    return [value >> i & 1 for i in reversed(range(depth))]


def z_oracle(cell, depth):
    code = 0
    for triple in zip(*(bits_of(v, depth) for v in cell)):
        for bit in triple:
            code = 2 * code + bit
    return code


def hilbert_oracle(cell, depth):
    """Skilling's transform on lists of single bits, most significant first."""
    axes = [bits_of(v, depth) for v in cell]
    for i in range(depth):
        for axis in range(3):
            for lower in range(i + 1, depth):
                if axes[axis][i]:
                    axes[0][lower] ^= 1
                elif axes[0][lower] != axes[axis][lower]:
                    axes[0][lower], axes[axis][lower] = axes[axis][lower], axes[0][lower]
    code, bit = 0, 0
    for gray in itertools.chain.from_iterable(zip(*axes)):
        bit ^= gray
        code = 2 * code + bit
    return code


def all_cells(depth):
    side = torch.arange(1 << depth)
    return torch.cartesian_prod(side, side, side)


@pytest.mark.parametrize("cell", VECTORS)
def test_worked_vectors(cell):
    codes = tuple(int(encode(torch.tensor([cell]), None, 3, order)) for order in ORDERS)
    assert codes == VECTORS[cell]


def test_the_sample_index_sits_above_the_code():
    cells = torch.tensor([[0, 0, 0], [7, 7, 7]])
    assert encode(cells, torch.tensor([1, 2]), 3, "z").tolist() == [512, 2 * 512 + 511]


@pytest.mark.parametrize("depth", range(3, 17))
def test_bit_array_oracle(depth):
    cells = torch.randint(0, 1 << depth, (40, 3), generator=torch.Generator().manual_seed(depth))
    for order in ORDERS:
        oracle = hilbert_oracle if order.startswith("hilbert") else z_oracle
        axes = (1, 0, 2) if order.endswith("trans") else (0, 1, 2)
        expected = [oracle([row[a] for a in axes], depth) for row in cells.tolist()]
        assert encode(cells, None, depth, order).tolist() == expected
        assert encode(cells.int(), None, depth, order).tolist() == expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_code_once(order, depth):
    codes = encode(all_cells(depth), None, depth, order)
    assert torch.equal(codes.sort().values, torch.arange(8**depth))


@pytest.mark.parametrize("order", ["hilbert", "hilbert-trans"])
def test_hilbert_neighbours_share_a_face(order):
    cells, _ = decode(torch.arange(8**4), 4, order)
    assert torch.equal(cells.diff(dim=0).abs().sum(1), torch.ones(8**4 - 1, dtype=torch.int64))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 5, 16])
def test_decode_is_the_inverse(order, depth):
    cells = torch.randint(0, 1 << depth, (200, 3))
    batch = torch.randint(0, 9, (200,))
    back, which = decode(encode(cells, batch, depth, order), depth, order)
    assert torch.equal(back, cells)
    assert torch.equal(which, batch)


@pytest.mark.parametrize("order", ORDERS)
def test_a_shifted_code_names_the_enclosing_cube(order):
    cells = all_cells(4)
    for k in (1, 2, 3):
        pairs = torch.stack([encode(cells, None, 4, order) >> 3 * k, z_order(cells >> k)], 1)
        assert len(torch.unique(pairs, dim=0)) == 8 ** (4 - k)
        assert len(torch.unique(pairs[:, 0])) == 8 ** (4 - k)


def test_input_is_left_alone_and_may_be_empty_or_single():
    for n in (0, 1, 2):
        cells = torch.full((n, 3), 5, dtype=torch.int32)
        assert hilbert(cells, 3).shape == encode(cells, None, 3, "hilbert").shape == (n,)
        assert (cells == 5).all()


def test_bad_input():
    one = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown order 'z_trans': choose from z, z-trans"):
        encode(one, None, 3, "z_trans")
    with pytest.raises(ValueError, match="start at 0, got -1"):
        encode(one - 1, None, 3, "z")
    with pytest.raises(
        ValueError,
        match="too large for the code depth: 9 voxels along an axis, at most 8 .*grid_size",
    ):
        encode(one + 8, None, 3, "z")
    with pytest.raises(ValueError, match="65537 voxels along an axis, at most 65535 .*crop"):
        encode(one + 65536, None, 17, "hilbert")
    assert int(encode(one, torch.tensor([2**15 - 2]), 16, "z")) == (2**15 - 2) << 48
    with pytest.raises(ValueError, match="smaller batches"):
        encode(one, torch.tensor([2**15 - 1]), 16, "z")
