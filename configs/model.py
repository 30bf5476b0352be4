"""The ``model`` and ``parameterization`` sections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section
from allometry.configs.decoder import Decoder


class DenseModel(Decoder):
    """A dense transformer with a gated feed-forward in every block."""

    kind: Literal["dense"] = Field("dense", description="architecture family")
    ffn_width: Count = Field(gt=0, description="hidden width of the gated feed-forward")


class _Experts(Section):
    num_experts: Count = Field(gt=0, description="number of routed experts in a block")
    experts_per_token: Count = Field(gt=0, description="number of routed experts per token (top-k)")
    width: Count = Field(gt=0, description="hidden width of an expert's SwiGLU")
    num_shared_experts: Count = Field(
        0,
        ge=0,
        description="number of shared experts of the same width, computed as one for every token",
    )

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must not exceed "
                f"num_experts={self.num_experts}"
            )
        return self


class SwiGLUExperts(_Experts):
    """Experts whose input and output have the residual stream's width (arXiv 2401.04088)."""

    kind: Literal["swiglu"] = "swiglu"


class LatentExperts(_Experts):
    """Experts in a latent space (LatentMoE, arXiv 2601.18089).

    The layer computes shared(x) + W_up Σ g_i E_i(W_down x); W_down and W_up are shared by all
    experts, and router and shared experts read the full width D. At latent width l, num_experts
    and experts_per_token multiplied by D/l give the expert bytes and FLOPs of experts of width D.
    """

    kind: Literal["latent"] = "latent"
    latent_width: Count = Field(gt=0, description="width of the routed experts' input and output")
    norm: bool = Field(
        False, description="RMSNorm of the experts' weighted sum, before the up-projection"
    )


ExpertsConfig = Annotated[SwiGLUExperts | LatentExperts, Field(discriminator="kind")]


class NoBalance(Section):
    """No load balancing of experts."""

    kind: Literal["none"] = "none"


class AuxiliaryBalance(Section):
    """Auxiliary loss, summed over layers: coefficient * E * sum_e f_e P_e (2101.03961, eq. 4)."""

    kind: Literal["auxiliary"] = "auxiliary"
    coefficient: float = Field(gt=0.0, description="weight of each layer's auxiliary loss")
    loads: Literal["auto", "step_before", "this_batch"] = Field(
        "auto",
        description="source of f_e. step_before: load fractions of the previous step, at no cost; "
        "this_batch: load fractions of the step's own global batch, from an additional forward "
        "pass of the blocks; auto: this_batch for data.kind documents and for small batches, else "
        "step_before",
    )


class BiasBalance(Section):
    """A bias on each expert's score, used only for selection (arXiv 2408.15664)."""

    kind: Literal["bias"] = "bias"
    rate: float = Field(1e-3, gt=0.0, description="change of a bias per step")
    centered: bool = Field(
        False,
        description="take the mean over experts out of each step's changes, so that biases do not "
        "drift; the experts chosen are the same (arXiv 2510.22115)",
    )


BalanceConfig = Annotated[NoBalance | AuxiliaryBalance | BiasBalance, Field(discriminator="kind")]


class RouterConfig(Section):
    """Selection of experts for each token, and the weights of their outputs."""

    gate: Literal["softmax", "softmax_after_topk", "sigmoid", "sqrt"] = Field(
        "softmax",
        description="weights of the selected experts. softmax: softmax over all experts; "
        "softmax_after_topk: softmax over the selected experts; sigmoid: sigmoid of each score; "
        "sqrt: square root of softmax_after_topk, with shared and routed outputs each times "
        "sqrt(1/2) (arXiv 2603.28743)",
    )
    normalize: bool = Field(
        False, description="divide the weights by their sum (gates softmax and sigmoid)"
    )
    scale: float = Field(1.0, gt=0.0, description="factor of the routed experts' weighted sum")
    num_groups: Count = Field(
        1, gt=0, description="number of groups into which the experts are divided"
    )
    groups_per_token: Count | None = Field(
        None,
        gt=0,
        description="number of groups from which a token's experts are selected: those with the "
        "largest sum of their two best scores; null: all groups",
    )
    balance: BalanceConfig = Field(
        default_factory=lambda: AuxiliaryBalance(coefficient=1e-3),
        description="load balancing of the experts",
    )
    z_loss: float = Field(
        0.0,
        ge=0.0,
        description="coefficient of the squared log partition function (arXiv 2202.08906)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.normalize and self.gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate={self.gate} has weights of sum 1; leave normalize out")
        if self.groups_per_token is not None and self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} must not exceed "
                f"num_groups={self.num_groups}"
            )
        return self


class MoEModel(Decoder):
    """A transformer with a mixture of experts in each block after the first dense blocks."""

    kind: Literal["moe"] = Field("moe", description="architecture family")
    first_dense_layers: Count = Field(
        0, ge=0, description="number of initial blocks with a dense feed-forward instead of experts"
    )
    ffn_width: Count | None = Field(
        None, gt=0, description="hidden width of the dense feed-forward; null: no dense layers"
    )
    experts: ExpertsConfig = Field(description="routed and shared experts of a block")
    router: RouterConfig = Field(default_factory=RouterConfig, description="selection of experts")

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        experts, router = self.experts, self.router
        if self.first_dense_layers >= self.num_layers:
            raise ValueError(
                f"first_dense_layers={self.first_dense_layers} must be below "
                f"num_layers={self.num_layers}; use kind: dense for a model without experts"
            )
        if (self.first_dense_layers > 0) != (self.ffn_width is not None):
            raise ValueError(
                f"ffn_width={self.ffn_width} with first_dense_layers={self.first_dense_layers}: "
                "give ffn_width exactly where there are dense layers"
            )
        if experts.num_experts % router.num_groups:
            raise ValueError(
                f"router.num_groups={router.num_groups} must divide "
                f"experts.num_experts={experts.num_experts}"
            )
        groups = router.groups_per_token or router.num_groups
        reachable = experts.num_experts // router.num_groups * groups
        if experts.experts_per_token > reachable:
            raise ValueError(
                f"experts.experts_per_token={experts.experts_per_token} exceeds the {reachable} "
                "experts of the groups that a token may visit; raise router.groups_per_token"
            )
        return self

    def has_experts(self, layer: int) -> bool:
        """Return True if this block (counted from 0) has experts."""
        return layer >= self.first_dense_layers


ModelConfig = DenseModel | MoEModel
"""Any architecture, selected by ``kind``."""


WeightDecayRule = Literal["coupled", "mup", "sqrt", "independent"]


class StandardParameterization(Section):
    """Standard parameterization: one learning rate and 1/sqrt(fan_in) initialization."""

    kind: Literal["sp"] = "sp"
    embedding_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial embedding"
    )
    weight_decay_rule: Literal["coupled", "independent"] = Field(
        "coupled",
        description="decay of a weight in a step at the peak rate: lr x weight_decay of it "
        "(coupled), or weight_decay of it (independent, arXiv 2309.14322)",
    )


class _Widths(Section):
    embedding_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial embedding"
    )
    base_width: Count = Field(gt=0, description="width at which hyperparameters were tuned")
    base_head_dim: Count | None = Field(
        None, gt=0, description="head width at the base; null: the model's own"
    )


class _Decayed(_Widths):
    weight_decay_rule: WeightDecayRule = Field(
        "mup",
        description="weight decay of hidden matrices at m times the base width. coupled: "
        "unchanged; mup: multiplied by the factor that divides lr, so that lr x decay is "
        "constant; sqrt: multiplied by the square root of this factor (arXiv 2510.15262); "
        "independent: a step at the peak rate decays every matrix by weight_decay itself (arXiv "
        "2309.14322)",
    )
    zero_head: bool = Field(False, description="initialize the output head to zero")


class MaximalUpdateParameterization(_Decayed):
    """muP: values tuned at ``base_width`` apply at any width (arXiv 2203.03466, Table 8)."""

    kind: Literal["mup"] = "mup"


class CompleteP(_Decayed):
    """muP with transfer over depth as well: CompleteP, and Depth-muP (arXiv 2505.01618)."""

    kind: Literal["completep"] = "completep"
    base_layers: Count = Field(
        gt=0, description="number of blocks at which hyperparameters were tuned"
    )
    depth_alpha: float = Field(
        1.0,
        ge=0.5,
        le=1.0,
        description="branches are scaled by depth^-depth_alpha, relative to the base: 1 is "
        "CompleteP, 0.5 Depth-muP",
    )


class MuPPlusPlus(_Decayed):
    """muP++: muP with branches times 1/sqrt(2 L) and all learning rates times 1/sqrt(L).

    As implemented in ArchScale (github.com/microsoft/ArchScale).
    """

    kind: Literal["mupp"] = "mupp"
    base_layers: Count = Field(
        gt=0, description="number of blocks at which hyperparameters were tuned"
    )
    base_batch_tokens: Count | None = Field(
        None, gt=0, description="tokens of a batch at the base; null: the run's batch"
    )
    batch_rule: Literal["sqrt", "sde", "sdew"] = Field(
        "sqrt",
        description="rule for b times the base's batch. sqrt: lr x sqrt(b); sde: also eps / "
        "sqrt(b) and (1 - beta2) x b; sdew: eps / sqrt(b), (1 - beta2) x sqrt(b), weight_decay x "
        "sqrt(b)",
    )
    weight_decay_rule: WeightDecayRule = Field(
        "coupled",
        description="weight decay of hidden matrices at m times the base width, as for mup",
    )


class HyperP(_Widths):
    """Matrices on spheres, with learning rates that depend on depth, batch and tokens.

    arXiv 2603.28743. Learning rates do not depend on width or on the number of experts.
    """

    kind: Literal["hyperp"] = "hyperp"
    embedding_std: float = Field(
        1e-4, gt=0.0, description="standard deviation of the initial embedding"
    )
    head_std: float | None = Field(
        None,
        gt=0.0,
        description="standard deviation of the initial head at any width; null: 0.64 / "
        "sqrt(base_width)",
    )
    output_multiplier: Literal["none", "1/m"] = Field(
        "none", description="factor of the logits at m times the base width"
    )
    base_layers: Count = Field(gt=0, description="number of blocks at which lr was tuned")
    base_batch_tokens: Count | None = Field(
        None, gt=0, description="tokens of a batch at the base; null: the run's batch"
    )
    base_tokens: Count | None = Field(
        None, gt=0, description="length of a run at the base, in tokens; null: the run's length"
    )
    batch_exponent: float = Field(
        0.5, ge=0.0, le=1.0, description="lr is proportional to batch^batch_exponent"
    )
    data_exponent: float = Field(
        0.32, ge=0.0, le=1.0, description="lr is proportional to tokens^-data_exponent (eq. 8)"
    )
    data_exponent_scope: Literal["hidden", "all"] = Field(
        "all",
        description="parameters whose lr falls with the run's tokens: all (as in published runs), "
        "or hidden matrices, routers and experts (hidden, as in the paper's table)",
    )


class MSSP(_Widths):
    """Mixtures of sigmoid-gated experts that grow in width or number (arXiv 2605.14200)."""

    kind: Literal["mssp"] = "mssp"
    regime: Literal["I", "II", "III"] = Field(
        description="what grows. I: widths, with a fixed number of experts; II: width, number of "
        "experts and experts per token, with a fixed expert width; III: all of these"
    )
    base_experts: Count = Field(gt=0, description="experts.num_experts at the base")
    base_experts_per_token: Count = Field(gt=0, description="experts.experts_per_token at the base")
    base_expert_width: Count = Field(gt=0, description="experts.width at the base")
    base_layers: Count | None = Field(
        None,
        gt=0,
        description="number of blocks at the base, for completep's depth rules; null: no depth "
        "rules",
    )
    depth_alpha: float = Field(
        1.0, ge=0.5, le=1.0, description="exponent of depth, as for completep"
    )
    zero_head: bool = Field(True, description="initialize the output head to zero")
    weight_decay_rule: Literal["coupled", "independent"] = Field(
        "coupled", description="as for sp; the authors do not scale weight decay"
    )


ParameterizationConfig = Annotated[
    StandardParameterization
    | MaximalUpdateParameterization
    | CompleteP
    | MuPPlusPlus
    | HyperP
    | MSSP,
    Field(discriminator="kind"),
]
