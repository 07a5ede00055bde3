# SPDX-License-Identifier: Apache-2.0
"""On what kind of file system a folder lies: one behind a network is slow, and may lack locks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"}
    | {"smb3", "smbfs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
    | {"fuse.goofys", "fuse.juicefs", "fuse.mount-s3", "fuse.davfs2", "fuse.blobfuse2"}
)
"""Kinds whose files come from another machine. 9p and virtiofs show a virtual machine its own host's disk."""
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What is mounted where."""

    kind: str
    place: Path

    @property
    def is_remote(self) -> bool:
        """Whether its files come over a network."""
        return self.kind in NETWORK

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}"


def file_system(path: Path) -> FileSystem | None:
    """The file system of a path; None where the system does not tell."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    whole = path.resolve()
    found = [mount for mount in map(_parsed, lines) if mount is not None and whole.is_relative_to(mount.place)]
    found.reverse()  # of several at one place the last one covers the others, and max takes the first
    return max(found, key=lambda mount: len(mount.place.parts), default=None)


def _parsed(line: str) -> FileSystem | None:
    """One line of mountinfo: ... root PLACE options [fields] - KIND source options."""
    left, dash, right = line.partition(" - ")
    parts = left.split()
    if not dash or len(parts) < 5 or not right:
        return None
    return FileSystem(right.split()[0], Path(_ESCAPE.sub(lambda found: chr(int(found[1], 8)), parts[4])))
