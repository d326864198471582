"""pointcept_kd: distil big LiDAR networks into small ones.

Importing the package registers every class of its rooms, and those of installed plugins (packages with an entry point
in the group `pointcept_kd.plugins`), so that configs can name them.
"""

from importlib.metadata import entry_points

from . import data, distillers, host, networks, ops
from .host import trainer as _trainer  # noqa: F401  registers trainers, hooks and testers

__version__ = "0.1.0"

for _plugin in entry_points(group="pointcept_kd.plugins"):
    _plugin.load()

__all__ = ["__version__", "data", "distillers", "host", "networks", "ops"]
