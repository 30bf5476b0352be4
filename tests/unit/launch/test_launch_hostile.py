"""Input files of commands, damaged in many ways, are read or refused in one sentence."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.ladder import load_ladder
from allometry.configs.loader import load
from allometry.configs.machine import load_hardware
from allometry.configs.tree import load_tree
from allometry.data.manifest import read_manifest
from allometry.data.select.scores import read_scores as read_document_scores
from allometry.data.select.scores import write_scores
from allometry.data.special_tokens import load_tokenizer
from allometry.data.store import HEADER, MAGIC, TokenStore
from allometry.data.synthetic import write_store
from allometry.data.tokenizer import read_tokenizer_json
from allometry.laws.fit.store import load_fit
from allometry.laws.ladder import load_prediction
from allometry.laws.runs import read_run
from allometry.laws.scores import read_scores
from allometry.laws.tables import read_table
from allometry.laws.trials import read_trials
from allometry.optim.schedule import read_refined
from allometry.scaling.planner import store as planner
from allometry.studies.sweeps.trials import TrialLog
from allometry.trainer.state.pins import pins
from allometry.trainer.state.status import status_of
from thinned import thinned

NUMBERS = (2**63, -1, 0, 1.5, float("nan"), float("inf"), 10**400, "x", None, [], {}, [1], True)
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "torn": b'{"kind": ',
    "null": b"null\n",
    "a number": b"7\n",
    "a word": b"word\n",
    "a list": b"[1, 2]\n",
    "an object": b"{}\n",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep, closed": b"[" * 900 + b"]" * 900 + b"\n",
    "binary": b"\xff\xfe\x00\x9c" * 40,
    "zeros": b"\0" * 1000,
    "digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "not finite": b'{"step": NaN, "loss": Infinity}\n',
    "surrogate": b'{"kind": "\\ud800"}\n',
    "two lines": b'{"axis": "width"}\n{"size": [], "log2_lr": {}, "seed": "x", "loss": []}\n',
    "yaml bomb": b"a: &a [x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b"*%c," % c * 9) for c in range(97, 105)),
}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


for number, value in enumerate(NUMBERS):
    row = {"step": value, "loss": value, "size": value, "seed": value, "log2_lr": value}
    TEXTS[f"rows {number}"] = jsonl([{"axis": value}, row, {**row, "step": 1, "tokens": value}])
    same = dict.fromkeys(("kind", "version", "fractions", "names", "mean", "sources"), value)
    kinds = ("allometry.tokens", "allometry.schedule", "allometry.fit", "tree", "ladder")
    more = {"plan": value, "data": value, "launches": value, "tokenizer": value, "model": value}
    for kind in kinds:
        whole = {**same, **more, "kind": kind, "version": 1, "run": value, "parent": value}
        TEXTS[f"{kind} {number}"] = json.dumps(whole).encode()


def table(path: Path) -> None:
    read_table([path], ["loss", "step"])


def config_beside(folder: Path) -> Path:
    (folder / "config.yaml").write_text("run: {folder: x}\n")
    return folder


def scores_beside(path: Path) -> None:
    """Try a damaged record of scores, or damaged scores with a valid record, of a valid store."""
    write_store(path.parent / "x", [[1, 2], [3]])
    store, text = TokenStore(path.parent / "x"), path.read_bytes()
    numbers = path.with_suffix(".npy")
    write_scores(store, "a", np.zeros(2), {}, out=numbers)
    (numbers if path.suffix == ".npy" else path).write_bytes(text)
    read_document_scores(numbers, store)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "scores": ("scores.jsonl", lambda path: read_scores(path.parent)),
    "trials": ("trials.jsonl", read_trials),
    "trial log": ("trials.jsonl", lambda path: TrialLog(path, {"axis": "width"})),
    "constants": ("constants.json", planner.load),
    "fit": ("fit.json", load_fit),
    "prediction": ("prediction.json", load_prediction),
    "refined schedule": ("rates.json", read_refined),
    "hardware": ("card.yaml", lambda path: load_hardware(str(path))),
    "run": ("run.yaml", load),
    "ladder": ("ladder.yaml", load_ladder),
    "tree": ("tree.yaml", load_tree),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "tokenizer": ("tokenizer.json", read_tokenizer_json),
    "loaded tokenizer": ("tokenizer.json", load_tokenizer),
    "table": ("table.jsonl", table),
    "csv table": ("table.csv", table),
    "metrics": ("metrics.jsonl", lambda path: read_run(config_beside(path.parent))),
    "config of a run": ("config.yaml", lambda path: read_run(path.parent)),
    "run.json": ("run.json", lambda path: status_of(config_beside(path.parent))),
    "rows of a status": ("metrics.jsonl", lambda path: status_of(config_beside(path.parent))),
    "events of a status": ("events.jsonl", lambda path: status_of(config_beside(path.parent))),
    "config of a status": ("config.yaml", lambda path: status_of(path.parent)),
    "record of document scores": ("x.a.scores.json", scores_beside),
    "document scores": ("x.a.scores.npy", scores_beside),
    "pin": ("pins/step-4.abc.json", lambda path: pins(path.parent.parent)),
}


SLOW = ("hardware", "tree", "ladder")  # YAML like a run's


@pytest.mark.parametrize("what", thinned(set(READERS) - set(SLOW), list(READERS)))
def test_damage_is_a_sentence(tmp_path: Path, what: str) -> None:
    name, read = READERS[what]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    wrong = []
    for how, text in TEXTS.items():
        path.write_bytes(text)
        try:
            read(path)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                wrong.append(f"{how}: {str(error)[:200]!r}")
        except BaseException as error:
            wrong.append(f"{how}: {type(error).__name__}: {str(error)[:100]}")
    assert wrong == []


def indices() -> dict[str, bytes]:
    whole = HEADER.pack(MAGIC, 1, 8, 1, 2) + struct.pack("<iqqq", 4, 0, 0, 1)
    found = {f"cut at {at}": whole[:at] for at in range(0, len(whole), 5)}
    found |= {
        f"byte {at}": whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        for at in range(len(whole))
    }
    huge = HEADER.pack(MAGIC, 1, 8, (1 << 64) - 1, (1 << 64) - 1)
    return {**found, "huge": huge, "huge with bytes": huge + bytes(100)}


def test_token_indices(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(struct.pack("<HHHH", 1, 2, 3, 4))
    for how, text in indices().items():
        (tmp_path / "x.idx").write_bytes(text)
        with pytest.raises(UserError) as caught:
            TokenStore(tmp_path / "x")
        assert "\n" not in str(caught.value), how
