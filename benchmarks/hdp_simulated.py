"""Simulate the step time of each policy for batches of full documents on 1,024 ranks.

    python benchmarks/hdp_simulated.py [--tail 0.24 0.33] [--kv-heads 8] [--seeds 3] [--json FILE]

No GPU is used and no message is sent: times come from ``scaling.hdp.cost`` for a Llama-like 7B
model (32 layers, width 4096, feed-forward 11008, 32 heads) at the planner's default rates, and
waiting times from ``parallel.hdp.replay``. A step has 32M tokens. Document lengths are lognormal
(median 1K) except for a tail with the given share of the tokens, which is spread equally over the
octaves from 256K to 2M. A context below 2M cuts documents, as ``data.max_document_tokens`` does, so
that all contexts have the same tokens.

``ideal``: the step's arithmetic spread evenly over all ranks, without messages. ``floor``: lower
bound for plans that keep each document on the same ranks throughout (see ``floor_s``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from allometry.configs.execution import ContextConfig, ContextCosts
from allometry.configs.model import DenseModel
from allometry.parallel.hdp.replay import replay, summary
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan, make_plan
from allometry.trainer.record.writer import commit

RANKS, TOKENS, CAPACITY = 1024, 32 * 2**20, 8192
CONTEXTS = tuple(k * 2**10 for k in (256, 512, 1024, 2048))
LONG = 256 * 2**10
PUBLISHED = "ByteScale (arXiv 2502.21231) at 2M: 6.21 to 7.89 times static, 7B to 30B, measured"
BALANCE_GOAL, PLAN_GOAL_S = 1.10, 0.050

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """Result of one policy on one batch."""

    tail: float
    seed: int
    context: int
    policy: str
    makespan_s: float
    over_ideal: float
    over_floor: float
    plan_s: float
    replay_s: float
    units: int
    waves: int
    largest_degree: int
    sent_tb: float


def model(kv_heads: int) -> DenseModel:
    return DenseModel(
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=kv_heads,
        ffn_width=11008,
    )


def documents(tail: float, seed: int, tokens: int = TOKENS) -> Ints:
    """Return document lengths that sum to ``tokens``, in random order."""
    random = np.random.default_rng(seed)
    # Tokens uniform in log length: the density of documents falls as 1/length^2.
    many = LONG * 2 ** (3 * random.random(1000))
    many = many[random.random(1000) < LONG / many]
    cut = np.searchsorted(np.cumsum(many), tail * tokens)
    long = np.floor(many[: cut + 1]).astype(np.int64)
    long[-1] -= max(int(long.sum() - tail * tokens), 0)
    short = np.ceil(random.lognormal(np.log(1024), 1.3, size=40_000)).astype(np.int64)
    short = short[short <= LONG]
    cut = np.searchsorted(np.cumsum(short), tokens - long.sum())
    short = short[: cut + 1]
    short[-1] -= long.sum() + short.sum() - tokens
    return random.permutation(np.concatenate([long[long > 0], short[short > 0]]))


def cut_at(lengths: Ints, context: int) -> Ints:
    """Cut documents into pieces of at most ``context`` tokens."""
    pieces = []
    for length in lengths.tolist():
        whole, rest = divmod(length, context)
        pieces += [context] * whole + [rest] * (rest > 0)
    return np.asarray(pieces, dtype=np.int64)


def ideal_s(cost: CostModel, lengths: Ints) -> float:
    s = lengths.astype(np.float64)
    return float(cost.compute(s, s * (s + 1)).sum()) / RANKS


def floor_s(cost: CostModel, lengths: Ints, chunk: int) -> float:
    """Return a lower bound for the seconds of any plan.

    A step of T seconds gives each document a degree at which it takes at most T, and uses at least
    the rank-seconds of the cheapest such degree; their sum is at most ranks x T. Documents that fit
    on one rank cost at least their arithmetic.
    """
    long = lengths[lengths > CAPACITY]
    rest = ideal_s(cost, lengths[lengths <= CAPACITY]) * RANKS
    s, counts = np.unique(long, return_counts=True)
    degrees = np.arange(1, RANKS + 1)
    tokens = s[:, None].astype(np.float64)
    seconds = cost.times(tokens, tokens * (tokens + 1), degrees[None])
    need = -(-s // CAPACITY)
    allowed = degrees[None] >= need[:, None]
    allowed &= degrees[None] <= np.maximum(need, s // (2 * chunk))[:, None]
    low, high = ideal_s(cost, lengths), 100 * ideal_s(cost, lengths)
    for _ in range(30):
        middle = (low + high) / 2
        work = np.where(allowed & (seconds <= middle), seconds * degrees[None], np.inf).min(axis=1)
        if np.isfinite(work).all() and (work * counts).sum() + rest <= RANKS * middle:
            high = middle
        else:
            low = middle
    return low


def timed_plan(lengths: Ints, config: ContextConfig, cost: CostModel) -> tuple[Plan, float]:
    """Return a plan and the CPU seconds to make it, on one thread."""
    start = time.process_time()
    plan = make_plan(lengths, RANKS, config, cost, "free", layers=32)
    return plan, time.process_time() - start


def rows_of(tail: float, seed: int, context: int, cost: CostModel, repeats: int) -> list[Row]:
    lengths = cut_at(documents(tail, seed), context)
    rows = []
    for policy in ("static", "naive", "balanced"):
        degree = context // CAPACITY if policy == "static" else 1
        config = ContextConfig(policy=policy, degree=degree, capacity_tokens=CAPACITY)
        times = []
        for _ in range(repeats):
            plan, seconds = timed_plan(lengths, config, cost)
            times.append(seconds)
        start = time.process_time()
        played = replay(plan)
        replay_s = time.process_time() - start
        found = summary(plan, cost, played)
        floor = floor_s(cost, lengths, config.min_chunk_tokens)
        rows.append(
            Row(
                tail=tail,
                seed=seed,
                context=context,
                policy=policy,
                makespan_s=played.makespan,
                over_ideal=played.makespan / ideal_s(cost, lengths),
                over_floor=played.makespan / floor,
                plan_s=statistics.median(times),
                replay_s=replay_s,
                units=len(plan.units),
                waves=found["waves"],
                largest_degree=max(map(int, found["degrees"])),
                sent_tb=found["bytes_sent"] / 1e12,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Format medians over seeds, with the speedup of each policy over static."""
    lines = [
        f"{'tail':>5} {'context':>8} {'policy':>9} {'time':>8} {'/ideal':>7} {'/floor':>7} "
        f"{'static/it':>9} {'sent':>8} {'plan':>8}"
    ]
    keys = sorted({(row.tail, row.context) for row in rows})
    for tail, context in keys:
        here = [row for row in rows if (row.tail, row.context) == (tail, context)]
        static = {row.seed: row.makespan_s for row in here if row.policy == "static"}
        for policy in ("static", "naive", "balanced"):
            of = [row for row in here if row.policy == policy]

            def middle(name: str, of: list[Row] = of) -> float:
                return statistics.median(getattr(row, name) for row in of)

            gain = statistics.median(static[row.seed] / row.makespan_s for row in of)
            lines.append(
                f"{tail:5.0%} {context // 1024:7}K {policy:>9} {middle('makespan_s'):6.1f} s "
                f"{middle('over_ideal'):7.3f} {middle('over_floor'):7.3f} {gain:8.2f}x "
                f"{middle('sent_tb'):5.0f} TB {middle('plan_s') * 1e3:5.1f} ms"
            )
    return "\n".join(lines)


def plan_time(cost: CostModel, repeats: int) -> list[float]:
    """Return the seconds to plan 10,000 documents with the balanced policy, by repetition."""
    lengths = cut_at(documents(0.24, 0, tokens=TOKENS * 2), CONTEXTS[-1])[:10_000]
    config = ContextConfig(capacity_tokens=CAPACITY)
    return [timed_plan(lengths, config, cost)[1] for _ in range(repeats)]


def verdicts(rows: Sequence[Row], times: Sequence[float]) -> list[str]:
    lines = []
    for tail in sorted({row.tail for row in rows}):
        for name, text in (("over_ideal", "ideal"), ("over_floor", "floor")):
            found = [getattr(r, name) for r in rows if r.policy == "balanced" and r.tail == tail]
            word = "met" if max(found) <= BALANCE_GOAL else "missed"
            lines.append(
                f"balanced over {text}, tail {tail:.0%}: worst {max(found):.3f}, "
                f"goal {BALANCE_GOAL}: {word}"
            )
    middle = statistics.median(times)
    word = "met" if middle <= PLAN_GOAL_S else "missed"
    lines.append(
        f"plan of 10,000 documents: {middle * 1e3:.1f} ms of processor time "
        f"(fastest {min(times) * 1e3:.1f}), "
        f"goal {PLAN_GOAL_S * 1e3:.0f} ms: {word}"
    )
    return [*lines, PUBLISHED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tail", type=float, nargs="+", default=[0.24, 0.33])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=ContextCosts().bandwidth_gb_per_s)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="plans timed for each row")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    costs = ContextCosts(bandwidth_gb_per_s=given.bandwidth)
    cost = CostModel.of(model(given.kv_heads), costs)
    rows = [
        row
        for tail in given.tail
        for context in CONTEXTS
        for seed in range(given.seeds)
        for row in rows_of(tail, seed, context, cost, given.repeats)
    ]
    times = plan_time(cost, max(given.repeats, 5))
    said = verdicts(rows, times)
    print(table(rows), *said, sep="\n")
    if given.json:
        result: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "commit": commit(),
            "costs": asdict(cost),
            "rows": [asdict(row) for row in rows],
            "plan_10000_s": times,
            "verdicts": said,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
