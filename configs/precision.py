"""The ``precision`` section: what is kept or multiplied in FP8."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, Section

Linears = Literal["auto", "compute", "fp8_tensorwise", "fp8_rowwise", "fp8_blockwise"]
Fp8Role = Literal["hidden", "expert_up", "expert_down"]
ROLES: tuple[Fp8Role, ...] = ("hidden", "expert_up", "expert_down")


class PrecisionConfig(Section):
    """FP8 for what is kept for backward and for products; docs/precision.md says what each costs.

    ``compute`` is ``training.compute_dtype``. Router, head, embedding and attention stay in it.
    """

    saved_activations: Literal["compute", "fp8"] = Field(
        "compute",
        description="type in which inputs of norms, linear layers, SwiGLU, routers and experts "
        "wait for backward; fp8: E4M3 with a bf16 scale for each 16 numbers of a row",
    )
    linears: Linears = Field(
        "compute",
        description="products of the layers' weights: compute, or FP8 with one scale for a tensor, "
        "a row, or blocks (1 x 128 of activations, 128 x 128 of weights); auto: row-wise where the "
        "device can, else tensor-wise, else compute",
    )
    gradients: Literal["e4m3", "e5m2"] | None = Field(
        None,
        description="type of incoming gradients in FP8 products; null: e5m2 under one scale for a "
        "tensor, else e4m3",
    )
    roles: tuple[Fp8Role, ...] = Field(
        ROLES, min_length=1, description="roles of the weights whose products are FP8"
    )
    gather: Literal["compute", "fp8"] = Field(
        "compute",
        description="type in which ZeRO gathers the weights of FP8 products under one scale for a "
        "tensor: fp8 sends a byte of a number",
    )
    compute_layers: tuple[Annotated[Count, Field(ge=0)], ...] = Field(
        (), description="layers, from 0, whose products stay in the compute type"
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
