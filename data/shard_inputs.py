"""Find the shards that a request names, and check that each is complete."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.data.corpora import named_input
from allometry.data.examine import Examination
from allometry.data.manifest import Split


@dataclass
class SplitShards:
    """Shards of one split of a source, in order of their names."""

    name: str
    split: Split
    pattern: str
    prefixes: list[Path]
    found: list[Examination] = field(default_factory=list)

    @property
    def stem(self) -> str:
        """File name of the split without ending, such as "web.train"."""
        return f"{self.name}.{self.split}"

    @property
    def filled(self) -> list[tuple[Path, Examination]]:
        """Shards that contain tokens."""
        pairs = zip(self.prefixes, self.found, strict=True)
        return [(prefix, one) for prefix, one in pairs if one.tokens]

    @property
    def empty(self) -> list[str]:
        """Shards without tokens."""
        pairs = zip(self.prefixes, self.found, strict=True)
        return [str(prefix) for prefix, one in pairs if not one.tokens]

    def fingerprint(self) -> str:
        """SHA-256 of the shards' names, sizes and modification times."""
        digest = hashlib.sha256()
        for prefix in self.prefixes:
            digest.update(f"{prefix}\0{state_of(prefix)}\n".encode())
        return digest.hexdigest()


def find_shards(shards: tuple[str, ...], validation: tuple[str, ...]) -> list[SplitShards]:
    """Return the shards that match the patterns, by split and source.

    For example, ``find_shards(("web=shards/*.idx",), ())`` returns the training split of source
    "web".

    Raises:
        UserError: no shard matches, a shard lacks its .bin or .idx, or a shard is in both splits.
    """
    splits: dict[str, SplitShards] = {}
    both: tuple[tuple[Split, tuple[str, ...]], ...] = (
        ("train", shards),
        ("validation", validation),
    )
    for split, values in both:
        for value in values:
            name, pattern = named_input(value)
            one = SplitShards(name, split, str(Path(pattern).absolute()), _prefixes(pattern))
            if one.stem in splits:
                raise UserError(
                    f"two inputs give the {split} split of source {name!r} (the second is "
                    f"{value}); name one of them with NAME=PATTERN"
                )
            if split == "validation" and f"{name}.train" not in splits:
                raise UserError(
                    f"--validation {value} is of source {name!r}, of which no shards to train on "
                    f"are given; name it {name}=PATTERN as one of those"
                )
            splits[one.stem] = one
    if not splits:
        raise UserError("no shards are given; name some, such as web='shards/*.idx'")
    train = {prefix for one in splits.values() if one.split == "train" for prefix in one.prefixes}
    for one in splits.values():
        twice = [prefix for prefix in one.prefixes if prefix in train]
        if one.split == "validation" and twice:
            raise UserError(
                f"shard {twice[0]} is among those to train on and those held out; name others with "
                "--validation"
            )
    return list(splits.values())


def _prefixes(pattern: str) -> list[Path]:
    """Return the shards of a folder or of a pattern of .idx files, by name."""
    where = f"{pattern}/**/*.idx" if Path(pattern).is_dir() else pattern
    if not where.endswith(".idx"):
        raise UserError(f"shards {pattern} are named by their indices; give {pattern}*.idx")
    found = {ending: _stems(where[:-4], ending) for ending in (".idx", ".bin")}
    if not found[".idx"]:
        raise UserError(f"no shard matches {where}; give a pattern of .idx files or their folder")
    alone = sorted(found[".idx"] ^ found[".bin"])
    if alone:
        has, lacks = (".idx", ".bin") if alone[0] in found[".idx"] else (".bin", ".idx")
        raise UserError(
            f"shard {alone[0]}{has} has no {lacks}, as of a task that did not finish; let it "
            f"finish, or remove the file ({len(alone):,} such)"
        )
    return [Path(prefix) for prefix in sorted(found[".idx"])]


def _stems(pattern: str, ending: str) -> set[str]:
    return {
        str(Path(path).absolute()).removesuffix(ending)
        for path in glob.glob(pattern + ending, recursive=True)
    }


def state_of(prefix: Path) -> str:
    """Return sizes and modification times of a shard's files; UserError if a file is missing."""
    parts = []
    for ending in (".bin", ".idx"):
        try:
            status = os.stat(f"{prefix}{ending}")
        except OSError as error:
            raise UserError(
                f"shard {prefix}{ending} cannot be read ({error.strerror}); bring it back, or name "
                "shards without it"
            ) from None
        parts.append(f"{status.st_size}:{status.st_mtime_ns}")
    return " ".join(parts)
