"""Which scan each row of a tap belongs to, for terms that treat every scan by itself."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from pointcept_kd.host import InputError
from pointcept_kd.host.point import offset2batch

from .taps import Activation


def scan_of_rows(
    activation: Activation, batch: Mapping[str, Any], where: str
) -> Int64[Tensor, " n"]:
    """The scan of every row of an activation, int64 (n,).

    Args:
        activation: what a tap saw.
        batch: the network's input, for taps that hand out plain tensors: those of one row per point, or of one scan.
        where: the tap, for messages.

    Raises:
        InputError: for a plain tensor of another level of several scans.
    """
    if activation.batch is not None:
        return activation.batch.long()
    rows, offset = len(activation.feat), batch.get("offset")
    if offset is not None and int(offset[-1]) == rows:
        return offset2batch(offset).to(activation.feat.device)
    if offset is not None and len(offset) == 1:
        return torch.zeros(rows, dtype=torch.int64, device=activation.feat.device)
    raise InputError(
        f"tap {where} hands out a plain tensor of {rows} rows, which does not say which scan a row belongs to; "
        "tap a module that returns the whole point container"
    )
