"""Run a script where `.cuda()` is an error again: what serves on CPU must not call it, whatever the shims allow.

`python -m tests.contract.run tests/contract/no_cuda.py SCRIPT ARGS...`
"""

import runpy
import sys

import torch


def _refuse(*args, **kwargs):
    raise AssertionError(".cuda() was called")


if __name__ == "__main__":
    for kind in (torch.Tensor, torch.nn.Module, torch.UntypedStorage, torch.TypedStorage):
        kind.cuda = _refuse
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
