"""The description of a ladder: small runs to learn a law from, and the run it is to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section, kind_unless_said
from allometry.configs.errors import ConfigError
from allometry.configs.loader import PRESET, ladder_presets, locate, validate_as
from allometry.configs.optimization import ScheduleConfig
from allometry.configs.source import Tree, parse_file

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$")]
Ratio = Annotated[float, Field(gt=0.0)]
Positive = Annotated[Count, Field(gt=0)]


class Size(Section):
    """One model of the ladder: the base's at another width, and with other keys."""

    name: Name | None = Field(None, description="in the names of runs; null: w and the width")
    width: Count | None = Field(
        None, gt=0, description="model.width, heads and feed-forward in proportion"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of the run: {model.num_layers: 8}"
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.name is None and self.width is None:
            raise ValueError("give the size a name, or a width to be named by")
        return self

    @property
    def label(self) -> str:
        """What it is called."""
        return self.name or f"w{self.width}"


class NamedSchedule(Section):
    """A schedule that every rung is trained with."""

    name: Name = Field(description="in the names of runs")
    schedule: ScheduleConfig = Field(description="as a run's ``schedule``")


class IsoFlop(Section):
    """Runs of several sizes for the same compute."""

    flops: tuple[Ratio, ...] = Field(
        min_length=1, description="model FLOPs of a run, attention and head included"
    )
    sizes: tuple[str, ...] | None = Field(
        None, description="names of sizes of the ladder; null: all of them"
    )


class ConstantBatch(Section):
    """The base's batch for every run."""

    kind: Literal["constant"] = "constant"


class PowerBatch(Section):
    """A batch that grows with the tokens D of a run: base batch x (D/base_tokens)^exponent."""

    kind: Literal["power"] = "power"
    base_tokens: Count = Field(gt=0, description="D at which the batch is the base's")
    exponent: float = Field(0.5, gt=0.0, lt=1.0, description="power of D")


class LawBatch(Section):
    """The batch of a published law, of those that ``allometry suggest`` lists."""

    kind: Literal["law"] = "law"
    law: str = Field(description="step-law, deepseek or ling")


class LocalLaunch(Section):
    """Runs on this machine."""

    kind: Literal["local"] = "local"
    processes: Count = Field(
        1, gt=0, description="ranks of a run; more than one are started with torchrun"
    )
    parallel: Count = Field(
        1, gt=0, description="runs at a time; more than one get one thread each"
    )


class SbatchLaunch(Section):
    """Scripts for Slurm, one for each run."""

    kind: Literal["sbatch"] = "sbatch"
    processes: Count = Field(1, gt=0, description="ranks of a run, over all its nodes")
    nodes: Count = Field(1, gt=0, description="nodes of a run, a factor of processes")
    options: tuple[str, ...] = Field(
        (), description="for sbatch, one each: --partition=gpu, --gres=gpu:8, --time=8:00:00"
    )
    setup: str = Field("", description="shell lines before training: modules, an environment")

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
    """The run to be predicted before it is trained."""

    size: Size = Field(description="its model")
    tokens_per_parameter: float | None = Field(None, gt=0.0, description="its length, by ``count``")
    tokens: Count | None = Field(None, gt=0, description="its length, in tokens")
    schedule: str | None = Field(None, description="name of a schedule; null: the first")
    seed: Count | None = Field(None, ge=0, description="null: the first of ``seeds``")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.tokens is None) == (self.tokens_per_parameter is None):
            raise ValueError("give exactly one of tokens_per_parameter and tokens")
        return self


class LadderConfig(Section):
    """A ladder: sizes x horizons x schedules x seeds of one base run, and a target."""

    kind: Literal["ladder"] = "ladder"
    base: PathText = Field(
        min_length=1, description="a run: YAML file, beside this one, or preset:NAME"
    )
    folder: PathText = Field(min_length=1, description="the ladder's folder, which holds its runs")
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of every run: {optimizer.lr: 6e-3}"
    )
    widths: tuple[Positive, ...] = Field((), description="sizes by their width alone")
    sizes: tuple[Size, ...] = Field((), description="sizes by name, width and keys")
    tokens_per_parameter: tuple[Ratio, ...] = Field((), description="horizons, by ``count``")
    tokens: tuple[Positive, ...] = Field((), description="horizons, in tokens")
    isoflop: IsoFlop | None = Field(None, description="horizons by compute")
    count: Literal["non_embedding", "total", "with_head"] = Field(
        "non_embedding", description="which parameters N counts, in horizons and in the law"
    )
    seeds: tuple[Annotated[Count, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="each rung is trained with each run.seed"
    )
    schedules: tuple[NamedSchedule, ...] = Field((), description="empty: the base's schedule")
    batch: ConstantBatch | PowerBatch | LawBatch = Field(
        default_factory=ConstantBatch,
        discriminator="kind",
        description="how the batch follows the size of a run",
    )
    target: LadderTarget | None = Field(None, description="the run to predict")
    law: str = Field("chinchilla", description="the law to fit; allometry laws lists them")
    fix: dict[str, float] = Field(
        default_factory=dict, description="the law's parameters that are not fitted: {E: 0}"
    )
    loss: str = Field(
        "validation", description="what it predicts: validation, train, or either/SOURCE"
    )
    bootstraps: Count = Field(200, ge=20, description="resamplings behind intervals")
    launch: LaunchConfig = Field(default_factory=LocalLaunch, description="where runs run")

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
        """The sizes, however they were given."""
        return self.sizes or tuple(Size(width=width) for width in self.widths)


def load_ladder(path: str | Path) -> tuple[LadderConfig, Tree]:
    """The ladder that a YAML file or ``preset:NAME`` describes, and where its keys were written.

    ``base`` is then a path from here, or ``preset:NAME``. Raises ConfigError, one sentence with
    file, line and key.
    """
    file = locate(str(path), ladder_presets(), "ladder")
    tree = parse_file(file)
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
