"""The ``optimizer``, ``schedule`` and ``training`` sections."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.bad_steps import BadSteps, StepRange
from allometry.configs.base import Count, PathText, Section, kind_unless_said
from allometry.configs.overrides import HasOverrides


class Fp32States(Section):
    """States as plain tensors of the parameters' type."""

    kind: Literal["fp32"] = "fp32"


class Fp8StatesConfig(Section):
    """Moments and momenta of matrices in FP8, expanded to its range (COAT, arXiv 2410.19313).

    Groups of 128 elements of a row, in E4M3, share a scale and an exponent: 1.05 bytes of an
    element instead of 4. Vectors keep fp32. See docs/precision.md.
    """

    kind: Literal["fp8"] = "fp8"
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="how a state is rounded in each step: to the nearest number, as published; or "
        "to one of the two around it at random, so that small changes are kept in the mean",
    )


StatesConfig = Annotated[Fp32States | Fp8StatesConfig, Field(discriminator="kind")]


class _Compressible(HasOverrides):
    states: StatesConfig = Field(
        default_factory=Fp32States, description="how moments and momenta are kept"
    )


class _Adam(HasOverrides):
    """What every optimizer says: its rate, its decay, and AdamW for the roles it leaves to it."""

    lr: float = Field(gt=0.0, description="peak learning rate, at the base dimensions")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0.0, description="decay of matrices; vectors have none")


class AdamW(_Adam, _Compressible):
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"


class Lion(HasOverrides):
    """The sign of a momentum, for all parameters (arXiv 2302.06675)."""

    kind: Literal["lion"] = "lion"
    lr: float = Field(
        gt=0.0,
        description="peak learning rate, at the base dimensions; 3 to 10 times below AdamW's",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="share of the momentum in an update")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="decay of the momentum")
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        description="decay of matrices; vectors have none; as lr is smaller than AdamW's, as many "
        "times larger",
    )


class _Mixed(_Adam):
    """A rule for some roles; AdamW updates the others with ``beta1``, ``beta2`` and ``eps``."""

    adamw_lr: float | None = Field(
        None, gt=0.0, description="peak learning rate of what AdamW updates; null: lr"
    )


class Muon(_Mixed, _Compressible):
    """Momentum made orthogonal, for hidden matrices, routers and experts (K. Jordan, 2024)."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the momentum")
    nesterov: bool = Field(True, description="look ahead by one gradient")
    adjust: Literal["none", "original", "match_rms_adamw"] = Field(
        "match_rms_adamw",
        description="what multiplies an update [A, B]: 1; sqrt(max(1, A/B)); 0.2 sqrt(max(A, B)), "
        "the size of AdamW's updates (arXiv 2502.16982)",
    )


class OnSphere(_Mixed, _Compressible):
    """Optimizers whose matrices keep their initial norms."""

    weight_decay: float = Field(
        0.0, ge=0.0, description="decay of what AdamW updates; a matrix on its sphere has none"
    )


class MuonH(OnSphere):
    """Muon on spheres: each matrix keeps its initial norm and turns by ``lr`` in a step.

    Hidden matrices, routers and experts; the head turns by Adam's direction (arXiv 2603.28743).
    """

    kind: Literal["muonh"] = "muonh"
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the momentum")
    nesterov: bool = Field(True, description="look ahead by one gradient")
    step_norm: Literal["frobenius", "spectral"] = Field(
        "frobenius",
        description="what lr fixes of a step: its norm over the matrix's, as published; or its "
        "singular values, those of such a step of full rank, however few there are",
    )


class AdamH(OnSphere):
    """Adam's direction on spheres, for all matrices but the embedding (arXiv 2603.28743)."""

    kind: Literal["adamh"] = "adamh"


class SGDSaI(HasOverrides):
    """Momentum, with a scale for each tensor from its first gradient (arXiv 2412.11768)."""

    kind: Literal["sgd_sai"] = "sgd_sai"
    lr: float = Field(gt=0.0, description="peak learning rate, at the base dimensions")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the momentum")
    eps: float = Field(1e-8, gt=0.0, description="added to the deviation of the first gradient")
    weight_decay: float = Field(0.1, ge=0.0, description="decay of matrices; vectors have none")


class _LowRank(_Mixed):
    eps: float = Field(1e-6, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0.0, description="decay of matrices; vectors have none")
    refresh_steps: Count = Field(
        200, gt=0, description="steps after which a new projection is drawn"
    )
    norm_growth: float = Field(
        1.01, gt=1.0, description="most that an update's norm may grow from one step to the next"
    )


class Apollo(_LowRank):
    """Adam's scale for each channel, from a projected gradient (arXiv 2412.05270)."""

    kind: Literal["apollo"] = "apollo"
    rank: Count | None = Field(
        None, gt=0, description="rows of the projection; null: a quarter of the smaller side"
    )
    scale: float = Field(1.0, gt=0.0, description="updates are multiplied by its root")


class ApolloMini(_LowRank):
    """Adam's scale for each matrix, from a gradient projected to rank 1 (arXiv 2412.05270)."""

    kind: Literal["apollo_mini"] = "apollo_mini"
    scale: float | None = Field(
        None,
        gt=0.0,
        description="updates are multiplied by its root; null: a quarter of the smaller side",
    )


OptimizerConfig = Annotated[
    Annotated[
        AdamW | Lion | Muon | MuonH | AdamH | SGDSaI | Apollo | ApolloMini,
        Field(discriminator="kind"),
    ],
    kind_unless_said("adamw"),
]


class _Warmup(Section):
    reads_file: ClassVar[bool] = False

    warmup_steps: Count | None = Field(None, ge=0, description="linear warm-up, in steps")
    warmup_tokens: Count | None = Field(None, ge=0, description="linear warm-up, in tokens")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError("give warmup_steps or warmup_tokens, not both")
        return self


class ConstantSchedule(_Warmup):
    """Warm-up, then constant."""

    kind: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    """Warm-up, then a straight line down to ``final_fraction`` at the end of the run."""

    kind: Literal["linear"] = "linear"
    final_fraction: float = Field(0.0, ge=0.0, le=1.0, description="last rate over peak rate")


class CosineSchedule(_Warmup):
    """Warm-up, then half a cosine down to ``final_fraction`` at the end of the run."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(0.1, ge=0.0, le=1.0, description="last rate over peak rate")


class WSDSchedule(_Warmup):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 section 4)."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(
        0.1, gt=0.0, le=1.0, description="share of the run's steps that the decay takes"
    )
    decay: Literal["exponential", "linear", "1-sqrt"] = Field(
        "1-sqrt",
        description="form of the decay, x from 0 to 1: final_fraction**x; a straight line; "
        "1 - sqrt(x) (arXiv 2405.18392)",
    )
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="last rate over peak rate; exponential needs > 0"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_exponential(self.decay, self.final_fraction)
        return self


def _check_exponential(decay: str, final_fraction: float) -> None:
    if decay == "exponential" and final_fraction == 0.0:
        raise ValueError(
            "final_fraction=0 cannot be reached by an exponential decay; "
            "set it above 0 (0.1 is usual) or choose decay: 1-sqrt"
        )


class WSDSSchedule(_Warmup):
    """Warm-up, then stable and decay several times over (WSD-S, arXiv 2410.05192).

    Each decay ends one of several budgets, as if the run were to stop there; training then goes on
    from its end, back at the peak. The last decay ends the run.
    """

    kind: Literal["wsd_s"] = "wsd_s"
    decay_ends_steps: tuple[Count, ...] | None = Field(
        None, description="steps at which decays before the last one end, ascending"
    )
    decay_ends_tokens: tuple[Count, ...] | None = Field(
        None, description="the same in tokens, each rounded up to a whole step"
    )
    decay_fraction: float = Field(
        0.1, gt=0.0, le=1.0, description="share that a decay takes of all steps up to its end"
    )
    decay: Literal["exponential", "linear", "1-sqrt"] = Field(
        "1-sqrt", description="form of each decay, as of kind wsd"
    )
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="rate at the end of a decay over peak rate"
    )
    rewarmup_steps: Count = Field(
        0, ge=0, description="linear climb back to the peak after a decay; 0: at once, as published"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [ends for ends in (self.decay_ends_steps, self.decay_ends_tokens) if ends]
        if len(given) != 1:
            raise ValueError(
                "give the ends of the decays before the last as decay_ends_steps or as "
                "decay_ends_tokens; with a single decay use kind: wsd"
            )
        if list(given[0]) != sorted(set(given[0])) or given[0][0] < 1:
            raise ValueError(f"the ends of the decays must ascend from 1 on, not {given[0]}")
        _check_exponential(self.decay, self.final_fraction)
        return self


class RefinedSchedule(_Warmup):
    """The rate of each step from a file that ``allometry refine`` wrote (arXiv 2310.07831)."""

    reads_file: ClassVar[bool] = True

    kind: Literal["refined"] = "refined"
    file: PathText = Field(
        min_length=1,
        description="JSON with ``fractions`` of the peak rate; a run of another length reads "
        "them in proportion. A warm-up, where one is given, multiplies them",
    )


_Simple = (
    ConstantSchedule
    | LinearSchedule
    | CosineSchedule
    | WSDSchedule
    | WSDSSchedule
    | RefinedSchedule
)
SimpleSchedule = Annotated[_Simple, Field(discriminator="kind")]


class ContinuedSchedule(Section):
    """A run that is taken further: the schedule it had, and another one after its last step.

    The warm-up of ``after`` climbs from the last rate of ``before`` rather than from 0 (re-warming,
    arXiv 2403.08763); without one the rate jumps to the peak.
    """

    kind: Literal["continued"] = "continued"
    before: SimpleSchedule = Field(description="schedule of the steps up to ``before_steps``")
    before_steps: Count = Field(gt=0, description="length of the run that is taken further")
    after: SimpleSchedule = Field(description="schedule of all steps after it")

    @property
    def reads_file(self) -> bool:
        """Whether rates come from a file, which may change."""
        return self.before.reads_file or self.after.reads_file

    @property
    def warmup_steps(self) -> int | None:
        """That of ``before``."""
        return self.before.warmup_steps

    @property
    def warmup_tokens(self) -> int | None:
        """That of ``before``."""
        return self.before.warmup_tokens


ScheduleConfig = Annotated[_Simple | ContinuedSchedule, Field(discriminator="kind")]


class TrainingConfig(Section):
    """How long to train (a run with ``stages``: as long as these), and what happens in a step."""

    total_tokens: Count | None = Field(None, gt=0, description="length of the run, in tokens")
    total_steps: Count | None = Field(None, gt=0, description="length of the run, in steps")
    clip_grad_norm: float | None = Field(
        1.0, gt=0.0, description="largest global gradient norm; null: do not clip"
    )
    compute_dtype: Literal["bf16", "fp32", "fp64"] = Field(
        "bf16", description="type of activations and matrix products; parameters are fp32"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what a block's backward computes again instead of keeping: nothing; all but "
        "matrix products, attention and communication; everything",
    )
    activation_offload: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="share of a pipeline stage's layers, but for its last two, whose activations "
        "wait for the backward in the host's memory: what checkpointing keeps of them, or all",
    )
    compile: bool = Field(False, description="torch.compile each block and the loss")
    deterministic: bool = Field(
        False,
        description="the same bits from the same step on CUDA too, for bit-exact resume: kernels "
        "without atomics, at some cost; a CPU always gives them",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto",
        description="run forward and backward of a micro-batch as CUDA graphs; auto: where they "
        "can be (one GPU, zero.stage 0, packing: concatenated, no dropout); on elsewhere: an error",
    )
    bad_steps: BadSteps | None = Field(
        None, description="skip bad updates; null: what is not finite ends the run"
    )
    skip_steps: tuple[StepRange, ...] = Field(
        (), description="steps whose batches are passed over: [120, [200, 250]]"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.total_tokens is not None and self.total_steps is not None:
            raise ValueError(
                "give exactly one of total_tokens and total_steps, and set the other to null"
            )
        for each in self.skip_steps:
            if not isinstance(each, int) and each[0] > each[1]:
                raise ValueError(f"skip_steps: {list(each)} ends before it begins; swap the two")
        return self
