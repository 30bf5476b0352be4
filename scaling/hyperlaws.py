"""Published laws of learning rate and batch size, each with its source and fitted range."""

# N parameters, D tokens of the run, C FLOPs of training, B tokens of a step, T tokens (HyperP's D),
# η learning rate; an octave is a factor of two

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.count import active_numel, flops_per_token
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import MATRICES

HYPERP_LAYERS = 8
HYPERP_TOKENS = 10.4e9


@dataclass(frozen=True, slots=True)
class Target:
    """Run for which hyperparameters are suggested.

    ``parameters`` N counts the matrices between embedding and head, including all experts;
    ``active`` counts those used by one token. ``flops`` C is training (forward and backward)
    without embedding and head, with full (non-causal) attention, the definition of the laws in C.
    ``loss`` is the expected loss in nats per token, used only by laws in terms of loss.
    """

    kind: Literal["dense", "moe"]
    parameters: int
    active: int
    tokens: int
    flops: float
    num_layers: int
    loss: float | None = None

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        tokens: int,
        sequence_length: int,
        *,
        parameters: int | None = None,
        loss: float | None = None,
    ) -> Target:
        """Return the target of ``model``, or of a similar model with ``parameters`` parameters.

        The similar model keeps the share of active parameters and the ratio of width to depth, so
        its number of layers grows as the cube root of N; its C is 6 x active x tokens, without
        attention scores.
        """
        specs = [spec for spec in inventory(model) if spec.role in MATRICES]
        total = sum(spec.numel for spec in specs)
        active = sum(active_numel(model, spec) for spec in specs)
        flops = flops_per_token(model, sequence_length)
        # Subtract the three products of the head; add the half of the scores hidden by the causal
        # mask.
        per_token = flops.total - 6 * model.vocab_size * model.width + flops.attention
        layers = model.num_layers
        if parameters is not None:
            growth = parameters / total
            layers = max(1, round(layers * growth ** (1 / 3)))
            total, active = parameters, round(active * growth)
            per_token = 6 * active
        return cls(
            kind="moe" if isinstance(model, MoEModel) else "dense",
            parameters=total,
            active=active,
            tokens=tokens,
            flops=float(per_token) * tokens,
            num_layers=layers,
            loss=loss,
        )


@dataclass(frozen=True, slots=True)
class Range:
    """Fitted range of a law in one quantity of the target."""

    quantity: Literal["parameters", "active", "tokens", "flops", "num_layers"]
    low: float
    high: float

    def objection(self, target: Target) -> str | None:
        """Return a description of how far the target is outside the range; None if it is inside."""
        value = float(getattr(target, self.quantity))
        said = f"{_NAMES[self.quantity]} {value:.3g} is"
        if value > self.high * _EDGE:
            return f"{said} {value / self.high:.3g} x the largest behind the law"
        if value * _EDGE < self.low:
            return f"{said} {self.low / value:.3g} x below the smallest behind the law"
        return None


_EDGE = 1.005  # ranges have three digits
_NAMES = {
    "parameters": "N",
    "active": "active N",
    "tokens": "D",
    "flops": "C",
    "num_layers": "depth",
}


@dataclass(frozen=True, slots=True)
class Values:
    """Suggestion of a law: peak learning rate, batch in tokens, or only one of them; and notes."""

    lr: float | None = None
    batch_tokens: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Law:
    """A law with its optimizer, its parameterization and its fitted range by kind of model.

    Learning rates of two laws are comparable only if ``setting`` is the same.
    """

    name: str
    source: str
    setting: str
    schedule: str
    fitted: Mapping[str, tuple[Range, ...]]
    evaluate: Callable[[Target], Values]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Suggestion of one law for one target; ``outside``: distances from its range as text.

    ``refused``: the reason if the law does not apply; learning rate and batch are then None.
    """

    law: str
    source: str
    setting: str
    schedule: str
    fitted: str
    lr: float | None
    batch_tokens: int | None
    outside: tuple[str, ...]
    notes: tuple[str, ...]
    refused: str | None = None

    def describe(self) -> dict[str, Any]:
        """Return the suggestion as JSON."""
        return asdict(self)


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """Return (learning rate, batch in tokens) of Step Law, arXiv 2503.04715, eq. 1.

    η = 1.79 N^−0.713 D^0.307 and B = 0.58 D^0.571. For example, N = 1e9 and D = 1e11 give η =
    1.63e-3 and B = 1.11e6.
    """
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def deepseek_law(flops: float) -> tuple[float, float]:
    """Return (learning rate, batch in tokens) of DeepSeek LLM, arXiv 2401.02954, eq. 1.

    For example, C = 1e20 gives 9.86e-4 and 1.02e6.
    """
    return 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271


def ling_law(flops: float) -> tuple[float, float]:
    """Return (learning rate, batch in tokens) for mixtures of experts, arXiv 2507.17702, eq. 3."""
    return 1.1576 * flops**-0.1529, 0.0694 * flops**0.3644


def minicpm_batch(loss: float) -> float:
    """Return the batch in tokens for a loss in nats per token, arXiv 2404.06395, section 3.2."""
    return float(1.21e9 / loss**6.24)


def hyperp_base_lr(tokens: float) -> float:
    """Return HyperP's best rate at 8 layers and 2²¹ tokens per step, arXiv 2603.28743, eq. 8."""
    return float(24.27 * tokens**-0.320)


def _step(target: Target) -> Values:
    lr, batch = step_law(target.parameters, target.tokens)
    notes: tuple[str, ...] = ("the last rate of its runs was 1e-5 whatever the peak",)
    if target.kind == "moe":
        # Verified on the authors' 16 mixtures: with N of all experts the rate is within 1.3 octaves
        # of the best one (median 0.3), with the active N up to 3.3 octaves above.
        notes += ("N counts all experts: with active N the rate is up to 3 octaves too high",)
    return Values(lr, batch, notes)


def _minicpm(target: Target) -> Values:
    rate = "the rate is that at the base width of 256 of its own muP, the same at every size"
    if target.loss is None:
        return Values(0.01, None, (rate, "its batch needs the loss that is expected"))
    return Values(0.01, minicpm_batch(target.loss), (rate, "loss and batch are those on C4"))


def _hyperp(target: Target) -> Values:
    at_base = hyperp_base_lr(target.tokens)
    notes = (
        f"for {target.num_layers} layers and steps of 2^21 tokens; x sqrt(B / 2^21) for others",
        f"{hyperp_base_lr(HYPERP_TOKENS):.3g} at its base, which the parameterization scales from",
        "it has no law of the batch: 2^18 to 2^21 tokens were below the critical one",
    )
    return Values(at_base * math.sqrt(HYPERP_LAYERS / target.num_layers), None, notes)


_ADAMW = "adamw, standard parameterization"
_HYPERP_RANGE = (Range("num_layers", 8, 24), Range("tokens", 10.4e9, 194.7e9))
LAWS: tuple[Law, ...] = (
    Law(
        name="step-law",
        source="Step Law, arXiv 2503.04715",
        setting=_ADAMW,
        schedule="cosine to 1e-5 after 2,000 steps of warm-up",
        # The smallest dense N is from the paper; the other bounds are from its published runs.
        fitted={
            "dense": (Range("parameters", 59e6, 1.07e9), Range("tokens", 4e9, 1e11)),
            "moe": (Range("parameters", 2.15e9, 2.16e9), Range("tokens", 2e9, 2e10)),
        },
        evaluate=_step,
    ),
    Law(
        name="deepseek",
        source="DeepSeek LLM, arXiv 2401.02954",
        setting=_ADAMW,
        schedule="multi-step: 31.6 % of the peak after 80 % of the tokens, 10 % after 90 %",
        fitted={"dense": (Range("flops", 1e17, 2e19),)},
        evaluate=lambda target: Values(*deepseek_law(target.flops)),
    ),
    Law(
        name="ling",
        source="Ling, arXiv 2507.17702",
        setting=_ADAMW,
        schedule="1 % of warm-up, exponential decay to 10 %",
        fitted={"moe": (Range("flops", 3e17, 3e20),)},
        evaluate=lambda target: Values(
            *ling_law(target.flops),
            ("C is read as training FLOPs: the paper's own runs (table 7) agree with that best",),
        ),
    ),
    Law(
        name="minicpm",
        source="MiniCPM, arXiv 2404.06395",
        setting="adam, its muP (base width 256)",
        schedule="wsd with the last 10 % decaying",
        fitted={"dense": (Range("parameters", 9e6, 2.1e9),)},
        evaluate=_minicpm,
    ),
    Law(
        name="hyperp",
        source="HyperP, arXiv 2603.28743",
        setting="muonh, hyperp",
        schedule="linear to 10 %, no warm-up",
        fitted={"dense": _HYPERP_RANGE, "moe": _HYPERP_RANGE},
        evaluate=_hyperp,
    ),
)


def suggest(target: Target, laws: Sequence[Law] = LAWS) -> tuple[Suggestion, ...]:
    """Return the suggestions of all laws for the target, in the order of the laws.

    For example, ``suggest(Target.of(model, 10**10, 4096))``.
    """
    suggestions = []
    for law in laws:
        ranges = law.fitted.get(target.kind, ())
        refused = None
        if not ranges:
            kinds = " and ".join(law.fitted)
            refused = f"fitted on {kinds} models only, not on {target.kind} ones"
        values = law.evaluate(target) if ranges else Values()
        batch = values.batch_tokens
        fitted = (f"{_NAMES[r.quantity]} {r.low:.3g} to {r.high:.3g}" for r in ranges)
        suggestion = Suggestion(
            law=law.name,
            source=law.source,
            setting=law.setting,
            schedule=law.schedule,
            fitted=", ".join(fitted),
            lr=values.lr,
            batch_tokens=None if batch is None else round(batch),
            outside=tuple(filter(None, (r.objection(target) for r in ranges))),
            notes=values.notes,
            refused=refused,
        )
        suggestions.append(suggestion)
    return tuple(suggestions)


def disagreements(suggestions: Sequence[Suggestion], octaves: float = 1.0) -> list[str]:
    """Return a sentence for each pair of laws that differ by more than ``octaves``.

    Learning rates are compared only for the same optimizer and parameterization, batch sizes
    always.
    """
    sentences = []
    for one, other in itertools.combinations(suggestions, 2):
        comparable = one.setting == other.setting
        for what, a, b in (
            ("learning rates", one.lr, other.lr if comparable else None),
            ("batches", one.batch_tokens, other.batch_tokens),
        ):
            apart = 0.0 if a is None or b is None else abs(math.log2(a / b))
            if apart > octaves:
                sentences.append(
                    f"the {what} of {one.law} and {other.law} are {apart:.1f} octaves apart; "
                    "sweep between them at a small size"
                )
    return sentences
