"""The description of a ladder: small runs to fit a law to, and the run to predict with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section, kind_unless_said
from allometry.configs.errors import ConfigError
from allometry.configs.loader import PRESET, ladder_presets, locate, validate_as
from allometry.configs.optimization import ScheduleConfig
from allometry.configs.renamed import parse
from allometry.configs.source import Tree

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$")]
Ratio = Annotated[float, Field(gt=0.0)]
Positive = Annotated[Count, Field(gt=0)]


class Size(Section):
    """One model size of the ladder: the base model with another width or with other keys."""

    name: Name | None = Field(
        None, description="name of the size in the names of runs; null: w followed by the width"
    )
    width: Count | None = Field(
        None,
        gt=0,
        description="model.width; heads and feed-forward width are scaled in proportion; null: the "
        "base's width",
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of the run to override: {model.num_layers: 8}"
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.width is None:
            raise ValueError("give the size a name, or a width to be named by")
        return self

    @property
    def label(self) -> str:
        """Name of the size: ``name``, or ``w`` followed by the width."""
        return self.name or f"w{self.width}"


class NamedSchedule(Section):
    """A learning-rate schedule with which every rung is trained."""

    name: Name = Field(description="name of the schedule in the names of runs")
    schedule: ScheduleConfig = Field(description="schedule, with the keys of a run's ``schedule``")


class IsoFlop(Section):
    """Runs of several sizes with the same compute."""

    flops: tuple[Ratio, ...] = Field(
        min_length=1, description="model FLOPs of a run, attention and head included"
    )
    sizes: tuple[str, ...] | None = Field(
        None, description="names of sizes of the ladder; null: all sizes"
    )


class ConstantBatch(Section):
    """The base's batch size for every run."""

    kind: Literal["constant"] = "constant"


class PowerBatch(Section):
    """Batch size as a power of a run's tokens D: base batch x (D/base_tokens)^exponent."""

    kind: Literal["power"] = "power"
    base_tokens: Count = Field(gt=0, description="D at which the batch size equals the base's")
    exponent: float = Field(0.5, gt=0.0, lt=1.0, description="exponent of D")


class LawBatch(Section):
    """Batch size from one of the published laws that ``allometry suggest`` lists."""

    kind: Literal["law"] = "law"
    law: str = Field(description="name of the law: step-law, deepseek or ling")


class LocalLaunch(Section):
    """Train the runs on this machine."""

    kind: Literal["local"] = "local"
    processes: Count = Field(
        1, gt=0, description="number of ranks of a run; several ranks are started with torchrun"
    )
    parallel: Count = Field(
        1, gt=0, description="number of runs at a time; if above 1, each run uses one thread"
    )


class SbatchLaunch(Section):
    """Write a Slurm script for each run."""

    kind: Literal["sbatch"] = "sbatch"
    processes: Count = Field(1, gt=0, description="number of ranks of a run, over all its nodes")
    nodes: Count = Field(1, gt=0, description="number of nodes of a run, a divisor of processes")
    options: tuple[str, ...] = Field(
        (),
        description="options of sbatch, one per entry: --partition=gpu, --gres=gpu:8, "
        "--time=8:00:00",
    )
    setup: str = Field(
        "",
        description="shell lines to run before training, for example to load modules or an "
        "environment",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.processes % self.nodes:
            raise ValueError(
                f"nodes={self.nodes} cannot share processes={self.processes} evenly; use a factor"
            )
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"options: {option!r} is no option of sbatch; write --key=value")
        return self


LaunchConfig = Annotated[
    Annotated[LocalLaunch | SbatchLaunch, Field(discriminator="kind")], kind_unless_said("local")
]


class LadderTarget(Section):
    """The run whose loss is predicted before its training."""

    size: Size = Field(description="model size of the target")
    tokens_per_parameter: float | None = Field(
        None,
        gt=0.0,
        description="length of the target in tokens per parameter, counted by ``count``; null: "
        "given by tokens",
    )
    tokens: Count | None = Field(
        None,
        gt=0,
        description="length of the target in tokens; null: given by tokens_per_parameter",
    )
    schedule: str | None = Field(None, description="name of one of ``schedules``; null: the first")
    seed: Count | None = Field(
        None, ge=0, description="run.seed of the target; null: the first of ``seeds``"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give exactly one of tokens_per_parameter and tokens")
        return self


class LadderConfig(Section):
    """A ladder: sizes x horizons x schedules x seeds of one base run, and a target."""

    kind: Literal["ladder"] = "ladder"
    base: PathText = Field(
        min_length=1, description="base run: preset:NAME, or a YAML file, relative to this file"
    )
    folder: PathText = Field(
        min_length=1, description="folder of the ladder, which contains its runs"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys to override in every run: {optimizer.lr: 6e-3}"
    )
    widths: tuple[Positive, ...] = Field(
        (), description="model widths of the ladder, if sizes differ in width alone"
    )
    sizes: tuple[Size, ...] = Field((), description="sizes of the ladder, by name, width and keys")
    tokens_per_parameter: tuple[Ratio, ...] = Field(
        (), description="horizons in tokens per parameter, counted by ``count``"
    )
    tokens: tuple[Positive, ...] = Field((), description="horizons in tokens")
    isoflop: IsoFlop | None = Field(None, description="horizons by compute; null: none")
    count: Literal["non_embedding", "total", "with_head"] = Field(
        "non_embedding", description="parameters counted as N, in horizons and in the law"
    )
    seeds: tuple[Annotated[Count, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="values of run.seed with which each rung is trained"
    )
    schedules: tuple[NamedSchedule, ...] = Field(
        (), description="schedules with which each rung is trained; empty: the base's schedule"
    )
    batch: ConstantBatch | PowerBatch | LawBatch = Field(
        default_factory=ConstantBatch, discriminator="kind", description="batch size of each run"
    )
    target: LadderTarget | None = Field(None, description="run to predict; null: none")
    law: str = Field("chinchilla", description="law to fit, one of those that allometry laws lists")
    fix: dict[str, float] = Field(
        default_factory=dict,
        description="parameters of the law with fixed values, which are not fitted: {E: 0}",
    )
    loss: str = Field(
        "validation",
        description="loss to fit and predict: validation, train, validation/SOURCE or train/SOURCE",
    )
    bootstraps: Count = Field(
        200, ge=20, description="number of bootstrap samples for the intervals"
    )
    launch: LaunchConfig = Field(
        default_factory=LocalLaunch, description="where and how the runs are started"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.widths) == bool(self.sizes):
            raise ValueError("give the sizes of the ladder as exactly one of widths and sizes")
        if not (self.tokens_per_parameter or self.tokens or self.isoflop):
            raise ValueError("give horizons: tokens_per_parameter, tokens or isoflop")
        if self.tokens_per_parameter and self.tokens:
            raise ValueError("give horizons as tokens_per_parameter or as tokens, not both")
        sizes = [size.label for size in self.rungs]
        schedules = [one.name for one in self.schedules]
        seeds = [str(seed) for seed in self.seeds]
        for what, names in (("sizes", sizes), ("schedules", schedules), ("seeds", seeds)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: {twice[0]} stands twice; remove or rename one")
        for name in (self.isoflop.sizes if self.isoflop else None) or ():
            if name not in sizes:
                raise ValueError(f"isoflop.sizes: {name} is not one of {', '.join(sizes)}")
        wanted = self.target.schedule if self.target else None
        if wanted is not None and wanted not in schedules:
            known = ", ".join(schedules) or "none, as the base's is used"
            raise ValueError(f"target.schedule: {wanted} is not among the schedules ({known})")
        return self

    @property
    def rungs(self) -> tuple[Size, ...]:
        """Sizes of the ladder, given as ``sizes`` or as ``widths``."""
        return self.sizes or tuple(Size(width=width) for width in self.widths)


def load_ladder(path: str | Path) -> tuple[LadderConfig, Tree]:
    """Return the ladder in a YAML file or ``preset:NAME``, and the place of each key.

    ``base`` becomes a path relative to the working directory, or stays ``preset:NAME``.

    Raises:
        ConfigError: the file is not a valid ladder; one sentence with file, line and key.
    """
    file = locate(str(path), ladder_presets(), "ladder")
    tree = parse(file, "ladder")
    kind = tree.data.get("kind")
    if kind != "ladder":
        raise ConfigError(
            f"{file} does not describe a ladder; begin it with 'kind: ladder', or give a run to "
            "allometry train"
        )
    ladder = validate_as(LadderConfig, tree)
    if not ladder.base.startswith(PRESET):
        ladder = ladder.model_copy(update={"base": str(file.parent / ladder.base)})
    return ladder, tree
