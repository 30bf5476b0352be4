"""Files left in a run's folder by a refused or interrupted conversion.

Training in that folder would begin from random weights instead of the model's. It is therefore
refused until the conversion has succeeded or the user has removed these files.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.trainer.state.folder import RunFolder, write_atomically

REFUSED = "conversion_refused.json"


def partial_of(folder: Path) -> Path:
    """Return the temporary path of a conversion, which is renamed to ``folder`` when complete."""
    return folder.with_name(folder.name + ".partial")


def mark_refused(folder: Path, source: Path, reason: str) -> None:
    """Note in ``folder``, unless it contains a run, a refused conversion of ``source``."""
    if RunFolder(folder).is_new():
        with suppress(OSError):  # the refusal itself must still be reported
            folder.mkdir(parents=True, exist_ok=True)
            note = {"source": str(source), "reason": reason}
            write_atomically(folder / REFUSED, json.dumps(note, indent=2) + "\n")


def check_not_refused(folder: RunFolder) -> None:
    """Raise UserError if a new run would begin in the folder of a failed conversion."""
    note, partial = folder.path / REFUSED, partial_of(Path(folder.path.absolute()))
    if RunFolder(partial).checkpoints.exists():
        raise UserError(
            f"run.folder={folder.path}: a conversion into it runs or was interrupted ({partial}), "
            "and training would begin from random weights; wait, or remove that and convert again"
        )
    try:
        said = {"source": "a model", "reason": "not known"} | read_object(note)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        said = {"source": "a model", "reason": f"{note.name} cannot be read: {error}"}
    raise UserError(
        f"run.folder={folder.path}: the conversion of {said['source']} into it was refused "
        f"({said['reason']}), and training would begin from random weights; convert it again, or "
        f"remove {note} if random weights are meant"
    )
