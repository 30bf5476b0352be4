"""The complete configuration of a run."""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationError, model_validator

from allometry.configs.base import Section
from allometry.configs.checkpoints import CheckpointConfig
from allometry.configs.contradictions import contradiction
from allometry.configs.data import BatchConfig, DataConfig, DocumentData
from allometry.configs.execution import EvaluationConfig, ParallelConfig, RecordConfig
from allometry.configs.kernels import KernelsConfig
from allometry.configs.lineage import RunSection
from allometry.configs.model import ModelConfig, ParameterizationConfig, StandardParameterization
from allometry.configs.optimization import OptimizerConfig, ScheduleConfig, TrainingConfig
from allometry.configs.precision import PrecisionConfig
from allometry.configs.stages import InStage, NotInStages, Stage


class RunConfig(Section):
    """Complete configuration of a run, stored as one file in the run folder."""

    run: RunSection
    model: ModelConfig = Field(discriminator="kind")
    parameterization: ParameterizationConfig = Field(default_factory=StandardParameterization)
    data: DataConfig
    batch: BatchConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)
    stages: tuple[Stage, ...] | None = Field(
        None,
        min_length=1,
        description="parts of the run, in order; null: the run has a single part",
    )

    def of_stages(self) -> tuple[RunConfig, ...]:
        """Return the run's configuration in each stage, or the run itself without stages.

        Each is a run without stages, of the stage's length.

        Raises:
            InStage: a stage's configuration is not valid.
        """
        if self.stages is None:
            return (self,)
        plain, found = self.model_dump(mode="json"), []
        for number, stage in enumerate(self.stages):
            try:
                found.append(RunConfig.model_validate(stage.over(plain)))
            except (ValidationError, NotInStages) as error:
                raise InStage(number, stage.name, error) from None
        return tuple(found)

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        names = [stage.name for stage in stages]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"stages: {twice[0]} is the name of two stages; rename one")
        for key in ("total_steps", "total_tokens"):
            value = getattr(self.training, key)
            if value is not None:
                raise ValueError(
                    f"training.{key}={value}, but stages give the length of the run, each its own "
                    f"part; set training.{key}: null"
                )
        if self.run.schedule_from:
            raise ValueError(
                "run.parent has the schedule count from the branch, but a run with stages has one "
                "for each of them, which counts from the stage's first step; leave schedule out of "
                "run.parent.changes (and schedule_from) and change the stage's own"
            )
        self.of_stages()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stages is not None:
            self._check_stages(self.stages)
        elif self.training.total_steps is None and self.training.total_tokens is None:
            raise ValueError(
                "training: give exactly one of total_tokens and total_steps, and set the other to "
                "null"
            )
        reason = contradiction(self.parameterization, self.model, self.optimizer)
        if reason is not None:
            raise ValueError(reason)
        self._check_masters()
        self._check_twice()
        self._check_initial()
        data, batch = self.data, self.batch
        if not isinstance(data, DocumentData):
            return self
        if batch.micro_batch_sequences != 1:
            raise ValueError(
                f"batch.micro_batch_sequences={batch.micro_batch_sequences} has no meaning with "
                "data.kind=documents, whose micro-batches hold up to "
                "parallel.context.capacity_tokens; set batch.micro_batch_sequences: 1"
            )
        first, key = batch.sequences, "batch.sequences"
        if batch.ramp is not None:
            first, key = batch.ramp.start_sequences, "batch.ramp.start_sequences"
        if first * data.sequence_length < data.max_document_tokens:
            raise ValueError(
                f"{key}={first} of data.sequence_length={data.sequence_length} is less than one "
                f"document of data.max_document_tokens={data.max_document_tokens}, so that a step "
                f"could begin none; raise {key} or lower data.max_document_tokens"
            )
        return self

    def _check_masters(self) -> None:
        states = self.parallel.zero.optimizer_states
        if states is None or not states.master_weights:
            return
        key = "parallel.zero.optimizer_states.master_weights=true"
        if self.training.compute_dtype != "bf16":
            raise ValueError(
                f"{key} keeps a copy in bf16 where it is computed with, but "
                f"training.compute_dtype={self.training.compute_dtype} computes with the "
                "parameters themselves; set training.compute_dtype: bf16 or leave it out"
            )

    def _check_twice(self) -> None:
        if self.record.checks.twice_every_steps is None:
            return
        zero, key = self.parallel.zero, "record.checks.twice_every_steps"
        states = zero.optimizer_states
        if zero.engine == "deepspeed" or (
            states is not None and (states.gradients or states.update == "delayed")
        ):
            raise ValueError(
                f"{key} computes gradients that are then left, but parallel.zero has them leave "
                "the device as they are made (engine=deepspeed, optimizer_states.gradients or "
                f"update=delayed); set {key}: null"
            )
        if not self.training.deterministic:
            raise ValueError(
                f"{key} compares bits, which another order of sums changes; set "
                f"training.deterministic: true, or {key}: null"
            )

    def _check_initial(self) -> None:
        initial = self.run.initial
        if initial is None or "data" in initial.keep or not self.data.continue_sources:
            return
        if initial.hf is not None:
            raise ValueError(
                f"data.continue_sources=true goes on after the run that weights come from, and "
                f"run.initial.hf={initial.hf} is a model; leave it out, or name that run in "
                "run.initial.folder with data among its keep"
            )
        raise ValueError(
            f"data.continue_sources=true contradicts run.initial.keep=[{', '.join(initial.keep)}], "
            "by which the data begin afresh; add data to keep or leave continue_sources out"
        )
