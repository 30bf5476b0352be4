"""Weights of sources by bilevel optimization: ``allometry mix bilevel``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.command import Report
from allometry.launch.studies.commands import MixBilevel
from allometry.launch.text import counted, number, table, write_yaml
from allometry.scaling.batch import BatchPlan, total_steps
from allometry.studies.bilevel import BilevelStep, Plan, capped, learn, plan_bilevel
from allometry.trainer.sources import open_sources

COURSE = 10
"""Number of points of the recorded course of the weights."""


def learned(asked: MixBilevel) -> Report:
    """Learn the weights of a run's sources for a target.

    Raises UserError: the run, its data or the options cannot be used.
    """
    config = asked.load()
    _check(asked, config)
    device = _device(asked.device)
    stream = open_sources(config)
    sizes = {
        name: store.num_tokens for name, store in zip(stream.sources, stream.stores, strict=False)
    }
    seeds = range(config.run.seed, config.run.seed + asked.seeds)
    plans = [plan_bilevel(config, asked.target, seed, device) for seed in seeds]
    caps = _caps(asked, config, plans[0], sizes)
    capped(np.full(len(caps), 1.0 / len(caps)), caps)  # refused before training
    begun = time.perf_counter()
    studies = [
        list(learn(plan, asked.alpha, asked.weight_lr, seed))
        for plan, seed in zip(plans, seeds, strict=True)
    ]
    seconds = time.perf_counter() - begun
    for seed, steps in zip(seeds, studies, strict=True):
        if not np.isfinite(steps[-1].losses).all() or not np.isfinite(steps[-1].target):
            raise UserError(
                f"the losses of seed {seed} are not finite; lower optimizer.lr or --alpha"
            )
    facts = _facts(asked, plans[0], studies, caps)
    facts["seconds"] = seconds
    lines = [_table(facts), *(f"warning: {one}" for one in facts["warnings"])]
    if asked.yaml is not None:
        write_yaml(asked.yaml, "--yaml", {"data": {"sources": _sources(config, facts)}})
        lines.append(f"data.sources of it in {asked.yaml}")
    return Report(facts, "\n".join(lines))


def _device(name: str | None) -> torch.device:
    """Return the device of the models. Raises UserError: it is unknown or not available."""
    if name is not None and name not in ("cpu", "cuda"):
        raise UserError(f"--device={name} is not known; use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda is not available on this machine; use --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check(asked: MixBilevel, config: RunConfig) -> None:
    """Raise UserError for options out of range, a run with given weights, and for replay."""
    for name, value in (
        ("--alpha", asked.alpha),
        ("--weight-lr", asked.weight_lr),
        ("--max-epochs", asked.max_epochs),
        ("--tokens", 1.0 if asked.tokens is None else asked.tokens),
    ):
        if not 0.0 < value < float("inf"):
            raise UserError(f"{name}={value:g} must be a number above 0")
    for key in ("initial", "parent"):
        if getattr(config.run, key) is not None:
            raise UserError(
                f"run.{key} names other weights, but both models of the study begin with new "
                f"values; leave run.{key} out"
            )
    if config.data.replay is not None:
        raise UserError(
            "data.replay divides the batch between old and new sources, whose weights are not "
            "comparable; give a configuration without data.replay"
        )


def _caps(
    asked: MixBilevel, config: RunConfig, plan: Plan, sizes: dict[str, int]
) -> NDArray[np.float64]:
    """Return the largest share of each weighted source, by its epochs in the run to weight."""
    batch = BatchPlan(config.batch, config.data.sequence_length)
    tokens = asked.tokens or batch.tokens_after(total_steps(config.training, batch))
    own = {source.name: source.max_epochs for source in config.data.sources}
    epochs = [min(asked.max_epochs, own[name] or asked.max_epochs) for name in plan.sources]
    return np.array(
        [e * sizes[name] / tokens for e, name in zip(epochs, plan.sources, strict=True)]
    )


def _facts(
    asked: MixBilevel, plan: Plan, studies: list[list[BilevelStep]], caps: NDArray[np.float64]
) -> dict[str, Any]:
    """Return the results of all seeds (JSON)."""
    finals = np.array([steps[-1].shares for steps in studies])
    mean = finals.mean(0)
    weights = capped(mean, caps)
    spread = finals.std(0, ddof=1) if len(finals) > 1 else [None] * len(mean)
    points = np.unique(np.linspace(0, plan.steps - 1, COURSE).round().astype(int)).tolist()
    first = studies[0]
    epochs = plan.epochs()
    warnings = [
        f"{name} is read for {times:.3g} epochs in this study, and losses of text read before are "
        "too low: lower training.total_steps or batch.sequences, or prepare more of it"
        for name, times in epochs.items()
        if times > 1.0
    ]
    low = [name for name, p, w in zip(plan.sources, mean, weights, strict=True) if w < p - 1e-9]
    if low:
        warnings.append(
            f"{', '.join(low)}: the learned weight needs more epochs than --max-epochs="
            f"{asked.max_epochs:g}, or the source's max_epochs, and was lowered to these"
        )
    return {
        "target": asked.target,
        "alpha": asked.alpha,
        "weight_lr": asked.weight_lr,
        "steps": plan.steps,
        "seeds": len(studies),
        "sources": {
            name: {
                "weight": float(weights[s]),
                "learned": float(mean[s]),
                "deviation": None if spread[s] is None else float(spread[s]),
                "most": float(min(caps[s], 1.0)),
                "loss": float(first[-1].losses[s]),
                "inner": float(first[-1].inner[s]),
            }
            for s, name in enumerate(plan.sources)
        },
        "target_loss": [float(steps[-1].target) for steps in studies],
        "course": [
            {"step": at + 1, "shares": first[at].shares.tolist(), "target": first[at].target}
            for at in points
        ],
        "tokens": plan.ledger(),
        "epochs": epochs,
        "warnings": warnings,
    }


def _table(facts: dict[str, Any]) -> str:
    rows = [["source", "weight", "learned", "tokens read", "loss of w", "of u"]]
    for name, one in facts["sources"].items():
        deviation = "" if one["deviation"] is None else f" ± {one['deviation']:.3f}"
        rows.append(
            [
                name,
                f"{one['weight']:.4f}",
                f"{one['learned']:.4f}{deviation}",
                f"{facts['tokens'][name]:,}",
                number(one["loss"]),
                number(one["inner"]),
            ]
        )
    course = [["step", *facts["sources"], "loss of the target"]]
    for one in facts["course"]:
        shares = (f"{share:.4f}" for share in one["shares"])
        course.append([str(one["step"]), *shares, number(one["target"])])
    return "\n".join(
        [
            table(rows),
            f"target {facts['target']}, alpha {facts['alpha']:g}, {facts['steps']} steps, "
            f"{counted(facts['seeds'], 'seed')}, {facts['seconds']:.3g} s; the first seed:",
            table(course),
        ]
    )


def _sources(config: RunConfig, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``data.sources`` with the weights; a source that took no part keeps weight 0."""
    return [
        {
            **source.model_dump(mode="json", exclude_defaults=True),
            "weight": round(facts["sources"].get(source.name, {"weight": 0.0})["weight"], 9),
        }
        for source in config.data.sources
    ]
