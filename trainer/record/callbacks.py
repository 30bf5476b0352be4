"""Callbacks of a run, the reporter of events, and the printed lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import IO, Any

from typing_extensions import override

from allometry.configs.format import duration, human
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Recorder, Row

_log = logging.getLogger(__name__)


class Callback:
    """Base class of callbacks around the steps; all methods here do nothing.

    Callbacks are called in the order of their list. A callback that takes part in training or
    communicates between ranks must be in the list of every rank; a callback that only writes is in
    the list of the main rank alone. For example, a callback that adds a column overrides
    ``additions`` and returns ``{"my/column": value}``.
    """

    adds_to_skipped = False
    """True if ``additions`` is also called for steps without an update."""

    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Called on the main rank before the launch's first step, with the facts of run.json."""

    def before_step(self, step: int) -> None:
        """Called before a step; its time counts as part of the step."""

    def after_step(self, step: int) -> None:
        """Called after a step was queued, with clipped gradients; counts as part of the step."""

    def needs_numbers(self, step: int, *, last: bool) -> bool:
        """Return True if all numbers up to this step must be read before the next step begins.

        ``last``: the launch ends with this step. Otherwise a GPU's numbers are read one step later.
        The result must be the same on every rank.
        """
        return False

    def additions(self, finished: FinishedStep) -> Row:
        """Return columns to add to the row of a step whose numbers were read and are finite.

        A step to which any callback adds columns is recorded, even if it is not due; ``recorded``
        is then True for the following callbacks.
        """
        return {}

    def on_row(self, row: Row) -> None:
        """Called on the main rank after a row was written."""

    def between_steps(self, step: int, *, last: bool) -> None:
        """Called after a step and its numbers, before the next step."""

    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        """Called for each event, such as a checkpoint, an alarm or a stop."""

    def finish(self) -> None:
        """Called when all ranks end this launch together: wait for background work."""

    def abort(self, seconds: float | None) -> None:
        """Called when an error ends this launch, possibly on this rank alone.

        Background work of this rank may be completed within ``seconds`` (None: no limit), without
        waiting for other ranks.
        """

    def on_end(self) -> None:
        """Called on the main rank at the end of the launch, also after an error."""


class Reporter:
    """Writes events on the main rank and passes them to the callbacks of every rank.

    ``callbacks`` may be filled later; ``recorder`` is None except on the main rank.
    """

    def __init__(self, recorder: Recorder | None, callbacks: Sequence[Callback]) -> None:
        self._recorder, self._callbacks = recorder, callbacks

    def __call__(self, kind: str, **details: Any) -> None:
        """Report an event."""
        if self._recorder is not None:
            self._recorder.event(kind, **details)
        for callback in self._callbacks:
            callback.on_event(kind, details)


_SAID = {
    "checkpoint_saved": "step {step} | checkpoint saved",
    "checkpoint_failed": "step {step} | CHECKPOINT FAILED ({reason}); earlier ones are kept",
    "local_copy_failed": "step {step} | LOCAL COPY FAILED in {folder} ({reason})",
    "local_copy_alone": "step {step} | the neighbours of ranks {ranks} could not keep their copies",
    "local_copies_unused": "local copies that are not used: {reasons}",
    "upload_failed": "step {step} | UPLOAD FAILED to {url} ({reason}); the next is tried anew",
    "abandoned_checkpoint": "going back: a later checkpoint is kept aside as {name}",
    "started": "starting over: the last launch ended before its first checkpoint "
    "({dropped_rows} rows of its record dropped)",
    "initial": "begins with {keep} of {source}",
    "config_changed": "from step {step} on {key} is {after}; it was {before}",
    "branched": "branching from {parent} after its step {step}",
    "kernels_changed": "WARNING: {kernel} was {before} in the steps before and is {now} from step "
    "{step} on ({reason}), so that the run does not continue to the bit",
    "optimizer_states": "optimizer states of this rank: {device_bytes} bytes on the device, "
    "{cpu_bytes} in the host's memory, {nvme_bytes} in a file",
    "monitors_limited": "WARNING: monitors see {to} alone, as parallel.zero.engine=deepspeed keeps "
    "the rest to itself; absent are {absent}",
    "states_disk": "WARNING: parallel.zero.optimizer_states.nvme={folder} is on {mount} "
    "({file_system}); {note}",
    "slow_disk": "WARNING: {waited_percent:.0f}% of the time of steps was spent waiting for the "
    "disk of {folder} ({gb_per_s:.2f} GB/s); raise optimizer_states.device or .cpu, or use a "
    "faster disk",
    "states_converted": "optimizer states: {states} were converted, {change}",
    "overrides_changed": "optimizer.overrides are others from step {step} on: {frozen} parameters "
    "are frozen here, {trained} are trained again (their states begin at zero) and {multiplied} "
    "have another rate or decay",
    "same_documents": "WARNING: the run that these weights come from has read the documents of "
    "{sources} in the same order (run.seed={seed}); data.continue_sources: true goes on after "
    "them, and with another run.seed the order is another",
    "stage": "stage {name}, steps {first_step} to {last_step}: {said}",
    "forecast_of_stage": "forecasts are of step {of_step}, with which this stage ends",
    "mixture_changed": "the mixture is another one from step {step} on: {before} became {after}",
    "sources_continued": "sources go on after what earlier runs have read: epochs {epochs}",
    "advice": "WARNING: {text}",
    "repetition": "at its end the run will have read {said}",
    "overfits": "step {step} | WARNING: source {source} is learnt by heart: {epochs:.1f} epochs of "
    "it are read, its training loss falls ({training:.4f}) and its held-out loss rose in three "
    "evaluations in a row, from {held_out_before:.4f} at step {best_step} to {held_out:.4f}; the "
    "last checkpoint kept from before is {checkpoint}",
    "layout_chosen": "parallel: auto chose hdp={hdp} tp={chosen[tp]} pp={chosen[pp]} "
    "ep={chosen[ep]} zero.stage={chosen[zero]}, micro-batches of {chosen[micro_batch]} and "
    "checkpointing {chosen[checkpointing]}: {reason}",
    "replicas_differ": "step {step} | REPLICAS DIFFER: {said}",
    "computed_twice_differs": "step {step} | A STEP DIFFERS THE SECOND TIME: {said}",
    "self_test_failed": "SELF-TEST FAILED: {said}",
    "cards_not_read": "GPUs are not asked for heat, clocks and ECC errors: {reason}",
    "restarted": "ranks were started again, time {count} of this launch: {reason}",
    "bad_step": "step {step} | BAD STEP ({reason}): loss {loss:.6}, grad {grad_norm:.6}; "
    "its update is skipped",
    "steps_passed_over": "step {step} | passed over from here on, as training.skip_steps says",
    "going_back": "step {step} | GOING BACK to checkpoint step-{checkpoint} after bad steps "
    "{bad_steps}: {samples} samples after it are passed over",
    "passed_over": "from step {step} on: {samples} samples of the data were passed over here",
    "already_finished": "nothing to do: the run is complete, all {step} steps are taken",
    "straggler": "WARNING: rank {rank} ({host}) computes {percent:.0f}% longer than the others of "
    "its stage, since step {since_step} or before",
    "straggler_ended": "step {step} | rank {rank} is as fast as the others again",
    "stopped": "step {step} | stopped by {signal}; the same command continues from here",
}
"""Displayed text of an event, by its kind."""


class Display(Callback):
    """Prints one line every few steps, the same on a terminal and in a log file."""

    def __init__(self, every_steps: int, out: IO[str] | None = None) -> None:
        self._every, self._out = every_steps, out or sys.stdout
        self._first = self._total = self._unsaid = 0

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        plan, layout = facts["plan"], facts["layout"]
        self._first, self._total = first_step, plan["total_steps"]
        # The degrees other than 1, hdp always, and the pipeline schedule.
        names = [n for n in ("pp", "hdp", "tp", "ep") if n == "hdp" or layout.get(n, 1) > 1]
        axes = " ".join(f"{name}={layout[name]}" for name in names)
        axes += f" {layout['schedule']}" if "schedule" in layout else ""
        self._say(
            f"model {human(plan['parameters']['total'])} parameters | "
            f"{human(plan['total_tokens'])} tokens in {plan['total_steps']} steps | "
            f"{layout['world_size']} x {facts['hardware']['device']}, {axes}, "
            f"ZeRO {layout['zero_stage']}, {facts['compute_dtype']} | "
            f"allocator {facts['allocator']}"
        )
        if first_step > 1:
            self._say(f"continuing after step {first_step - 1}")

    @override
    def on_row(self, row: Row) -> None:
        step = int(row["step"])
        held_out = {k: v for k, v in row.items() if k.startswith("validation/")}
        if "loss" in row and (step % self._every == 0 or step in (self._first, self._total)):
            left = (self._total - step) * float(row["time_s"])
            self._say(
                f"step {step:>{len(str(self._total))}}/{self._total} | loss {row['loss']:.4f} | "
                f"lr {row['lr']:.2e} | grad {row['grad_norm']:.3f} | "
                f"{human(row['tokens'])} tokens | {human(row['tokens_per_s'])} tok/s | "
                f"mfu {100 * row['mfu']:.1f}% | {row['peak_bytes'] / 2**30:.2f} GiB | "
                f"{duration(left)} left"
            )
        if held_out:
            losses = ", ".join(f"{k.partition('/')[2]} {v:.4f}" for k, v in held_out.items())
            self._say(f"step {step} | validation loss: {losses}")
        if "forecast/loss" in row:
            self._say(
                f"step {step} | forecast of the final loss: {row['forecast/loss']:.4f} "
                f"({row['forecast/low']:.4f} to {row['forecast/high']:.4f})"
            )

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind in _SAID and (kind != "started" or details["dropped_rows"]):
            self._say(_SAID[kind].format(**details))

    def _say(self, text: str) -> None:
        try:
            print(text, file=self._out, flush=True)
        except OSError as error:  # a full disk; the record contains the same numbers
            if not self._unsaid:
                _log.warning("lines cannot be printed (%s); training goes on", error.strerror)
            self._unsaid += 1

    @override
    def on_end(self) -> None:
        if self._unsaid:
            _log.warning("%d lines could not be printed; metrics.jsonl has all", self._unsaid)
