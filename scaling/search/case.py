"""Input of the cost model for a run: its row of ``Cases``, and aspects without a term."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.configs.model import LatentExperts, ModelConfig, MoEModel
from allometry.configs.run import RunConfig
from allometry.scaling.attention import AttentionCall, choose_backend, named
from allometry.scaling.batch import BatchPlan
from allometry.scaling.count import attention_flops
from allometry.scaling.layout import Layout
from allometry.scaling.loads import BalanceLoads
from allometry.scaling.memory import MemoryEstimate
from allometry.scaling.plan import memory_of, tokens_of_micro_batch
from allometry.scaling.planner.cases import Cases
from allometry.scaling.search.columns import technique_columns

_UNFUSED = ("masked", "reference", "blocked")


@dataclass(frozen=True)
class Case:
    """One run with one layout on one kind of hardware.

    ``row`` is a row of ``Cases``; ``memory`` is the estimate of the largest rank; ``left_out``:
    phrases for requested features without a term in the cost model.
    """

    row: dict[str, Any]
    memory: MemoryEstimate
    left_out: tuple[str, ...]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        hardware: HardwareConfig,
        *,
        world_size: int | None = None,
        layout: Layout | None = None,
        name: str = "this machine",
        device: str = "cuda",
    ) -> Case:
        """Return the case of a run on ``world_size`` ranks, or with a given ``layout``.

        ``name``: the row's name of the hardware, a key of ``Cases.of``'s mapping. ``device``:
        "cuda" or "cpu", which selects the attention kernels. Raises UserError for an invalid
        layout, as training does. For example, ``Case.of(config, hardware,
        world_size=8).memory.total``.
        """
        if layout is None:
            assert world_size is not None
            layout = Layout.of(config, world_size)
        batch = BatchPlan(config.batch, config.data.sequence_length)
        return cls(
            row_of(config, layout, hardware, name, device),
            memory_of(config, layout, batch, device),
            tuple(left_out(config)),
        )

    def cases(self, hardware: HardwareConfig) -> Cases:
        """Return the row as ``Cases``. Raises UserError, as ``Cases.of``."""
        return Cases.of([self.row], {self.row["hardware"]: hardware})


def row_of(
    config: RunConfig, layout: Layout, hardware: HardwareConfig, name: str, device: str = "cuda"
) -> dict[str, Any]:
    """Return the row of ``Cases`` for a run with this layout.

    All documents are assumed as long as a window or the maximum document length, each on the fewest
    possible ranks.
    """
    training, degrees, length = config.training, layout.degrees, sequence_of(config)
    tokens = tokens_of_micro_batch(config)
    cp = min(max(1, -(-length // tokens)), degrees.hdp)
    zero, backend = config.parallel.zero, attention_backend(config, device)
    return {
        **model_columns(config.model),
        "sequence": length,
        "attended": attended(config.model, length),
        "micro_batch": tokens * cp / length,
        "global_batch": config.batch.sequences * config.data.sequence_length / length,
        "tp": degrees.tp,
        "pp": degrees.pp,
        "chunks": len(layout.stages) // degrees.pp,
        "cp": cp,
        "ep": degrees.ep,
        "dp": degrees.hdp / cp,
        # Without frees() stage 3 communicates like stage 2.
        "zero": zero.stage if zero.frees(degrees.pp) else min(zero.stage, 2),
        "reduces": float(zero.stage >= 2 and degrees.pp == 1),
        "repeats": float(training.activation_checkpointing == "selective"),
        "flash": float(backend not in _UNFUSED),
        "eager": float(not training.compile),
        "hardware": name,
        "precision": precision_of(config, hardware),
        "recompute": training.activation_checkpointing,
        "schedule": layout.schedule if degrees.pp > 1 else "1f1b",
        **technique_columns(config, layout, backend, device),
    }


def sequence_of(config: RunConfig) -> int:
    """Return the number of tokens of a sequence in attention, as assumed by the cost model."""
    if config.data.kind == "documents":
        return min(config.data.sequence_length, config.data.max_document_tokens)
    return config.data.sequence_length


def model_columns(model: ModelConfig) -> dict[str, Any]:
    """Return the columns of ``Cases`` that depend on the model."""
    columns: dict[str, Any] = {
        "layers": model.num_layers,
        "width": model.width,
        "heads": model.num_heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_width,
        "ffn": model.ffn_width or 0,
        "vocab": model.vocab_size,
        "tied": int(model.tied_embeddings),
    }
    if model.latent_attention is not None:
        latent = model.latent_attention
        columns |= {"q_rank": latent.q_lora_rank or 0, "kv_rank": latent.kv_lora_rank}
    if isinstance(model, MoEModel):
        columns |= {
            "experts": model.experts.num_experts,
            "top_k": model.experts.experts_per_token,
            "expert_ffn": model.experts.width,
            "shared_experts": model.experts.num_shared_experts,
            "dense_layers": model.first_dense_layers,
        }
    return columns


def attended(model: ModelConfig, length: int) -> float:
    """Return the column ``attended`` of ``Cases``: fewer tokens with windows; 0: all tokens."""
    if model.window is None:
        return 0.0
    full = attention_flops(model, length)
    windowed = attention_flops(model, length, model.window.tokens)
    share = model.num_windowed / model.num_layers
    return length * (share * windowed / full + 1 - share)


def attention_backend(config: RunConfig, device: str) -> str:
    """Return the attention back end: the configured one, or an assumption for measured choices."""
    if config.kernels.attention != "auto":
        return named(config.kernels.attention).name
    call = AttentionCall(
        device,
        config.training.compute_dtype,
        packed=config.data.kind == "documents" or config.data.packing == "per_document",
        length=config.data.sequence_length,
        compiled=config.training.compile,
        head_width=config.model.head_width,
        window=config.model.window_tokens,
    )
    return choose_backend(call).name


def precision_of(config: RunConfig, hardware: HardwareConfig) -> str:
    """Return the type of the blocks' products: FP8 if configured or selected by ``auto``."""
    linears, compute = config.precision.linears, config.training.compute_dtype
    if linears == "auto":
        known = set(hardware.gpu.peak_flops) & set(hardware.gpu.attainable)
        return "fp8" if "fp8" in known and compute == "bf16" else compute
    return compute if linears == "compute" else "fp8"


def check_precision(config: RunConfig, hardware: HardwareConfig, name: str) -> None:
    """Raise UserError for a type of products for which the card has no rate."""
    known = set(hardware.gpu.peak_flops) & set(hardware.gpu.attainable)
    asked = precision_of(config, hardware)
    for kind, key in (
        (config.training.compute_dtype, "training.compute_dtype"),
        (asked, "precision.linears"),
    ):
        if kind not in known:
            given = config.precision.linears if key == "precision.linears" else kind
            raise UserError(
                f"{key}={given}: the description of {name} has no rate for {kind}; it has "
                f"{', '.join(sorted(known))}"
            )


def left_out(config: RunConfig) -> Iterator[str]:
    """Yield aspects for which the cost model has no term, or only an approximate one."""
    parallel, model = config.parallel, config.model
    zero = parallel.zero
    if config.data.kind == "documents":
        yield "documents' lengths: all are taken to be as long as a window, or the longest there is"
        if parallel.context.offload != "none":
            yield f"parallel.context.offload={parallel.context.offload}"
    elif config.data.packing == "per_document":
        yield "documents in a sequence: attention is timed as of whole sequences, an upper bound"
    for key, value, usual in (
        ("parallel.zero.engine", zero.engine, "fsdp2"),
        ("parallel.expert_tp", parallel.expert_tp, None),
        ("optimizer.kind", config.optimizer.kind, "adamw"),
    ):
        if value != usual:
            yield f"{key}={value}"
    if isinstance(model, MoEModel) and isinstance(model.experts, LatentExperts):
        yield "model.experts.latent_width: experts are timed at the model's width"
    if model.latent_attention is not None:
        latent = model.latent_attention
        if latent.q_lora_rank is None:
            yield "model.latent_attention.q_lora_rank=null: the product to queries is not timed"
        if not latent.qk_nope_head_dim == latent.v_head_dim == 2 * latent.qk_rope_head_dim:
            yield (
                "widths in model.latent_attention: products are timed as if two thirds of a head "
                "were not rotated, and values as wide as these"
            )
    if model.streams is not None:
        yield f"model.streams.count={model.streams.count}: the step is timed as of one stream"
    if model.norms == "both":
        yield "model.norms=both: blocks are timed with two norms, not four"
    if model.qkv_bias:
        yield "model.qkv_bias: adding biases is not timed"
    if model.qk_norm_over == "width" and (parallel.tp or 1) > 1:
        yield "model.qk_norm_over=width: its message between tensor-parallel ranks is not timed"
    if model.multi_token is not None:
        yield f"model.multi_token: {model.num_depths} more blocks and heads are not timed"
    loads = BalanceLoads.of(config)
    if loads is not None and loads.loads == "this_batch":
        yield "the forward pass that counts experts' loads (model.router.balance.loads)"
    if config.batch.ramp is not None:
        yield "batch.ramp: steps are timed at the full batch"
