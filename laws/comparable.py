"""Comparability of the losses of several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from allometry.configs.errors import UserError
from allometry.laws.losses import LossChoice, shares, validation_weights
from allometry.laws.runs import Run


def check_comparable(runs: Sequence[Run], choice: LossChoice) -> None:
    """Check that the losses of runs are measured on the same tokens, in the same sequences.

    Raises UserError: two runs differ in tokenizer or sequence length; for held-out losses in the
    held-out files or the number of their sequences; for losses of the mixture in the shares of
    their sources. The message names both runs and the remedy.
    """
    held_out = choice.kind == "validation"
    checks: list[tuple[str, Callable[[Run], Any], str]] = [
        ("tokenizers", _tokenizers, "a loss per token depends on what a token is"),
        (
            "data.sequence_length",
            lambda run: (
                _last_stage(run).get("sequence_length") or run.config["data"]["sequence_length"]
            ),
            "tokens are predicted from other contexts",
        ),
    ]
    if held_out:
        checks += [
            (
                "held-out tokens",
                lambda run: _held_out_files(run, choice.source),
                "their losses are of other texts",
            ),
            (
                "evaluation.sequences_per_source",
                lambda run: run.config.get("evaluation", {}).get("sequences_per_source"),
                "their losses are of other parts of the held-out tokens",
            ),
        ]
    if choice.source is None:
        checks.append(
            (
                "shares of their sources",
                validation_weights if held_out else shares,
                "their losses are of other mixtures; choose one source's "
                f"(--loss {choice.kind}/NAME)",
            )
        )
    for what, value, why in checks:
        first = value(runs[0])
        for run in runs[1:]:
            if (other := value(run)) != first:
                raise UserError(
                    f"{runs[0].folder} and {run.folder} differ in {what} ({first} and {other}): "
                    f"{why}; give runs that agree in it"
                )


def _tokenizers(run: Run) -> str:
    """Return the tokenizers' shortened fingerprints, "unknown" if token files have none."""
    parts = [source["train"] for source in run.record["data"]["sources"].values()]
    known = {str(part["tokenizer_sha256"])[:12] for part in parts if part.get("tokenizer_sha256")}
    return ", ".join(sorted(known)) or "unknown"


def _held_out_files(run: Run, only: str | None) -> dict[str, str]:
    return {
        name: str(source["validation"]["fingerprint"])
        for name, source in run.record["data"]["sources"].items()
        if source.get("validation") is not None and only in (None, name)
    }


def _last_stage(run: Run) -> dict[str, Any]:
    """Return the changes of data in the last stage of a run."""
    return {} if not run.config.get("stages") else run.config["stages"][-1].get("data") or {}
