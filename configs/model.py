"""The ``model`` and ``parameterization`` sections."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section
from allometry.configs.decoder import Decoder


class DenseModel(Decoder):
    """A dense transformer: a gated feed-forward in every block."""

    kind: Literal["dense"] = Field("dense", description="architecture family")
    ffn_width: Count = Field(gt=0, description="hidden width of the gated feed-forward")


class _Experts(Section):
    num_experts: Count = Field(gt=0, description="routed experts in a block")
    experts_per_token: Count = Field(gt=0, description="routed experts that a token visits")
    width: Count = Field(gt=0, description="hidden width of one expert's SwiGLU")
    num_shared_experts: Count = Field(
        0, ge=0, description="experts of the same width that every token visits, run as one"
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
    """Experts that read and write the residual stream's width (arXiv 2401.04088)."""

    kind: Literal["swiglu"] = "swiglu"


class LatentExperts(_Experts):
    """Experts in a latent space: one shared projection down to it and one up from it."""

    kind: Literal["latent"] = "latent"
    latent_width: Count = Field(gt=0, description="width that the routed experts read and write")


ExpertsConfig = Annotated[SwiGLUExperts | LatentExperts, Field(discriminator="kind")]


class NoBalance(Section):
    """Nothing evens out the experts' load."""

    kind: Literal["none"] = "none"


class AuxiliaryBalance(Section):
    """A loss: coefficient * E * sum_e f_e P_e for each layer (arXiv 2101.03961, eq. 4), summed."""

    kind: Literal["auxiliary"] = "auxiliary"
    coefficient: float = Field(gt=0.0, description="weight of the loss of each layer")
    loads: Literal["auto", "step_before", "this_batch"] = Field(
        "auto",
        description="f_e: step_before: fractions of visits in the step before, at no cost; "
        "this_batch: in the step's own global batch, counted in one more forward pass of the "
        "blocks; auto: this_batch for data.kind documents and for small batches",
    )


class BiasBalance(Section):
    """A bias on each expert's score, for selection only (arXiv 2408.15664)."""

    kind: Literal["bias"] = "bias"
    rate: float = Field(1e-3, gt=0.0, description="what a step adds to or takes from a bias")
    centered: bool = Field(
        False,
        description="take the mean over experts out of each step's changes, so that biases do not "
        "drift; the experts chosen are the same (arXiv 2510.22115)",
    )


BalanceConfig = Annotated[NoBalance | AuxiliaryBalance | BiasBalance, Field(discriminator="kind")]


class RouterConfig(Section):
    """How a token chooses its experts and weighs what they say."""

    gate: Literal["softmax", "softmax_after_topk", "sigmoid", "sqrt"] = Field(
        "softmax",
        description="weights of the chosen experts: softmax over all experts; softmax over the "
        "chosen ones; sigmoid of each score; sqrt: square root of softmax_after_topk, shared and "
        "routed parts times sqrt(1/2) each (arXiv 2603.28743)",
    )
    normalize: bool = Field(
        False, description="divide the weights by their sum (gates softmax and sigmoid)"
    )
    scale: float = Field(1.0, gt=0.0, description="multiplies the routed experts' sum")
    num_groups: Count = Field(1, gt=0, description="groups that the experts are divided into")
    groups_per_token: Count | None = Field(
        None,
        gt=0,
        description="groups that a token may visit, those with the largest sum of their two best "
        "scores; null: all",
    )
    balance: BalanceConfig = Field(
        default_factory=lambda: AuxiliaryBalance(coefficient=1e-3),
        description="what evens out the experts' load",
    )
    z_loss: float = Field(
        0.0, ge=0.0, description="coefficient of the squared log partition (arXiv 2202.08906)"
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
    """A transformer with a mixture of experts in each block after the first dense ones."""

    kind: Literal["moe"] = Field("moe", description="architecture family")
    first_dense_layers: Count = Field(
        0, ge=0, description="blocks at the start that have a dense feed-forward instead"
    )
    ffn_width: Count | None = Field(
        None, gt=0, description="hidden width of the dense feed-forward, where there is one"
    )
    experts: ExpertsConfig = Field(description="the experts of a block")
    router: RouterConfig = Field(default_factory=RouterConfig, description="the choice among them")

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
        """Whether this block (counted from 0) holds experts."""
        return layer >= self.first_dense_layers


ModelConfig = DenseModel | MoEModel
"""Any architecture; in a run's description ``kind`` says which."""


WeightDecayRule = Literal["coupled", "mup", "sqrt", "independent"]


class StandardParameterization(Section):
    """Standard parameterization: one learning rate and 1/sqrt(fan_in) initialisation for all."""

    kind: Literal["sp"] = "sp"
    embedding_std: float = Field(
        0.02, gt=0.0, description="standard deviation of the initial embedding"
    )
    weight_decay_rule: Literal["coupled", "independent"] = Field(
        "coupled",
        description="a step at the peak rate takes lr x weight_decay of a weight (coupled) or "
        "weight_decay itself (independent, arXiv 2309.14322)",
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
        description="hidden weight decay at m times the base width: 'coupled' keeps it, 'mup' "
        "multiplies it by what lr is divided by, so that lr x decay stays constant, 'sqrt' by the "
        "root of that (arXiv 2510.15262); 'independent': for all matrices a step at the peak rate "
        "takes weight_decay itself (arXiv 2309.14322)",
    )
    zero_head: bool = Field(False, description="start the output head from zeros")


class MaximalUpdateParameterization(_Decayed):
    """muP: what is tuned at ``base_width`` holds at any width (arXiv 2203.03466, Table 8)."""

    kind: Literal["mup"] = "mup"


class CompleteP(_Decayed):
    """muP that holds at any depth as well: CompleteP, and Depth-muP (arXiv 2505.01618)."""

    kind: Literal["completep"] = "completep"
    base_layers: Count = Field(gt=0, description="blocks at which hyperparameters were tuned")
    depth_alpha: float = Field(
        1.0,
        ge=0.5,
        le=1.0,
        description="branches shrink as depth to minus this: 1 is CompleteP, 0.5 Depth-muP",
    )


class MuPPlusPlus(_Decayed):
    """muP++: muP with branches times 1/sqrt(2 L) and one factor 1/sqrt(L) on all learning rates.

    As ArchScale runs it (github.com/microsoft/ArchScale).
    """

    kind: Literal["mupp"] = "mupp"
    base_layers: Count = Field(gt=0, description="blocks at which hyperparameters were tuned")
    base_batch_tokens: Count | None = Field(
        None, gt=0, description="tokens of a batch at the base; null: as many as the run's"
    )
    batch_rule: Literal["sqrt", "sde", "sdew"] = Field(
        "sqrt",
        description="for b times the base's batch: sqrt: lr x sqrt(b); sde: also eps / sqrt(b) and "
        "(1 - beta2) x b; sdew: eps / sqrt(b), (1 - beta2) x sqrt(b), weight_decay x sqrt(b)",
    )
    weight_decay_rule: WeightDecayRule = Field(
        "coupled", description="hidden weight decay at m times the base width, as for mup"
    )


class HyperP(_Widths):
    """Matrices on spheres, and how their learning rate follows depth, batch and tokens.

    arXiv 2603.28743. There is no factor for width, nor for the number of experts.
    """

    kind: Literal["hyperp"] = "hyperp"
    embedding_std: float = Field(
        1e-4, gt=0.0, description="standard deviation of the initial embedding"
    )
    head_std: float | None = Field(
        None, gt=0.0, description="that of the head at any width; null: 0.64 / sqrt(base_width)"
    )
    output_multiplier: Literal["none", "1/m"] = Field(
        "none", description="what logits are multiplied by at m times the base width"
    )
    base_layers: Count = Field(gt=0, description="blocks at which lr was tuned")
    base_batch_tokens: Count | None = Field(
        None, gt=0, description="tokens of a batch at the base; null: as many as the run's"
    )
    base_tokens: Count | None = Field(
        None, gt=0, description="length of a run at the base; null: as long as this run"
    )
    batch_exponent: float = Field(0.5, ge=0.0, le=1.0, description="lr grows as batch to this")
    data_exponent: float = Field(
        0.32, ge=0.0, le=1.0, description="lr falls as the run's tokens to this (eq. 8)"
    )
    data_exponent_scope: Literal["hidden", "all"] = Field(
        "all",
        description="whose lr falls with the run's tokens: all parameters' (as published runs did) "
        "or only that of hidden matrices, routers and experts (as the paper's table says)",
    )


class MSSP(_Widths):
    """Mixtures of sigmoid-gated experts that grow in width or number (arXiv 2605.14200)."""

    kind: Literal["mssp"] = "mssp"
    regime: Literal["I", "II", "III"] = Field(
        description="what grows: I: widths, with a fixed number of experts; II: width, experts and "
        "visits, with experts of fixed width; III: all of these"
    )
    base_experts: Count = Field(gt=0, description="experts.num_experts at the base")
    base_experts_per_token: Count = Field(gt=0, description="experts.experts_per_token there")
    base_expert_width: Count = Field(gt=0, description="experts.width at the base")
    base_layers: Count | None = Field(
        None, gt=0, description="blocks at the base, for the depth rules of completep; null: none"
    )
    depth_alpha: float = Field(1.0, ge=0.5, le=1.0, description="as for completep")
    zero_head: bool = Field(True, description="start the output head from zeros")
    weight_decay_rule: Literal["coupled", "independent"] = Field(
        "coupled", description="as for sp: the authors do not scale weight decay"
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
