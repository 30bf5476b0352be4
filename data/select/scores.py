"""Scores of a store's documents: a file with one float per document, and a record of its origin."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from allometry.configs import json_file
from allometry.configs.base import Section
from allometry.configs.errors import UserError
from allometry.data.store import TokenStore

ENDING = ".scores.npy"
KIND = "allometry.scores"

Values = NDArray[np.float32]


class StoreRecord(Section):
    """Identity of the store whose documents were scored."""

    fingerprint: str
    documents: int
    tokens: int


class ScoresRecord(Section):
    """JSON record next to a score file.

    ``settings``: all settings of the scorer. ``unscored``: number of documents without a score.
    ``seconds``: duration of the scoring, if measured.
    """

    kind: Literal["allometry.scores"] = "allometry.scores"
    version: Literal[1] = 1
    scorer: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    settings: dict[str, Any]
    store: StoreRecord
    sha256: str
    unscored: int
    seconds: float | None = None
    versions: dict[str, str]


@dataclass(frozen=True)
class Scores:
    """Scores and their record; ``values``: one float32 per document, NaN without a score."""

    path: Path
    values: Values
    record: ScoresRecord


def scores_path(prefix: str | Path, scorer: str) -> Path:
    """Return the path of a scorer's scores next to the token files ``prefix``.bin and .idx.

    For example, ``scores_path("tokens/web.train", "betr")`` is tokens/web.train.betr.scores.npy.
    """
    return Path(f"{prefix}.{scorer}{ENDING}")


def write_scores(
    store: TokenStore,
    scorer: str,
    values: NDArray[Any],
    settings: Mapping[str, Any],
    *,
    seconds: float | None = None,
    versions: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> Scores:
    """Write scores next to ``store`` (or to ``out``), the record last.

    ``values``: one number per document, stored as float32; NaN for a document without a score.

    Raises:
        UserError: the number of values is not that of the documents, a value is infinite, all are
            NaN, or the files cannot be written.
    """
    path = scores_path(store.prefix, scorer) if out is None else out
    _check_name(path)
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(values, "<f4")
    _check_values(kept, store, f"scores for {path}")
    partial = path.with_name(path.name + ".partial")
    record_at = _record_path(path)
    with _writing(path):
        record_at.unlink(missing_ok=True)  # scores without a record are not accepted
        with partial.open("wb") as file:
            np.save(file, kept)
        os.replace(partial, path)
    try:
        record = ScoresRecord(
            scorer=scorer,
            settings=dict(settings),
            store=StoreRecord(
                fingerprint=store.fingerprint,
                documents=store.num_documents,
                tokens=store.num_tokens,
            ),
            sha256=_sha256(path),
            unscored=int(np.isnan(kept).sum()),
            seconds=seconds,
            versions={
                "python": platform.python_version(),
                "numpy": np.__version__,
                **(versions or {}),
            },
        )
    except ValidationError:
        raise UserError(
            f"{scorer!r} is no name for a scorer; use letters, digits, - and _ alone"
        ) from None
    partial = record_at.with_name(record_at.name + ".partial")
    with _writing(record_at):
        partial.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        os.replace(partial, record_at)
    return Scores(path, kept, record)


def read_scores(path: str | Path, store: TokenStore) -> Scores:
    """Read the scores of a store's documents and check them against the store.

    Raises:
        UserError: files are missing or damaged, or are of another store's documents.
    """
    path = Path(path)
    _check_name(path)
    record = _read_record(_record_path(path))
    try:
        with path.open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(
            f"scores {path} do not exist; make them with `allometry select`, or name others"
        ) from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise _damaged(path, f"cannot be read ({error})") from None
    if values.ndim != 1 or values.dtype != np.dtype("<f4"):
        raise _damaged(path, f"hold {values.dtype} of shape {values.shape}, not a row of float32")
    if record.store.fingerprint != store.fingerprint:
        raise UserError(
            f"scores {path} are of other documents than token files {store.prefix} hold (of a "
            f"store of fingerprint {record.store.fingerprint}, and this one's is "
            f"{store.fingerprint}); score this store, or name the scores that belong to it"
        )
    if _sha256(path) != record.sha256:
        raise _damaged(path, "are not those that their record describes")
    _check_values(values, store, f"scores {path}")
    return Scores(path, values, record)


def _check_name(path: Path) -> None:
    if not path.name.endswith(ENDING):
        raise UserError(f"{path} cannot be scores, whose files end in {ENDING}; name one of these")


def _check_values(values: Values, store: TokenStore, what: str) -> None:
    if values.shape != (store.num_documents,):
        raise UserError(
            f"{what} have {values.size} values, but token files {store.prefix} hold "
            f"{store.num_documents} documents; give one for each"
        )
    if np.isinf(values).any():
        document = int(np.argmax(np.isinf(values)))
        raise UserError(
            f"{what} hold an infinite number, of document {document}; give finite ones, and nan "
            "where a document has none"
        )
    if np.isnan(values).all():
        raise UserError(f"{what} hold no number at all; score at least one document")


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_record(path: Path) -> ScoresRecord:
    try:
        return ScoresRecord.model_validate(json_file.read_object(path))
    except FileNotFoundError:
        raise UserError(
            f"{path}, the record of these scores, does not exist; make them with `allometry "
            "select`, or copy both files"
        ) from None
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        raise _damaged(path, f"cannot be read ({str(error).splitlines()[0]})") from None


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"scores {path} {how}; copy both files again, or score the store again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from None
