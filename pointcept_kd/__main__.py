"""`python -m pointcept_kd`: the same as the command `pointcept-kd`."""

import sys

from pointcept_kd.cli import main

sys.exit(main())
