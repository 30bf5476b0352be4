"""Compare the router's two sources of expert loads: the previous step and the current batch.

    python benchmarks/balance_loads.py [--steps 300]

All tokens of a sequence share one topic, a random direction. Experts learn the topics, because the
loss rewards the experts that a token's topic prefers; the auxiliary loss balances the loads. The
script prints the mean of the largest violation, (largest load - mean) / mean, over the second half
of the steps, and the correlation of loads between consecutive steps. Batches either alternate
between two topics, or draw one of 16 topics for each sequence (4 to 256 sequences).
"""

# T tokens, D width, E experts, C topics

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from allometry.configs.model import AuxiliaryBalance, RouterConfig
from allometry.models.router import Router
from allometry.scaling.inventory import matrix
from allometry.scaling.roles import Role
from allometry.trainer.balance import load_correlation

D, E, K, LENGTH = 32, 8, 2, 32
Draw = Callable[[int, torch.Generator], torch.Tensor]
"""Function (step, generator) -> topic of each sequence, int64 [sequences]."""


def alternating(sequences: int = 8) -> Draw:
    """Return a draw that alternates between two topics, one per step."""
    return lambda step, generator: torch.full((sequences,), step % 2)


def mixed(sequences: int, topics: int = 16) -> Draw:
    """Return a draw of an independent topic for each sequence."""
    return lambda step, generator: torch.randint(topics, (sequences,), generator=generator)


def simulate(loads: str, draw: Draw, steps: int = 300, seed: int = 0) -> tuple[float, float]:
    """Train one router; return (mean of the largest violation, mean correlation of loads).

    For example, ``simulate("this_batch", mixed(8))`` reads loads from the current batch.
    """
    generator = torch.Generator().manual_seed(seed)
    topic_CD = torch.randn(16, D, generator=generator)
    liking_CE = torch.randn(16, E, generator=generator)
    config = RouterConfig(balance=AuxiliaryBalance(coefficient=0.1))
    router = Router(matrix("weight", Role.ROUTER, E, D), config, K)
    with torch.no_grad():
        router.weight.normal_(std=0.02, generator=generator)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    violations, correlations = [], []
    before_E = router.load.clone()
    for step in range(steps):
        topic_T = draw(step, generator).repeat_interleave(LENGTH)
        x_TD = topic_CD[topic_T] + torch.randn(len(topic_T), D, generator=generator)
        router.tokens.fill_(len(x_TD))
        counts_E = router(x_TD).statistics.counts_E.float()
        load_E = counts_E / counts_E.sum()
        router.load.copy_(load_E if loads == "this_batch" else before_E)
        routing = router(x_TD)
        liked_Tk = liking_CE[topic_T].gather(1, routing.experts_Tk)
        optimizer.zero_grad()
        (-0.1 * (routing.gates_Tk * liked_Tk).sum(1).mean()).backward()
        optimizer.step()
        if 2 * step >= steps:
            violations.append(float(load_E.max() * E - 1.0))
            correlations.append(load_correlation(before_E, load_E) or 0.0)
        before_E = load_E
    return sum(violations) / len(violations), sum(correlations) / len(correlations)


def main() -> None:
    """Print one row per kind of batch, averaged over three seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    draws = {"two in turn": alternating()}
    draws |= {f"{n} sequences": mixed(n) for n in (4, 8, 16, 32, 64, 128, 256)}
    print("| a batch | step_before | this_batch | correlation of loads (step_before) |")
    print("|---|---|---|---|")
    for name, draw in draws.items():
        runs = {
            loads: [simulate(loads, draw, steps, seed) for seed in range(3)]
            for loads in ("step_before", "this_batch")
        }
        means = {
            loads: [sum(column) / 3 for column in zip(*pairs, strict=True)]
            for loads, pairs in runs.items()
        }
        before, (this, _) = means["step_before"], means["this_batch"]
        print(f"| {name} | {before[0]:.2f} | {this:.2f} | {before[1]:.2f} |")


if __name__ == "__main__":
    main()
