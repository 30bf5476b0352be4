"""The folder of optimizer states: made only where it is meant, and on which file system it is."""

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
    """Make the last component of ``folder`` if it is missing, for this user alone.

    Refused where it is likely the name of a disk that is not mounted or is spelled otherwise: with
    another component missing, and beside mount points.

    Raises:
        UserError: so it is, or something there is not a folder.
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    if folder.parent.is_dir() and not os.path.lexists(folder):
        beside = _mounted_in(folder.parent)
        if beside is None:
            folder.mkdir(mode=0o700, exist_ok=True)  # another rank may have been first
            return
        why = f"it does not exist, and {beside} beside it is a mounted disk"
    else:
        # A broken link has a parent that is there; what is not a folder is said as the system does.
        nearest = next(each for each in folder.parents if each.exists())
        if not nearest.is_dir() or os.path.lexists(folder):
            folder.mkdir(mode=0o700, exist_ok=True)  # a folder by now, if another rank made it
            return
        why = f"{folder.parent} does not exist; the nearest folder that does is {nearest}"
    raise UserError(f"{KEY}={folder}: {why}; correct the path, mount the disk or make the folder")


class FileSystem(NamedTuple):
    """Where a folder is: the mount point, and the type as the system calls it."""

    mount: str
    kind: str

    @classmethod
    def of(cls, folder: Path, table: Path = Path("/proc/self/mountinfo")) -> FileSystem | None:
        """Return the file system of a folder that exists; None where the system does not say."""
        place, found = str(folder.resolve()), None
        with suppress(OSError, ValueError):
            for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
                before, after = line.split(" - ", 1)
                mount = before.split()[4].encode().decode("unicode_escape")
                inside = place == mount or place.startswith(mount.rstrip("/") + "/")
                if inside and (found is None or len(mount) >= len(found.mount)):
                    found = cls(mount, after.split()[0])  # of several the last is on top
        return found

    @property
    def note(self) -> str:
        """What speaks against it; empty for a local disk."""
        if self.kind in IN_MEMORY:
            return "it is in the host's memory: leave nvme out and name an amount for cpu"
        if self.kind in OVER_A_NETWORK:
            return "it is reached over the network: use a local disk"
        return ""


def described(folder: Path) -> dict[str, str]:
    """Return of a folder that exists what a record says: ``folder``, ``mount`` and so on."""
    said, system = {"folder": str(folder)}, FileSystem.of(folder)
    if system is not None:
        said |= {"mount": system.mount, "file_system": system.kind}
        said |= {"note": system.note} if system.note else {}
    return said


def _mounted_in(folder: Path) -> Path | None:
    with suppress(OSError):
        return next((each for each in sorted(folder.iterdir()) if os.path.ismount(each)), None)
    return None
