"""Step time of many configurations, by term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allometry.scaling.planner import communication, host, operators
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.pipeline import bottleneck, bubble

COMMUNICATION = (
    *("tensor parallel", "expert parallel", "context parallel", "between stages"),
    *("data parallel", "jitter"),
)
"""Terms that are 0 on a single GPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of C configurations: ``terms`` add up to ``seconds``, (C,)."""

    terms: dict[str, Floats]
    cases: Cases

    @property
    def seconds(self) -> Floats:
        """Seconds per step, (C,)."""
        return sum(self.terms.values(), np.zeros(len(self.cases)))

    @property
    def tokens_per_second(self) -> Floats:
        """Tokens per second of one GPU, (C,)."""
        return self.cases.step_tokens / self.seconds / self.cases.gpus

    def explain(self, index: int) -> dict[str, float]:
        """Return the nonzero terms of one configuration in seconds, the largest first."""
        terms = {name: float(column[index]) for name, column in self.terms.items()}
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda kv: -kv[1]))


def layer_time(cases: Cases, constants: Constants) -> dict[str, Floats]:
    """Return seconds of a mean layer and a micro-batch, forward and backward, by term.

    A layer takes a smooth maximum of device and host time, (gpu^4 + cpu^4)^(1/4), or their sum if
    one processor does both.
    """
    n = cases.n
    again = np.where(cases.recompute == "full", 1.0, 0.0)
    scored = operators.scores(cases, constants)
    selective = cases.recompute == "selective"
    products = operators.attention_products(cases, constants)
    products = (products + operators.ffn_products(cases, constants)) * (3 + again)
    dropped = np.where(selective & (n["flash"] == 0), 1.0, again)
    attention = scored * (np.where(n["flash"] > 0, 3.5, 3.0) + dropped)
    passes = operators.elementwise(cases, constants) * (3 + np.maximum(again, n["repeats"]))
    quantized, saved = operators.casts(cases, constants)
    moved, latency = communication.tensor(cases, constants)
    first = 1 / n["tensor_chunks"]  # the first chunk has no product to overlap with
    moved = moved * first + np.maximum(moved * (1 - first) - products, 0.0)
    device = products + attention + passes + quantized + saved + moved + latency
    launched = operators.launches(cases, constants)
    # If one processor does both, the times add up.
    beside = cases.hw["asynchronous"] > 0
    longer = (device**4 + (launched + latency) ** 4) ** 0.25 - device
    sent = communication.experts(cases, constants) * (2 + again)
    hidden = n["experts_beside"] * communication.HIDDEN * device
    terms = {
        "matrix products": products,
        "attention": attention,
        "element-wise": passes,
        "FP8 casts": quantized,
        "activations in FP8": saved,
        "waiting for the host": np.where(beside, longer, launched),
        "tensor parallel": moved + latency,
        "expert parallel": np.maximum(sent - hidden, 0.0),
        "context parallel": communication.context(cases, constants, scored) * (3 + again),
    }
    return terms | {"activations on the host": host.activations(cases, _total(terms))}


def _total(terms: dict[str, Floats]) -> Floats:
    return np.asarray(sum(terms.values()))


def step_time(cases: Cases, constants: Constants | None = None) -> StepTime:
    """Predict the step time of every configuration.

    A step consists of the slowest stage for each micro-batch, the bubble of the schedule, exposed
    messages and the optimizer. For example, ``step_time(cases).explain(0)``.
    """
    constants = constants or Constants()
    n, again = cases.n, np.where(cases.recompute == "full", 1.0, 0.0)
    per_layer = layer_time(cases, constants)
    layer = _total(per_layer)
    head, m, p = operators.head(cases, constants), cases.micro_batches, n["pp"]
    mean = (n["layers"] * layer + head) / p
    slowest = bottleneck(layer, n["layers"], head, p, n["even_stages"])
    part = mean / (3 + again)  # recomputation is part of the backward
    update, adding = communication.optimizer(cases, constants)
    terms = {name: m * n["layers"] / p * each for name, each in per_layer.items()}
    terms |= {
        "head and loss": m * head / p,
        "uneven stages": m * (slowest - mean),
        "uneven documents": m * mean * (n["document_stretch"] - 1),
        "bubble": bubble(cases.schedule, p, n["chunks"], part, part * (1 + again), part),
        "between stages": (m + p - 1) * communication.between_stages(cases, constants),
        "data parallel": communication.data(cases, constants, mean),
        "adding gradients": adding,
        "optimizer": update,
        "states on the host": host.states(cases),
        "overhead": constants.overhead_s * np.ones(len(cases)),
    }
    terms["jitter"] = constants.jitter * np.maximum(np.log2(cases.gpus / 8), 0) * _total(terms)
    return StepTime(terms, cases)
