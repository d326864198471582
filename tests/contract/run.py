"""Run a script as the main program where Pointcept works without CUDA: `python -m tests.contract.run SCRIPT ARGS...`.

POINTCEPT_ROOT names the checkout. For Pointcept's own `tools/train.py` and `tools/test.py`, and for this package's.
"""

import os
import runpy
import sys

from tests.contract import shims


def main() -> None:
    """Install the shims, say on stderr what they stand in for, and become the script."""
    if len(sys.argv) < 2 or not os.environ.get("POINTCEPT_ROOT"):
        sys.exit("usage: POINTCEPT_ROOT=CHECKOUT python -m tests.contract.run SCRIPT ARGS...")
    for line in shims.install(os.environ["POINTCEPT_ROOT"]):
        print(f"stand-in: {line}", file=sys.stderr)
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
