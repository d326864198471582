"""Run a script after `pointcept.models` is imported: `tools/test.py` of 1.6.0 starts a circle of imports otherwise.

`python -m tests.contract.run tests/contract/models_first.py SCRIPT ARGS...`
"""

import runpy
import sys

if __name__ == "__main__":
    import pointcept.models  # noqa: F401

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
