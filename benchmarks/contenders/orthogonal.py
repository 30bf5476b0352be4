"""Rank of MuonH's step: ``torchrun --nproc-per-node W -m contenders.orthogonal --out FILE``.

Gradients are given, and parameters are replicated (ZeRO stage 0), so that owners share the work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from allometry.configs.execution import ParallelConfig
from allometry.configs.optimization import MuonH
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim import newton_schulz
from allometry.optim.build import build_optimizer
from allometry.parallel.mesh import open_mesh
from allometry.scaling.parameterization import Parameterization
from contenders.rules import SIZES, hyperp, model


class Clock:
    """Accumulate the seconds and the number of calls of a function."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - begun
        self.calls += 1
        return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    description = model(given.size)
    config = MuonH(lr=0.01)
    rules = Parameterization(hyperp(given.size), description, config)
    made = build_model(description, rules, "fp32")
    initialize(made, rules, 0)
    clock = Clock(newton_schulz.newton_schulz)
    newton_schulz.newton_schulz = clock
    with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
        optimizer = build_optimizer(
            made.named_parameters(), parameter_specs(made), rules, config, mesh
        )
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.grad = torch.randn_like(parameter)
        steps, orthogonal, calls = [], [], 0
        for _ in range(given.repeats + 1):
            mesh.barrier("step")
            clock.seconds, clock.calls = 0.0, 0
            begun = time.perf_counter()
            optimizer.step()
            steps.append(time.perf_counter() - begun)
            orthogonal.append(clock.seconds)
            calls = clock.calls
        mine = {
            "calls": calls,
            "step_s": statistics.median(steps[1:]),
            "newton_schulz_s": statistics.median(orthogonal[1:]),
        }
        found = mesh.gather_objects(mine)
        if mesh.is_main:
            given.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
