"""The ``precision`` section: FP8 in saved activations, matrix products and all-gathers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

Linears = Literal["auto", "compute", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise"]
Fp8Role = Literal["hidden", "expert_up", "expert_down"]
ROLES: tuple[Fp8Role, ...] = ("hidden", "expert_up", "expert_down")


class PrecisionConfig(Section):
    """FP8 for saved activations and matrix products; docs/precision.md gives the costs.

    ``compute`` means ``training.compute_dtype``, which router, head, embedding and attention always
    use.
    """

    saved_activations: Literal["compute", "fp8"] = Field(
        "compute",
        description="type of the inputs of norms, linear layers, SwiGLU, routers and experts that "
        "are saved for backward; fp8: E4M3 with a bf16 scale per 16 elements of a row",
    )
    linears: Linears = Field(
        "compute",
        description="type of the products of linear layers: compute, or FP8 with one scale per "
        "tensor, row or block (1 x 128 for activations, 128 x 128 for weights); auto: row-wise if "
        "the device supports it, else tensor-wise, else compute",
    )
    gradients: Literal["e4m3", "e5m2"] | None = Field(
        None,
        description="type of incoming gradients in FP8 products; null: e5m2 for tensor-wise "
        "scales, else e4m3",
    )
    roles: tuple[Fp8Role, ...] = Field(
        ROLES, min_length=1, description="roles of the weights whose products are computed in FP8"
    )
    gather: Literal["compute", "fp8"] = Field(
        "compute",
        description="type in which ZeRO all-gathers the weights of tensor-wise FP8 products; fp8: "
        "one byte per element",
    )
    compute_layers: tuple[Annotated[Count, Field(ge=0)], ...] = Field(
        (), description="layers, counted from 0, whose products stay in the compute type"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.linears == "compute":
            for name, usual in (("gradients", None), ("roles", ROLES), ("compute_layers", ())):
                if getattr(self, name) != usual:
                    raise ValueError(
                        f"{name} says how FP8 products are made, but linears=compute makes none; "
                        f"choose a recipe in linears or leave {name} out"
                    )
        if self.gather == "fp8" and self.linears != "fp8_tensorwise":
            raise ValueError(
                "gather=fp8 sends weights that share one scale, as linears=fp8_tensorwise reads "
                f"them, but linears={self.linears}; set that or gather: compute"
            )
        return self
