"""Run folder from an object store: ``allometry fetch``."""

from __future__ import annotations

from allometry.launch.command import Report
from allometry.launch.runs.commands import Fetch
from allometry.trainer.state.remote import Store, fetch


def fetched(asked: Fetch) -> Report:
    """Download an upload into a new run folder."""
    step = fetch(Store.of(asked.url, "URL"), asked.folder, asked.step)
    facts = {"folder": str(asked.folder), "step": step}
    return Report(
        facts, f"{asked.folder} stands at step {step}; train with run.folder={asked.folder}"
    )
