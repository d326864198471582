"""A batch of point clouds on its way through a network, and the modules that pass it on.

`Point` is a dict with attribute access, as Pointcept's is: networks, hooks and distillers read `point.feat` or
`point["feat"]`. Two of its entries hold features, `feat` and the sparse tensor `sparse_conv_feat`; `PointSequential`
keeps the two in step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from addict import Dict
from torch import Tensor, nn

from pointcept_kd.ops.attention import PatchLayout, patch_layout
from pointcept_kd.ops.curves import encode
from pointcept_kd.ops.sparse import SparseConvTensor, SparseModule

from .errors import InputError
from .joint import joint_generator, joint_max


def offset2bincount(offset: Tensor) -> Tensor:
    """Points per sample, from the cumulative end of each sample."""
    return torch.diff(offset, prepend=offset.new_zeros(1))


def bincount2offset(bincount: Tensor) -> Tensor:
    """Cumulative end of each sample, from the points per sample."""
    return torch.cumsum(bincount, 0)


def offset2batch(offset: Tensor) -> Tensor:
    """Sample index of each point, int64 (n,)."""
    return torch.repeat_interleave(offset2bincount(offset))


def batch2offset(batch: Tensor, size: int = 0) -> Tensor:
    """Cumulative end of each sample, int64.

    `size` is the number of samples where it is known: empty samples at the end leave no trace in `batch`.
    """
    return torch.cumsum(torch.bincount(batch, minlength=size), 0)


class Point(Dict):
    """A batch dict that knows its serialised orders and its sparse tensor.

    Always present: `batch` (n,) int64 and `offset` (b,) int64; each is derived from the other.
    After `serialization`: `order` (k names, one for each row of the following), `serialized_depth`,
    `serialized_code`, `serialized_order`, `serialized_inverse`, each of the latter three int64 (k, n).
    After `sparsify`: `sparse_shape`, `sparse_conv_feat`.
    Reading a missing attribute creates an empty one (addict's way), so test with `"name" in point`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if "batch" not in self and "offset" in self:
            self["batch"] = offset2batch(self["offset"])
        elif "offset" not in self and "batch" in self:
            self["offset"] = batch2offset(self["batch"])

    def serialization(
        self,
        order: str | Sequence[str] = "z",
        depth: int | None = None,
        shuffle_orders: bool = False,
    ) -> None:
        """Sort the points along space-filling curves.

        Needs `grid_coord`, or `coord` and `grid_size`. Equal codes (one voxel, several points) keep the points' order.

        Args:
            order: names from `pointcept_kd.ops.curves.ORDERS`.
            depth: bits per axis; by default as many as the largest index + 1 has.
            shuffle_orders: permute the rows, with the CPU generator.

        Raises:
            InputError: for an empty batch, for a cloud too large for the codes, and without coordinates.
        """
        self._voxelise()
        cells, batch = self["grid_coord"], self["batch"]
        if cells.shape[0] == 0:
            raise InputError(
                "the batch has no points; check the crop, the range filter and the input files"
            )
        if cells.shape[0] != batch.shape[0]:
            raise InputError(
                f"offset ends at {batch.shape[0]} but grid_coord has {cells.shape[0]} rows; offset is the cumulative "
                "end of each sample"
            )
        if depth is None:
            depth = joint_max(int(cells.max() + 1).bit_length())
        names = [order] if isinstance(order, str) else list(order)
        try:
            code = torch.stack([encode(cells, batch, depth, name) for name in names])
        except ValueError as error:
            raise InputError(str(error)) from error
        self["order"] = names
        self["serialized_depth"] = depth
        self.sort_codes(code, shuffle_orders)

    def sort_codes(self, code: Tensor, shuffle_orders: bool = False) -> None:
        """Set the serialised entries from the codes (k, n), after permuting the rows if asked."""
        if shuffle_orders and code.shape[0] > 1:
            rows = torch.randperm(code.shape[0], generator=joint_generator())
            code = code[rows.to(code.device)]
            self["order"] = [self["order"][i] for i in rows.tolist()]
        # Row by row: sorting a vector of integers has a faster route than sorting a matrix.
        order = torch.stack([torch.sort(row, stable=True).indices for row in code])
        place = torch.arange(code.shape[1], device=code.device).expand_as(order)
        self["serialized_code"] = code
        self["serialized_order"] = order
        self["serialized_inverse"] = torch.empty_like(order).scatter_(1, order, place)
        self["patch_layouts"] = {}

    def patches(self, patch_size: int, order_index: int) -> PatchLayout:
        """The attention patches along one of the serialised orders, kept for the next block that asks.

        The patch size is part of the key: encoder and decoder may cut one level differently.
        """
        kept = self["patch_layouts"]
        key = (patch_size, order_index)
        if key not in kept:
            if patch_size not in kept:
                counts = offset2bincount(self["offset"]).tolist()
                kept[patch_size] = patch_layout(counts, patch_size, self["batch"].device)
            kept[key] = kept[patch_size].through(
                self["serialized_order"][order_index], self["serialized_inverse"][order_index]
            )
        return kept[key]

    def sparsify(self, pad: int = 96) -> None:
        """Make the sparse tensor of `feat` on `grid_coord`; its grid ends `pad` cells behind the largest index."""
        self._voxelise()
        cells, batch = self["grid_coord"], self["batch"]
        if cells.shape[0] == 0:
            raise InputError(
                "the batch has no points; check the crop, the range filter and the input files"
            )
        self["sparse_shape"] = [high + pad for high in cells.amax(0).tolist()]
        self["sparse_conv_feat"] = SparseConvTensor(
            features=self["feat"],
            indices=torch.cat([batch[:, None], cells], 1).int(),
            spatial_shape=self["sparse_shape"],
            # From offset: the last sample of a batch may be empty.
            batch_size=self["offset"].shape[0],
        )

    def _voxelise(self) -> None:
        """Make `grid_coord` where the batch has none."""
        if "grid_coord" in self:
            return
        if "coord" not in self or "grid_size" not in self:
            raise InputError(
                "the batch has neither grid_coord nor coord with grid_size; collect grid_coord in the transforms "
                "(GridSample returns it)"
            )
        coord, batch = self["coord"], self["batch"]
        # From each sample's own minimum: one sample's voxels do not depend on the others of its batch.
        lowest = coord.new_full((self["offset"].shape[0], 3), torch.inf)
        lowest = lowest.scatter_reduce(0, batch[:, None].expand(-1, 3), coord, "amin")
        size = torch.as_tensor(self["grid_size"], dtype=coord.dtype, device=coord.device).reshape(
            -1, 1
        )
        size = size[batch] if size.shape[0] > 1 else size
        self["grid_coord"] = torch.div(coord - lowest[batch], size, rounding_mode="trunc").long()


class PointModule(nn.Module):
    """Marks modules that take and return a `Point`."""


class PointSequential(PointModule):
    """Modules of three kinds, one behind the other.

    A `PointModule` gets the whole Point. A sparse module gets `sparse_conv_feat`, and its features become `feat`.
    Any other module gets `feat`, and `sparse_conv_feat`, where there is one, gets the new features.

    Children are given by position (named "0", "1", ...), as one OrderedDict, by keyword, or with `add`.
    """

    def __init__(self, *args: nn.Module | OrderedDict, **kwargs: nn.Module) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], OrderedDict):
            args, kwargs = (), {**args[0], **kwargs}
        for module in args:
            self.add(module)
        for name, module in kwargs.items():
            self.add(module, name)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self._modules.values())[index]

    def add(self, module: nn.Module, name: str | None = None) -> None:
        """Append a module, by default under the next number.

        Raises:
            ValueError: for a name that is taken.
        """
        name = str(len(self)) if name is None else name
        if name in self._modules:
            raise ValueError(f"{name!r} is in this PointSequential already")
        self.add_module(name, module)

    def forward(self, point: Point) -> Point:
        """Run the children in turn; the Point is changed in place and returned."""
        for module in self._modules.values():
            if isinstance(module, PointModule):
                point = module(point)
            elif isinstance(module, SparseModule):
                sparse = module(point["sparse_conv_feat"])
                point["sparse_conv_feat"], point["feat"] = sparse, sparse.features
            else:
                point["feat"] = module(point["feat"])
                if "sparse_conv_feat" in point:
                    point["sparse_conv_feat"] = point["sparse_conv_feat"].replace_feature(
                        point["feat"]
                    )
        return point
