"""Puts `tools/` and `configs/` into the wheel, as `pointcept_kd/_share`; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithTools(build_py):
    """Copy both folders as they are; an editable install has them already, beside the package."""

    def run(self):
        """Build the package, then add the folders."""
        super().run()
        if not self.editable_mode:
            for source, target in self._shared():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def _shared(self):
        share = Path(self.build_lib) / "pointcept_kd" / "_share"
        for folder in ("tools", "configs"):
            for source in sorted(
                p for end in ("py", "txt") for p in (ROOT / folder).rglob(f"*.{end}")
            ):
                if source.name != "bootstrap.py":  # sets up a checkout
                    yield source, share / source.relative_to(ROOT)

    def get_outputs(self, include_bytecode=True):
        """The files that `run` writes."""
        outputs = super().get_outputs(include_bytecode)
        shared = [] if self.editable_mode else [str(target) for _, target in self._shared()]
        return [*outputs, *shared]


setup(cmdclass={"build_py": BuildWithTools})
