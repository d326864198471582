"""Handing trained weights to other programs: configs of OpenPCDet's detectors, their check, and what their logs say.

Nothing here imports another room or OpenPCDet itself; `verify` runs in a process of its own.
"""

from . import detectors, kitti, yaml_text

__all__ = ["detectors", "kitti", "yaml_text"]
