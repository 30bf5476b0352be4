"""What watches a run: hooks, and the ones that come along (display, TensorBoard, W&B)."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.configs.execution import RecordConfig, WandB
from allometry.configs.format import duration, human
from allometry.laws.runs import read_lines
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Recorder, Row
from allometry.trainer.state.folder import RunFolder, write_atomically

_log = logging.getLogger(__name__)


class Callback:
    """What happens around steps besides training; each method here does nothing.

    A run's callbacks are called in the order of their list. Those that take part in training or
    talk between ranks stand in the list of every rank; those that only write stand in the main
    rank's alone.
    """

    adds_to_skipped = False
    """Whether ``additions`` is called for steps that made no update, too."""

    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """On the main rank, before this launch's first step; ``facts``: what run.json says."""

    def before_step(self, step: int) -> None:
        """Before a step; its time counts as the step's."""

    def after_step(self, step: int) -> None:
        """After a step was queued: gradients are there, clipped; its time counts as the step's."""

    def needs_numbers(self, step: int, *, last: bool) -> bool:
        """Whether all numbers up to this step are to be read before another step is begun.

        ``last``: the launch ends with this step. Otherwise a GPU's are read one step later. The
        answer is the same on every rank.
        """
        return False

    def additions(self, finished: FinishedStep) -> Row:
        """What to add to the row of a step whose numbers were read and are finite.

        A step of which any callback adds something is recorded, due or not: ``recorded`` says so to
        the callbacks that follow.
        """
        return {}

    def on_row(self, row: Row) -> None:
        """On the main rank, after a row was written."""

    def between_steps(self, step: int, *, last: bool) -> None:
        """After a step and all that was read of it, before the next one."""

    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        """When something happened: a checkpoint, an alarm, a stop."""

    def finish(self) -> None:
        """When all ranks end this launch together: wait for what goes on."""

    def abort(self, seconds: float | None) -> None:
        """When an error ends this launch, maybe on this rank alone: let what goes on here end.

        It may wait ``seconds`` at most (None: as long as that takes), and not for other ranks.
        """

    def on_end(self) -> None:
        """On the main rank, when the launch is over, however it ended."""


class Reporter:
    """Writes events on the main rank and tells the callbacks of every rank.

    ``callbacks`` may be filled later; ``recorder`` is None on all ranks but the main one.
    """

    def __init__(self, recorder: Recorder | None, callbacks: Sequence[Callback]) -> None:
        self._recorder, self._callbacks = recorder, callbacks

    def __call__(self, kind: str, **details: Any) -> None:
        """Report that something happened."""
        if self._recorder is not None:
            self._recorder.event(kind, **details)
        for callback in self._callbacks:
            callback.on_event(kind, details)


_SAID = {
    "checkpoint_saved": "step {step} | checkpoint saved",
    "checkpoint_failed": "step {step} | CHECKPOINT FAILED ({reason}); earlier ones are kept",
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
    "layout_chosen": "parallel: auto chose hdp={hdp} tp={chosen[tp]} pp={chosen[pp]} "
    "ep={chosen[ep]} zero.stage={chosen[zero]}, micro-batches of {chosen[micro_batch]} and "
    "checkpointing {chosen[checkpointing]}: {reason}",
    "replicas_differ": "step {step} | REPLICAS DIFFER: {said}",
    "computed_twice_differs": "step {step} | A STEP DIFFERS THE SECOND TIME: {said}",
    "self_test_failed": "SELF-TEST FAILED: {said}",
    "cards_not_read": "GPUs are not asked for heat, clocks and ECC errors: {reason}",
    "restarted": "ranks were started again, time {count} of this launch: {reason}",
    "bad_step": "step {step} | BAD STEP ({reason}): loss {loss}, grad {grad_norm}; its update is "
    "skipped",
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
"""What is displayed of an event, by its kind."""


class Display(Callback):
    """One line each few steps, the same on a terminal and in a log file."""

    def __init__(self, every_steps: int, out: IO[str] | None = None) -> None:
        self._every, self._out = every_steps, out or sys.stdout
        self._first = self._total = 0

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        plan, layout = facts["plan"], facts["layout"]
        self._first, self._total = first_step, plan["total_steps"]
        # The degrees that are not 1, hdp always, and the pipeline's schedule.
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
        print(text, file=self._out, flush=True)


def _history(folder: RunFolder, first_step: int) -> list[Row]:
    """The rows before this launch, its trunk's too: for a page that begins with it."""
    return [row for row in read_lines(folder.metrics) if row["step"] < first_step]


class TensorBoard(Callback):
    """Scalars for TensorBoard: rows of every ``every_steps``, and those with rarer losses.

    A run that has none yet, as a branch has, begins with the rows that its folder holds.
    """

    def __init__(self, folder: RunFolder, every_steps: int) -> None:
        self._folder, self._every = folder, every_steps
        self._writer: Any = None

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Open the writer; steps that will be computed again are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = first_step if first_step > 1 else None
        new = not any(self._folder.tensorboard.glob("events.*"))
        self._writer = SummaryWriter(str(self._folder.tensorboard), purge_step=purge)
        for row in _history(self._folder, first_step) if new else ():
            self.on_row(row)

    @override
    def on_row(self, row: Row) -> None:
        step = int(row["step"])
        rare = any(key.startswith(("validation/", "forecast/")) for key in row)
        if self._writer is None or (step % self._every and not rare):
            return
        with self._unless_full():
            for key, value in row.items():
                if key != "step":
                    self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    @override
    def on_end(self) -> None:
        if self._writer is not None:
            with self._unless_full():
                self._writer.close()

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        """Give up on what the disk does not take: metrics.jsonl has it, and training goes on."""
        try:
            yield
        except OSError as error:
            self._writer = None
            _log.warning(
                "%s cannot be written (%s): this launch leaves TensorBoard out from here on, and "
                "metrics.jsonl has all",
                *(self._folder.tensorboard, error.strerror),
            )


class WeightsAndBiases(Callback):
    """Rows to Weights & Biases, at their steps; a continued run continues its page.

    Steps that are taken again after a crash have the numbers that the page has. A run that goes
    back to an earlier checkpoint begins a new page, as W&B takes no step twice, and so does a
    branch: with the rows that its folder holds.
    """

    def __init__(self, config: WandB, folder: RunFolder) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "record.wandb is set but the package wandb is not installed; "
                "pip install 'allometry[wandb]' or set record.wandb: null"
            ) from None
        self._wandb, self._config, self._folder = wandb, config, folder
        self._run: Any = None
        self._identity = folder.path / "wandb_id"

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind == "abandoned_checkpoint":  # told before ``on_start``
            self._identity.unlink(missing_ok=True)

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        new = not self._identity.exists()
        if new:
            write_atomically(self._identity, uuid.uuid4().hex[:12])
        try:
            self._run = self._wandb.init(
                **self._config.model_dump(),
                id=self._identity.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(self._folder.path),
                name=self._folder.path.name,
                config=facts,
            )
        except self._wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"record.wandb: Weights & Biases cannot be used ({reason}); log in with "
                "wandb login, set record.wandb.mode=offline, or record.wandb: null"
            ) from None
        for row in _history(self._folder, first_step) if new else ():
            self.on_row(row)

    @override
    def on_row(self, row: Row) -> None:
        self._run.log(dict(row), step=int(row["step"]))

    @override
    def on_end(self) -> None:
        if self._run is not None:
            self._run.finish()


def standard_callbacks(record: RecordConfig, folder: RunFolder) -> list[Callback]:
    """What the ``record`` section asks for."""
    chosen: list[Callback] = [Display(record.display_every_steps)]
    if record.tensorboard:
        chosen.append(TensorBoard(folder, record.display_every_steps))
    if record.wandb is not None:
        chosen.append(WeightsAndBiases(record.wandb, folder))
    return chosen
