"""The step time of many configurations, term by term."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from allometry.scaling.planner import communication, operators
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.pipeline import bottleneck, bubble

COMMUNICATION = (
    *("tensor parallel", "expert parallel", "context parallel", "between stages"),
    *("data parallel", "jitter"),
)
"""Terms that a single GPU has none of."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of C configurations: ``terms`` add up to ``seconds``, (C,)."""

    terms: dict[str, Floats]
    cases: Cases

    @property
    def seconds(self) -> Floats:
        """Of a step, (C,)."""
        return sum(self.terms.values(), np.zeros(len(self.cases)))

    @property
    def tokens_per_second(self) -> Floats:
        """Of one GPU, (C,)."""
        return self.cases.step_tokens / self.seconds / self.cases.gpus

    def explain(self, index: int) -> dict[str, float]:
        """The terms of one configuration in seconds, the largest first; zeros left out."""
        terms = {name: float(column[index]) for name, column in self.terms.items()}
        return dict(sorted(((k, v) for k, v in terms.items() if v), key=lambda kv: -kv[1]))


def step_time(cases: Cases, constants: Constants | None = None) -> StepTime:
    """Predict a step of every configuration.

    The step is the slowest stage for each micro-batch, the bubble of the schedule, messages that
    nothing hides, and the optimizer. A layer takes the longer of device and host, smoothly:
    (gpu^4 + cpu^4)^(1/4), or both in turn where one processor is both.
    """
    constants = constants or Constants()
    n, full = cases.n, cases.recompute == "full"
    again = np.where(full, 1.0, 0.0)
    scored = operators.scores(cases, constants)
    selective = (cases.recompute == "selective") & (n["flash"] == 0)
    products = operators.attention_products(cases, constants)
    products = (products + operators.ffn_products(cases, constants)) * (3 + again)
    attention = scored * (np.where(n["flash"] > 0, 3.5, 3.0) + np.where(selective, 1.0, again))
    passes = operators.elementwise(cases, constants) * (3 + np.maximum(again, n["repeats"]))
    moved, latency = communication.tensor(cases, constants)
    tensor, latency = moved * (2.5 + again), latency * (2.5 + again)
    device = products + attention + passes + tensor
    host = operators.launches(cases, constants)
    beside = cases.hw["asynchronous"] > 0  # else the processor does one after the other
    held = np.where(beside, (device**4 + host**4) ** 0.25 - device, host)
    delayed = np.where(beside, (device**4 + (host + latency) ** 4) ** 0.25 - device - held, latency)
    experts = communication.experts(cases, constants) * (2 + again)
    ring = communication.context(cases, constants, scored) * (3 + again)
    per_layer = {
        "matrix products": products,
        "attention": attention,
        "element-wise": passes,
        "waiting for the host": held,
        "tensor parallel": tensor + delayed,
        "expert parallel": experts,
        "context parallel": ring,
    }
    layer = sum(per_layer.values(), np.zeros(len(cases)))
    head, m, p = operators.head(cases, constants), cases.micro_batches, n["pp"]
    mean = (n["layers"] * layer + head) / p
    slowest = bottleneck(layer, n["layers"], head, p, n["even_stages"])
    part = mean / (3 + again)
    update, adding = communication.optimizer(cases, constants)
    terms = {name: m * n["layers"] / p * each for name, each in per_layer.items()}
    terms |= {
        "head and loss": m * head / p,
        "uneven stages": m * (slowest - mean),
        "bubble": bubble(cases.schedule, p, n["chunks"], part * (1 + again), part, part),
        "between stages": (m + p - 1) * communication.between_stages(cases, constants),
        "data parallel": communication.data(cases, constants, mean),
        "adding gradients": adding,
        "optimizer": update,
        "overhead": np.full(len(cases), constants.overhead_s),
    }
    terms["jitter"] = (
        constants.jitter
        * np.maximum(np.log2(cases.gpus / 8), 0)
        * sum(terms.values(), np.zeros(len(cases)))
    )
    return StepTime(terms, cases)
