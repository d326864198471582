"""Run the Triton kernels on the CPU in Triton's interpreter, in a process of their own.

    TRITON_INTERPRET=1 python interpreted.py CASES RESULTS

The interpreter has to be chosen before anything imports triton, which torch may do at any time.
CASES and RESULTS are files of torch.save: a list of (function, arguments), and of its outputs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "libs" / "pointops"))


def main(cases: str, results: str) -> None:
    """Run every case."""
    import torch
    from pointops import _kernels

    torch.set_num_threads(1)
    _kernels._CANDIDATES = 40  # several slices of queries in small examples
    outputs = []
    for name, arguments in torch.load(cases):
        result = getattr(_kernels, name)(*arguments)
        if name == "within":
            result = list(result)
        outputs.append(result)
    torch.save(outputs, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
