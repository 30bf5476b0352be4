"""The ``optimizer``, ``schedule`` and ``training`` sections."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.bad_steps import BadSteps, StepRange
from allometry.configs.base import Count, PathText, Section, kind_unless_said
from allometry.configs.overrides import HasOverrides


class Fp32States(Section):
    """Optimizer states in the type of the parameters (fp32)."""

    kind: Literal["fp32"] = "fp32"


class Fp8StatesConfig(Section):
    """Moments and momenta of matrices in FP8 with range expansion (COAT, arXiv 2410.19313).

    Each group of 128 elements of a row, in E4M3, shares a scale and an exponent: 1.05 bytes per
    element instead of 4. States of vectors stay in fp32. See docs/precision.md.
    """

    kind: Literal["fp8"] = "fp8"
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="rounding of a state in each step: to the nearest FP8 number, as published, or "
        "stochastic, to one of the two neighbours, so that small changes are kept in expectation",
    )


StatesConfig = Annotated[Fp32States | Fp8StatesConfig, Field(discriminator="kind")]


class _Compressible(HasOverrides):
    states: StatesConfig = Field(
        default_factory=Fp32States, description="storage type of moments and momenta"
    )


class _Adam(HasOverrides):
    """Keys of Adam-type optimizers, which also apply to roles that another rule leaves to AdamW."""

    lr: float = Field(gt=0.0, description="peak learning rate at the base dimensions")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay rate of the first moment")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="decay rate of the second moment")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0.0, description="weight decay of matrices, not of vectors")


class AdamW(_Adam, _Compressible):
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"


class Lion(HasOverrides):
    """Lion: sign of a momentum, for all parameters (arXiv 2302.06675)."""

    kind: Literal["lion"] = "lion"
    lr: float = Field(
        gt=0.0,
        description="peak learning rate at the base dimensions, typically 3 to 10 times lower than "
        "AdamW's",
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="weight of the momentum in an update")
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="decay rate of the momentum")
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        description="weight decay of matrices; vectors are not decayed. Raise it over AdamW's by "
        "the factor by which lr is lower",
    )


class _Mixed(_Adam):
    """Update rule for some roles; AdamW updates the others by ``beta1``, ``beta2``, ``eps``."""

    adamw_lr: float | None = Field(
        None, gt=0.0, description="peak learning rate of AdamW's parameters; null: lr"
    )


class Muon(_Mixed, _Compressible):
    """Muon: orthogonalized momentum for hidden matrices, routers and experts (K. Jordan, 2024)."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="decay rate of the momentum")
    nesterov: bool = Field(True, description="Nesterov momentum")
    adjust: Literal["none", "original", "match_rms_adamw"] = Field(
        "match_rms_adamw",
        description="factor of an update of shape [A, B]: 1 (none); sqrt(max(1, A/B)) (original); "
        "0.2 sqrt(max(A, B)), the RMS of AdamW's updates (match_rms_adamw, arXiv 2502.16982)",
    )


class OnSphere(_Mixed, _Compressible):
    """Optimizers that keep the initial norm of each matrix."""

    weight_decay: float = Field(
        0.0, ge=0.0, description="weight decay of AdamW's parameters; matrices on spheres have none"
    )


class MuonH(OnSphere):
    """Muon on spheres: each matrix keeps its initial norm and is rotated by ``lr`` per step.

    For hidden matrices, routers and experts; the head uses Adam's direction (arXiv 2603.28743).
    """

    kind: Literal["muonh"] = "muonh"
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="decay rate of the momentum")
    nesterov: bool = Field(True, description="Nesterov momentum")
    step_norm: Literal["frobenius", "spectral"] = Field(
        "frobenius",
        description="norm of a step that lr fixes. frobenius: Frobenius norm relative to the "
        "matrix's, as published; spectral: singular values equal to those of such a step of full "
        "rank, at any rank",
    )


class AdamH(OnSphere):
    """Adam's direction on spheres, for all matrices except the embedding (arXiv 2603.28743)."""

    kind: Literal["adamh"] = "adamh"


class SGDSaI(HasOverrides):
    """Momentum with a scale per tensor from its first gradient (arXiv 2412.11768)."""

    kind: Literal["sgd_sai"] = "sgd_sai"
    lr: float = Field(gt=0.0, description="peak learning rate at the base dimensions")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="decay rate of the momentum")
    eps: float = Field(1e-8, gt=0.0, description="added to the deviation of the first gradient")
    weight_decay: float = Field(0.1, ge=0.0, description="weight decay of matrices, not of vectors")


class _LowRank(_Mixed):
    eps: float = Field(1e-6, gt=0.0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0.0, description="weight decay of matrices, not of vectors")
    refresh_steps: Count = Field(200, gt=0, description="steps between new projections")
    norm_growth: float = Field(
        1.01, gt=1.0, description="maximum ratio of an update's norm to the previous one's"
    )


class Apollo(_LowRank):
    """APOLLO: Adam's scale per channel, from a projected gradient (arXiv 2412.05270)."""

    kind: Literal["apollo"] = "apollo"
    rank: Count | None = Field(
        None, gt=0, description="rows of the projection; null: a quarter of the smaller dimension"
    )
    scale: float = Field(1.0, gt=0.0, description="updates are multiplied by its square root")


class ApolloMini(_LowRank):
    """APOLLO-Mini: Adam's scale per matrix, from a rank-1 projection (arXiv 2412.05270)."""

    kind: Literal["apollo_mini"] = "apollo_mini"
    scale: float | None = Field(
        None,
        gt=0.0,
        description="updates are multiplied by its square root; null: a quarter of the smaller "
        "dimension",
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
    """Linear warm-up, then a constant rate."""

    kind: Literal["constant"] = "constant"


class LinearSchedule(_Warmup):
    """Warm-up, then linear decay to ``final_fraction`` at the end of the run."""

    kind: Literal["linear"] = "linear"
    final_fraction: float = Field(0.0, ge=0.0, le=1.0, description="final rate over peak rate")


class CosineSchedule(_Warmup):
    """Warm-up, then cosine decay to ``final_fraction`` at the end of the run."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: float = Field(0.1, ge=0.0, le=1.0, description="final rate over peak rate")


class WSDSchedule(_Warmup):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395 section 4)."""

    kind: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(
        0.1, gt=0.0, le=1.0, description="fraction of the run's steps in the decay"
    )
    decay: Literal["exponential", "linear", "1-sqrt"] = Field(
        "1-sqrt",
        description="shape of the decay at x from 0 to 1: final_fraction**x (exponential); linear; "
        "1 - sqrt(x) (arXiv 2405.18392)",
    )
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="final rate over peak rate; exponential needs > 0"
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
    """Warm-up, then alternating stable and decay phases (WSD-S, arXiv 2410.05192).

    Each decay ends a training budget, as if the run stopped there; training then continues from the
    end of the decay at the peak rate. The last decay ends the run.
    """

    kind: Literal["wsd_s"] = "wsd_s"
    decay_ends_steps: tuple[Count, ...] | None = Field(
        None, description="steps at which decays before the last one end, ascending"
    )
    decay_ends_tokens: tuple[Count, ...] | None = Field(
        None, description="the same in tokens, each rounded up to a step"
    )
    decay_fraction: float = Field(
        0.1, gt=0.0, le=1.0, description="fraction of the steps up to its end that a decay takes"
    )
    decay: Literal["exponential", "linear", "1-sqrt"] = Field(
        "1-sqrt", description="shape of each decay, as for kind wsd"
    )
    final_fraction: float = Field(
        0.0, ge=0.0, le=1.0, description="rate at the end of a decay divided by peak rate"
    )
    rewarmup_steps: Count = Field(
        0, ge=0, description="steps of re-warm-up after a decay; 0: none, as published"
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
    """Rate of each step from a file written by ``allometry refine`` (arXiv 2310.07831)."""

    reads_file: ClassVar[bool] = True

    kind: Literal["refined"] = "refined"
    file: PathText = Field(
        min_length=1,
        description="JSON file with ``fractions`` of the peak rate, which are stretched to the "
        "length of the run. A warm-up, if set, multiplies them",
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
    """Schedule of an extended run: its earlier schedule, and another one after its last step.

    The warm-up of ``after`` starts at the last rate of ``before`` instead of 0 (re-warming, arXiv
    2403.08763); without a warm-up the rate jumps to the peak.
    """

    kind: Literal["continued"] = "continued"
    before: SimpleSchedule = Field(description="schedule of the steps up to ``before_steps``")
    before_steps: Count = Field(gt=0, description="number of steps of the run that is extended")
    after: SimpleSchedule = Field(description="schedule of all later steps")

    @property
    def reads_file(self) -> bool:
        """True if rates are read from a file, which may change."""
        return self.before.reads_file or self.after.reads_file

    @property
    def warmup_steps(self) -> int | None:
        """``warmup_steps`` of ``before``."""
        return self.before.warmup_steps

    @property
    def warmup_tokens(self) -> int | None:
        """``warmup_tokens`` of ``before``."""
        return self.before.warmup_tokens


ScheduleConfig = Annotated[_Simple | ContinuedSchedule, Field(discriminator="kind")]


class TrainingConfig(Section):
    """Length of the run (with ``stages``: the sum of their lengths), and the training step."""

    total_tokens: Count | None = Field(
        None, gt=0, description="length of the run in tokens; null: given by total_steps or stages"
    )
    total_steps: Count | None = Field(
        None, gt=0, description="length of the run in steps; null: given by total_tokens or stages"
    )
    clip_grad_norm: float | None = Field(
        1.0, gt=0.0, description="maximum global gradient norm; null: gradients are not clipped"
    )
    compute_dtype: Literal["bf16", "fp32", "fp64"] = Field(
        "bf16", description="type of activations and matrix products; parameters are fp32"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations that a block's backward recomputes: none; all but those of matrix "
        "products, attention and communication (selective); all (full). Enable it to save memory",
    )
    activation_offload: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="fraction of a pipeline stage's layers, except its last two, whose saved "
        "activations (those that checkpointing keeps) are stored in host memory until the "
        "backward pass",
    )
    compile: bool = Field(False, description="apply torch.compile to each block and the loss")
    deterministic: bool = Field(
        False,
        description="bitwise reproducible steps on CUDA, for bit-exact resume: slower kernels "
        "without atomics; steps on a CPU are always reproducible",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto",
        description="run forward and backward passes as CUDA graphs; auto: where supported (one "
        "GPU, zero.stage 0, packing: concatenated, no dropout); true: an error elsewhere",
    )
    bad_steps: BadSteps | None = Field(
        None, description="skip bad updates; null: a loss that is not finite ends the run"
    )
    skip_steps: tuple[StepRange, ...] = Field(
        (), description="steps whose batches are skipped: [120, [200, 250]]"
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
