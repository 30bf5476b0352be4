"""Tokenizer of a run and its end-of-document token, taken from the data and kept in the run folder.

A run folder contains ``tokenizer.json``, the files that list its special tokens, and a
``tokenizer`` entry in run.json, so that the folder can be moved and converted.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.data.manifest import MANIFEST, read_manifest
from allometry.data.tokenizer import (
    BESIDE,
    TOKENIZER,
    difference,
    fingerprint,
    read_tokenizer_json,
    tokenizer_file,
)

_RUN = "run.json"


@dataclass(frozen=True)
class RunTokenizer:
    """Tokenizer file of a run, and its end-of-document token ``end`` with the token's id.

    ``unknown`` has one sentence for each of ``file`` and ``end`` that is None, with the reason.
    """

    file: Path | None = None
    end: tuple[str, int] | None = None
    unknown: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the ``tokenizer`` entry of run.json (JSON)."""
        return {
            "file": None if self.file is None else TOKENIZER,
            "sha256": None if self.file is None else fingerprint(read_tokenizer_json(self.file)),
            "end_of_document": None if self.end is None else self.end[0],
            "end_of_document_id": None if self.end is None else self.end[1],
            "unknown": list(self.unknown),
        }

    def keep(self, folder: Path) -> None:
        """Copy the tokenizer and the files next to it into ``folder``."""
        if self.file is None or self.file.parent.resolve() == folder.resolve():
            return
        for name in (TOKENIZER, *BESIDE):
            source = self.file if name == TOKENIZER else self.file.parent / name
            if source.is_file():
                shutil.copyfile(source, folder / name)

    def told(self, tokenizer: str | None, end: str | None, vocab_size: int) -> RunTokenizer:
        """Return the tokenizer completed by ``--tokenizer`` and ``--end-of-document`` of the user.

        Raises:
            UserError: the tokenizer gives other ids than the known one or has more ids than the
                model's ``vocab_size``, or the end-of-document token is not one of its tokens or not
                the known one.
        """
        from allometry.data.special_tokens import load_tokenizer, vocabulary_bound

        file, known = self.file, self.end
        if tokenizer is not None:
            file = tokenizer_file(tokenizer)
            given = read_tokenizer_json(file)
            different = difference(given, read_tokenizer_json(self.file)) if self.file else None
            if different is not None:
                raise UserError(
                    f"--tokenizer={tokenizer} is another tokenizer than the run's, {self.file} "
                    f"(its {different} differs); leave it out"
                )
            bound = vocabulary_bound(load_tokenizer(file))
            if bound > vocab_size:
                raise UserError(
                    f"--tokenizer={tokenizer} has {bound} ids, but model.vocab_size={vocab_size}; "
                    "give the one that the run was trained with"
                )
        if end is not None:
            if file is None:
                raise UserError(
                    f"--end-of-document={end} needs the tokenizer that it is a token of; give it "
                    "with --tokenizer"
                )
            number = load_tokenizer(file).token_to_id(end)
            if number is None:
                raise UserError(f"--end-of-document={end} is not a token of {file}; name one")
            if known is not None and known != (end, number):
                raise UserError(
                    f"--end-of-document={end} ({number}) is not the token that ends the documents "
                    f"of the run, {known[0]} ({known[1]}); leave it out"
                )
            known = end, int(number)
        return RunTokenizer(file, known, _unknown(file, known, self.unknown))


def tokenizer_of(data: SequenceData | DocumentData) -> RunTokenizer:
    """Return the tokenizer that a run's data name, with facts from adjacent manifests."""
    file, named = None, "data.tokenizer names none"
    if data.tokenizer is not None:
        path = tokenizer_file(data.tokenizer)
        file, named = path if path.is_file() else None, f"there is no {path}"
    ends: dict[tuple[str, int], str] = {}
    without = []
    for source in data.sources:
        folder = Path(source.train).parent
        manifest = read_manifest(folder)
        if manifest is None:
            without.append(str(folder / MANIFEST))
            continue
        record = manifest.tokenizer
        ends.setdefault((record.end_of_document, record.end_of_document_id), source.name)
        beside = folder / record.file
        if file is None and beside.is_file():
            same = fingerprint(read_tokenizer_json(beside)) == record.sha256
            file = beside if same else None
    why = []
    if file is None:
        why.append(f"tokenizer: not known, as {named} and none stands beside the token files")
    if len(ends) > 1:
        listed = ", ".join(f"{end} ({number}) of {ends[end, number]}" for end, number in ends)
        why.append(f"end of documents: not known, as sources have different ones: {listed}")
    elif not ends:
        why.append(f"end of documents: not known, as there is no {without[0]}")
    return RunTokenizer(file, next(iter(ends)) if len(ends) == 1 else None, tuple(why))


def tokenizer_that_agrees(data: SequenceData | DocumentData, source: Path) -> Path | None:
    """Return the tokenizer.json in the folder ``source`` of a model or a run, None without one.

    Raises:
        UserError: ``data`` were made with another tokenizer, as far as that is known.
    """
    path = source / TOKENIZER
    if not path.exists():
        return None
    if data.tokenizer is not None:
        read_tokenizer_json(data.tokenizer)
    named, different = tokenizer_of(data).file, None
    if named is not None:
        different = difference(read_tokenizer_json(named), read_tokenizer_json(path))
    if different is not None:
        raise UserError(
            f"the data's tokenizer {named} is another tokenizer than {path}, with which the model "
            f"was trained (its {different} differs); prepare the data with --tokenizer={path}"
        )
    return path


def tokenizer_of_run(folder: Path, data: SequenceData | DocumentData) -> RunTokenizer:
    """Return the tokenizer in a run's folder, completed from its data.

    A tokenizer in the folder that differs from the stored one is ignored.
    """
    record: dict[str, Any] = {}
    if (folder / _RUN).is_file():
        try:
            record = read_object(folder / _RUN).get("tokenizer", {})
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / _RUN} cannot be read ({error}); restore it") from None
    file: Path | None = folder / TOKENIZER if (folder / TOKENIZER).is_file() else None
    known, changed = record.get("sha256"), ""
    if file is not None and known and fingerprint(read_tokenizer_json(file)) != known:
        changed = f"tokenizer: not known, as {file} is not the one that run.json records"
        file = None
    end = None
    if record.get("end_of_document") is not None:
        end = record["end_of_document"], record["end_of_document_id"]
    if file is not None and end is not None:
        return RunTokenizer(file, end)
    found = tokenizer_of(data)
    file, end = file or found.file, end or found.end
    why = [changed if changed and one.startswith("tokenizer:") else one for one in found.unknown]
    return RunTokenizer(file, end, _unknown(file, end, tuple(why)))


def _unknown(file: Path | None, end: object, before: tuple[str, ...]) -> tuple[str, ...]:
    """Return the entries of ``before`` that are still unknown."""
    still = {"tokenizer": file is None, "end of documents": end is None}
    return tuple(why for why in before if still[why.split(":")[0]])
