"""Folder of optimizer states: creation with checks against mistakes, and its file system."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from allometry.configs.errors import UserError

KEY = "parallel.zero.optimizer_states.nvme"

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
OVER_A_NETWORK = frozenset(
    {
        *("nfs", "nfs3", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph"),
        *("glusterfs", "afs", "wekafs", "pvfs2", "orangefs"),
        *(f"fuse.{kind}" for kind in ("sshfs", "glusterfs", "ceph", "s3fs", "gcsfuse", "juicefs")),
    }
)


def ready(folder: Path) -> None:
    """Create the last component of ``folder`` if missing, readable by this user only.

    The folder is not created if the path probably names an unmounted or misspelled disk: if a
    parent folder is missing, or if a sibling of ``folder`` is a mount point.

    Raises:
        UserError: the folder is not created for these reasons, or part of the path is not a folder.
        OSError: the folder cannot be created.
    """
    if folder.is_dir():
        return
    if folder.parent.is_dir() and not os.path.lexists(folder):
        beside = _mounted_in(folder.parent)
        if beside is None:
            folder.mkdir(mode=0o700, exist_ok=True)  # another rank may create it first
            return
        why = f"it does not exist, and {beside} beside it is a mounted disk"
    else:
        # For a broken link (its parent exists) or a non-folder in the path, mkdir raises the right
        # OSError.
        nearest = next(each for each in folder.parents if each.exists())
        if not nearest.is_dir() or os.path.lexists(folder):
            folder.mkdir(mode=0o700, exist_ok=True)  # another rank may create it first
            return
        why = f"{folder.parent} does not exist; the nearest folder that does is {nearest}"
    raise UserError(f"{KEY}={folder}: {why}; correct the path, mount the disk or make the folder")


class FileSystem(NamedTuple):
    """File system of a folder: mount point, and type as named by the system."""

    mount: str
    kind: str

    @classmethod
    def of(cls, folder: Path, table: Path = Path("/proc/self/mountinfo")) -> FileSystem | None:
        """Return the file system of an existing folder; None if the mount table cannot be read."""
        place, found = str(folder.resolve()), None
        with suppress(OSError, ValueError):
            for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
                before, after = line.split(" - ", 1)
                mount = before.split()[4].encode().decode("unicode_escape")
                inside = place == mount or place.startswith(mount.rstrip("/") + "/")
                if inside and (found is None or len(mount) >= len(found.mount)):
                    found = cls(mount, after.split()[0])  # the last mount covers earlier ones
        return found

    @property
    def note(self) -> str:
        """Reason not to use this file system; empty for a local disk."""
        if self.kind in IN_MEMORY:
            return "it is in the host's memory: leave nvme out and name an amount for cpu"
        if self.kind in OVER_A_NETWORK:
            return "it is reached over the network: use a local disk"
        return ""


def described(folder: Path) -> dict[str, str]:
    """Return a record of an existing folder: ``folder``, ``mount``, ``file_system``, ``note``."""
    said, system = {"folder": str(folder)}, FileSystem.of(folder)
    if system is not None:
        said |= {"mount": system.mount, "file_system": system.kind}
        said |= {"note": system.note} if system.note else {}
    return said


def _mounted_in(folder: Path) -> Path | None:
    with suppress(OSError):
        return next((each for each in sorted(folder.iterdir()) if os.path.ismount(each)), None)
    return None
