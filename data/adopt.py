"""``allometry adopt``: create one source from shards of token files, without copying them."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.data.encode import Workers
from allometry.data.examine import Examination, examine
from allometry.data.joined import write_joined_index
from allometry.data.lock import locked
from allometry.data.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
    read_manifest,
)
from allometry.data.output import (
    copy_tokenizer,
    publish,
    refuse_to_overwrite,
    tokenizer_record,
    versions,
    write_manifest,
)
from allometry.data.progress import ProgressReport
from allometry.data.shard_inputs import SplitShards, find_shards, state_of
from allometry.data.shards import Shard, ShardList, shards_path
from allometry.data.store import TokenStore
from allometry.data.writer import file_record

_PARTIAL = ".adopting"
_JOURNAL = "examined.jsonl"
_EMPTY = "shard without documents"
_PLACES_KEPT = 5


@dataclass(frozen=True)
class AdoptRequest:
    """Request of ``adopt``.

    ``shards`` are ``name=pattern`` or ``pattern`` of .idx files, or a folder of them, as written by
    Megatron, datatrove and NeMo Curator; ``validation`` are held-out shards of sources that
    ``shards`` names. ``tokenizer``: the tokenizer.json of the shards. ``processes`` None uses all
    cores.
    """

    shards: tuple[str, ...]
    out: str
    tokenizer: str
    validation: tuple[str, ...] = ()
    end_of_document: str | None = None
    allow_inner_ends: bool = False
    allow_missing_ends: bool = False
    processes: int | None = None


def adopt(request: AdoptRequest, quiet: bool = False) -> Manifest:
    """Write ``out``/NAME.<train|validation>.{idx,shards.json}, tokenizer.json and manifest.json.

    Each shard is read once: index, sizes, ids and document ends are checked, and its SHA-256 is
    recorded. Shards are not moved or copied. A repeated request returns the manifest; an
    interrupted request continues with the shards that were not read.

    Raises:
        UserError: shards cannot be used, or ``out`` has files of another request.
    """
    splits = find_shards(request.shards, request.validation)
    out = Path(request.out)
    with ProgressReport(quiet=quiet) as report, locked(out):
        return _Adoption(request, splits, out, report).run()


class _Adoption:
    """One run of ``adopt``; ``partial`` keeps the results of shards over interruptions."""

    def __init__(
        self, request: AdoptRequest, splits: list[SplitShards], out: Path, report: ProgressReport
    ) -> None:
        self.request, self.splits, self.out, self.report = request, splits, out, report
        self.partial = out / _PARTIAL

    def run(self) -> Manifest:
        stems = [split.stem for split in self.splits]
        names = [f"{stem}{end}" for stem in stems for end in (".idx", ".shards.json", ".bin")]
        before = read_manifest(self.out)
        if before is None and not (self.partial / MANIFEST).is_file():
            refuse_to_overwrite(self.out, names)
        self.partial.mkdir(exist_ok=True)
        for path in self.partial.iterdir():
            if path.name != _JOURNAL:
                path.unlink()
        copy_tokenizer(self.request.tokenizer, self.partial)
        tokenizer = tokenizer_record(
            self.partial, self.request.tokenizer, self.request.end_of_document
        )
        identity = self._identity(tokenizer)
        if before is not None:
            shutil.rmtree(self.partial)
            return self._same(before, identity)
        self._examine(tokenizer)
        manifest = self._write(tokenizer, identity)
        kept = [path.name for path in self.partial.iterdir() if path.name != _JOURNAL]
        publish(self.partial, self.out, kept)
        shutil.rmtree(self.partial)
        return manifest

    def _identity(self, tokenizer: TokenizerRecord) -> dict[str, Any]:
        """Return the settings that determine the files of a request (JSON)."""
        return {
            "inputs": {split.stem: f"shards {split.pattern}" for split in self.splits},
            "shards": {split.stem: split.fingerprint() for split in self.splits},
            "tokenizer": {"sha256": tokenizer.sha256},
            "end_of_document": tokenizer.end_of_document,
            "allow_inner_ends": self.request.allow_inner_ends,
            "allow_missing_ends": self.request.allow_missing_ends,
        }

    def _same(self, manifest: Manifest, identity: dict[str, Any]) -> Manifest:
        for key, value in identity.items():
            if manifest.request.get(key) != value:
                changed = f"{key}={manifest.request.get(key)}, not {value}"
                if key == "shards" and manifest.request.get("inputs") == identity["inputs"]:
                    changed = "shards that have changed since, or others"
                raise UserError(
                    f"folder {self.out} was made of {changed}; choose another output folder or "
                    "remove this one"
                )
        for split in self.splits:
            TokenStore(self.out / split.stem)
        self.report.say(f"{self.out} is already made of the same shards; nothing to do")
        return manifest

    def _examine(self, tokenizer: TokenizerRecord) -> None:
        """Examine each shard that is not in the journal yet."""
        prefixes = list(dict.fromkeys(one for split in self.splits for one in split.prefixes))
        known = self._journal(tokenizer)
        states = {prefix: state_of(prefix) for prefix in prefixes}
        found = {p: known[str(p), states[p]] for p in prefixes if (str(p), states[p]) in known}
        missing = [prefix for prefix in prefixes if prefix not in found]
        if found:
            self.report.say(f"{len(found):,} of {len(prefixes):,} shards were examined before")
        sizes = {prefix: Path(f"{prefix}.bin").stat().st_size for prefix in missing}
        self.report.begin("examining shards", sum(sizes.values()))
        look = functools.partial(examine, tokenizer.end_of_document_id, tokenizer.vocab_size)
        processes = self.request.processes or len(os.sched_getaffinity(0))
        with (
            (self.partial / _JOURNAL).open("a", encoding="utf-8") as journal,
            Workers(min(processes, max(1, len(missing)))) as workers,
        ):
            journal.write("\n")  # ends a line that was cut by an interruption
            for prefix, one in zip(missing, workers.map(look, iter(missing)), strict=True):
                found[prefix] = one
                row = {"shard": str(prefix), "state": states[prefix], **asdict(one)}
                journal.write(json.dumps({**row, **_told(tokenizer)}) + "\n")
                journal.flush()
                self.report.advance(sizes[prefix])
        for split in self.splits:
            split.found = [found[prefix] for prefix in split.prefixes]
            self._check(split, tokenizer)
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        """Raise UserError unless all shards have the same token type."""
        filled = [pair for split in self.splits for pair in split.filled]
        first, one = filled[0]
        for prefix, other in filled:
            if other.dtype != one.dtype:
                raise UserError(
                    f"shard {prefix} holds {other.dtype} and {first} {one.dtype}; tokenize all "
                    "with one tokenizer, or adopt them into two folders"
                )

    def _journal(self, tokenizer: TokenizerRecord) -> dict[tuple[str, str], Examination]:
        """Read the results of examined shards, by name and state."""
        known: dict[tuple[str, str], Examination] = {}
        path = self.partial / _JOURNAL
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
                told = {key: row.pop(key) for key in _told(tokenizer)}
                shard = row.pop("shard"), row.pop("state")
                if told == _told(tokenizer):
                    known[shard] = Examination(**row)
            except (ValueError, KeyError, TypeError):  # line that was cut by an interruption
                continue
        return known

    def _check(self, split: SplitShards, tokenizer: TokenizerRecord) -> None:
        """Raise UserError for a split without documents, or with wrong document ends."""
        filled = split.filled
        if not filled:
            raise UserError(f"{split.pattern}: none of the shards holds a document; name others")
        self._check_ends(
            split,
            {prefix: one.inner_ends for prefix, one in filled},
            f"{tokenizer.end_of_document} stands inside of documents",
            "--allow-inner-ends",
            allowed=self.request.allow_inner_ends,
        )
        self._check_ends(
            split,
            {prefix: one.missing_ends for prefix, one in filled},
            f"documents end without {tokenizer.end_of_document}",
            "--allow-missing-ends",
            allowed=self.request.allow_missing_ends,
        )

    def _check_ends(
        self, split: SplitShards, counts: dict[Path, int], what: str, option: str, *, allowed: bool
    ) -> None:
        """Report the kind and number of wrong document ends; raise UserError unless allowed."""
        total = sum(counts.values())
        if not total:
            return
        first = next(prefix for prefix, count in counts.items() if count)
        if not allowed:
            raise UserError(
                f"{split.pattern}: {what} {total:,} times, first in {first}; tokenize the text "
                f"again, name another --end-of-document, or take it as it is with {option}"
            )
        self.report.say(f"{split.stem}: {what} {total:,} times")

    def _write(self, tokenizer: TokenizerRecord, identity: dict[str, Any]) -> Manifest:
        records = {split.stem: self._write_split(split) for split in self.splits}
        sources: dict[str, SourceRecord] = {}
        for split in self.splits:
            empty = split.empty
            if empty:
                self.report.say(f"{split.stem}: left out: {len(empty):,} shards without documents")
            source = sources.setdefault(
                split.name,
                SourceRecord(
                    input=split.pattern, input_sha256=split.fingerprint(), skipped={}, splits={}
                ),
            )
            kind = f"shards of {split.split}"
            source.kinds[kind] = len(split.prefixes) - len(empty)
            if empty:
                source.skipped[_EMPTY] = source.skipped.get(_EMPTY, 0) + len(empty)
                places = source.skipped_places.setdefault(_EMPTY, [])
                places += empty[: _PLACES_KEPT - len(places)]
            source.splits[split.split] = records[split.stem]
        manifest = Manifest(
            dtype=next(one.dtype for one in self.splits[0].found if one.tokens),
            tokenizer=tokenizer,
            sources=sources,
            request=identity,
            versions=versions(),
        )
        write_manifest(self.partial, manifest)
        return manifest

    def _write_split(self, split: SplitShards) -> SplitRecord:
        """Write the index of all shards, and the list of shards."""
        filled = split.filled
        index = self.partial / f"{split.stem}.idx"
        write_joined_index(index, [Path(f"{prefix}.idx") for prefix, _ in filled])
        listed = ShardList(
            dtype=filled[0][1].dtype,
            shards=tuple(
                Shard(
                    path=_path_from(self.out, Path(f"{prefix}.bin")),
                    documents=one.documents,
                    tokens=one.tokens,
                    file=FileRecord(
                        bytes=one.bytes, sha256=one.sha256, sampled_sha256=one.sampled_sha256
                    ),
                )
                for prefix, one in filled
            ),
        )
        path = shards_path(self.partial / split.stem)
        path.write_text(listed.model_dump_json(indent=1) + "\n", encoding="utf-8")
        self.report.say(
            f"{split.stem}: {sum(one.documents for _, one in filled):,} documents, "
            f"{sum(one.tokens for _, one in filled):,} tokens in {len(filled):,} shards"
        )
        return SplitRecord(
            documents=sum(one.documents for _, one in filled),
            tokens=sum(one.tokens for _, one in filled),
            bytes=None,
            largest_id=max(one.largest_id for _, one in filled),
            files={file.name: file_record(file) for file in (index, path)},
        )


def _told(tokenizer: TokenizerRecord) -> dict[str, int]:
    """Return the settings of an examination, other than the shard."""
    return {"end": tokenizer.end_of_document_id, "ids": tokenizer.vocab_size}


def _path_from(folder: Path, file: Path) -> str:
    """Return the path of ``file`` for a list in ``folder``.

    The path is relative if both are in the parent of ``folder``, else absolute.
    """
    here, there = folder.resolve(), file.resolve()
    inside = there.is_relative_to(here.parent) and here.parent != Path(here.anchor)
    return os.path.relpath(there, here) if inside else str(there)
