"""A tree of files in a folder or in a zip file, and packing the one into the other."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from pointcept_kd.host import InputError
from pointcept_kd.host.checkpoint import write_atomic


class FileTree:
    """The files of a folder or of a zip file by their relative paths."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = Path(source)
        self.folders: set[str] | None = None  # of a zip file: those with an entry
        self._archive: zipfile.ZipFile | None = None
        if self.source.is_dir():
            found = (p for p in self.source.rglob("*") if p.is_file())
            self.sizes = {p.relative_to(self.source).as_posix(): p.stat().st_size for p in found}
        elif self.source.is_file():
            try:
                self._archive = zipfile.ZipFile(self.source)
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{self.source}: not a readable zip file ({error})") from error
            infos = self._archive.infolist()
            self.sizes = {i.filename: i.file_size for i in infos if not i.is_dir()}
            self.folders = {i.filename for i in infos if i.is_dir()}
        else:
            raise InputError(
                f"{self.source}: no such folder or zip file; give result/submit of a test"
            )

    def read(self, name: str) -> bytes:
        """Content of one file."""
        try:
            if self._archive is not None:
                return self._archive.read(name)
            return (self.source / name).read_bytes()
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.source}: {name} cannot be read ({error})") from error


def zip_submission(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], description: str | None = None
) -> Path:
    """Pack a submission as its server takes it: folders as entries of their own, the tree at the root of the archive.

    Args:
        description: text of a `description.txt` at the root, which SemanticKITTI's server allows.

    Raises:
        InputError: for a name that does not end in .zip, a missing or empty folder, or a full disk.
    """
    folder, path = Path(folder), Path(path)
    if path.suffix != ".zip":
        raise InputError(f"{path}: the servers take files that end in .zip")
    entries = sorted(folder.rglob("*"))
    if not any(entry.is_file() for entry in entries):
        raise InputError(
            f"{folder}: no files to pack; give the folder that holds sequences/ or lidarseg/"
        )
    skipped = path.resolve()

    def pack(file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            if description is not None:
                archive.writestr("description.txt", description)
            for entry in entries:
                if entry.resolve() == skipped or entry.name.endswith(".tmp"):
                    continue
                if description is not None and entry == folder / "description.txt":
                    continue
                archive.write(entry, entry.relative_to(folder).as_posix())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pack)
    return path
