"""Files of the hot path, and the tests that cover each, fastest first."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

HOT = (
    *("models/*.py", "parallel/*.py", "parallel/hdp/*.py", "parallel/offload/*.py", "optim/*.py"),
    *(
        f"trainer/{name}.py"
        for name in ("step", "balance", "feed", "evaluate", "loop", "bad_steps", "skips")
    ),
    *(
        f"data/{name}.py"
        for name in (
            *("order", "shuffle", "mixture", "changes", "reading", "stream", "documents"),
            "batch",
        )
    ),
    *("scaling/count.py", "scaling/batch.py", "scaling/parameterizations/*.py"),
    "scaling/hdp/*.py",
)
COLD = (
    "*/__init__.py",
    "*cuda*.py",  # needs a GPU
    "parallel/measure.py",  # times layers
    "*triton*.py",  # needs a GPU
    "parallel/simulate.py",  # dry runs
    "parallel/overlap_log.py",
)

LAYOUTS = "tests/dist/test_dist_layouts.py"


@dataclass(frozen=True)
class Stage:
    """Arguments of one pytest call: test files, and a ``-k`` expression that selects from them."""

    files: tuple[str, ...]
    keyword: str = ""

    def arguments(self, root: Path) -> list[str]:
        """Return the arguments for a tree."""
        return [*self.files_in(root), *(["-k", self.keyword] if self.keyword else [])]

    def files_in(self, root: Path) -> list[str]:
        """Return the test files present in a tree."""
        return sorted({str(path.relative_to(root)) for f in self.files for path in root.glob(f)})


def unit(*names: str) -> Stage:
    return Stage(tuple(f"tests/unit/{name}.py" for name in names))


def dist(*names: str, keyword: str = "") -> Stage:
    return Stage(tuple(f"tests/dist/test_dist_{name}.py" for name in names), keyword)


ONE = dist("layouts", keyword="hdp2-zero3-fp64 or hdp2-selective or every_layout")
CUT = dist("layouts", keyword="hdp2-tp2-fp64 or pp2-tp2 or ep2-tp2")
STAGED = dist("layouts", keyword="gpipe or looped_bfs or interleaved_zero_bubble")
RUNS = unit("trainer/test_trainer_run")
FROZEN = unit("trainer/*overrides")

# The first pattern that matches a file determines its tests.
COVERING: tuple[tuple[str, tuple[Stage, ...]], ...] = (
    ("models/attention*.py", (unit("models/test_models_attention"), unit("models/test_*"))),
    ("models/grouped.py", (unit("models/test_models_grouped"), unit("models/test_*"))),
    (
        "models/products.py",
        (unit("models/*products", "models/*passes"), unit("models/test_*"), ONE),
    ),
    ("models/visits.py", (unit("models/test_models_grouped"), unit("models/test_*"))),
    ("models/gathered.py", (dist("gather_fp8"),)),
    ("models/quantiser.py", (unit("models/*saved", "models/*fp8*"),)),
    ("models/loss.py", (unit("models/test_models_loss"), unit("models/test_*"), CUT)),
    ("models/head.py", (unit("models/test_models_loss"), unit("models/test_*"), CUT)),
    (
        "models/vocabulary.py",
        (unit("models/test_models_loss"), dist("tensor"), CUT, unit("models/test_*")),
    ),
    ("models/stacked.py", (unit("studies/*stacked"),)),
    ("models/init.py", (unit("models/test_models_init"), unit("models/test_*"), ONE)),
    ("models/observe.py", (unit("models/test_models_observe"), dist("monitors"))),
    (
        "models/*.py",
        (
            unit("models/test_models_router", "models/test_models_moe"),
            unit("models/test_*"),
            FROZEN,
            ONE,
            CUT,
        ),
    ),
    (
        "optim/deepspeed.py",  # most of its tests need the package
        (
            unit("parallel/*deepspeed", "trainer/*deepspeed"),
            dist("deepspeed"),
        ),
    ),
    ("optim/delayed.py", (unit("optim/test_optim_delayed"), unit("trainer/test_trainer_delayed"))),
    ("optim/schedule.py", (unit("optim/test_optim_schedule"), unit("optim/test_*"))),
    ("optim/stacked.py", (unit("studies/*stacked"),)),
    ("optim/*h.py", (unit("optim/*sphere"), unit("optim/*"), dist("optimizers", "matrix_ops"))),
    ("optim/newton_schulz.py", (unit("optim/*newton_schulz", "optim/*muon"), unit("optim/*"))),
    (
        "optim/groups.py",
        (unit("optim/*build", "scaling/*identity"), unit("optim/*"), FROZEN, dist("optimizers")),
    ),
    (
        "optim/[eosw]*.py",  # rules that use shards
        (
            unit("optim/*owners", "optim/*matrix_ops", "optim/*rules"),
            dist("matrix_ops", "clip"),
            unit("optim/*"),
        ),
    ),
    (
        "optim/*.py",
        (
            unit("optim/*rules"),
            unit("optim/test_*"),
            dist("optimizers", "matrix_ops", "optimizer_runs"),
        ),
    ),
    (
        "parallel/deepspeed/*.py",
        (
            unit("parallel/*deepspeed", "trainer/*deepspeed"),
            dist("deepspeed"),
        ),
    ),
    ("parallel/groups.py", (unit("parallel/*groups", "parallel/*mesh"), dist("mesh"), ONE)),
    ("parallel/wire.py", (unit("parallel/*groups"), dist("mesh"))),
    ("parallel/tensor_chunks.py", (dist("overlap_keys", "tensor"), CUT)),
    ("parallel/gather_fp8.py", (dist("gather_fp8"),)),
    ("parallel/in_two.py", (unit("parallel/*in_two"), dist("overlap_keys"), CUT)),
    ("parallel/side.py", (unit("trainer/*watch"), dist("hangs"))),
    ("parallel/rendezvous.py", (unit("parallel/*rendezvous", "parallel/*mesh"), dist("process"))),
    ("parallel/mesh.py", (unit("parallel/test_parallel_mesh"), dist("mesh", "process"), ONE)),
    (
        "parallel/reduce.py",
        (dist("flat_reducer", "zero"), dist("collectives"), ONE, CUT, dist("documents")),
    ),
    (
        "parallel/working.py",
        (unit("trainer/test_trainer_tiers"), dist("tiers", keyword="elsewhere")),
    ),
    (
        "parallel/zero.py",
        (dist("zero"), ONE, dist("layouts", keyword="zero"), dist("overrides", keyword="zero")),
    ),
    ("parallel/tensor.py", (dist("tensor"), dist("families", keyword="after-tp2"), CUT)),
    (
        "parallel/expert.py",
        (unit("parallel/*expert"), dist("layouts", keyword="ep4-fp64 or ep2")),
    ),
    ("parallel/graphs.py", (unit("parallel/*graphs"),)),
    (
        "parallel/execution.py",
        (ONE, dist("documents", keyword="mixed or without"), dist("zero", "flat_reducer")),
    ),
    ("parallel/agree.py", (dist("integrity", "runs"),)),
    (
        "parallel/tied.py",
        (dist("pipeline", "pipeline_steps"), STAGED, dist("overrides", keyword="tied")),
    ),
    (
        "parallel/stage.py",
        (dist("pipeline", "pipeline_steps"), STAGED, dist("overrides", keyword="pp2 or zbv")),
    ),
    ("parallel/pipeline.py", (unit("parallel/*pipeline*"), dist("pipeline*"), STAGED)),
    ("parallel/context.py", (dist("documents", keyword="mixed or planned"),)),
    ("parallel/checkpointing.py", (unit("models/*twins", "parallel/*apply"), ONE)),
    ("parallel/apply.py", (unit("parallel/*apply"), ONE, CUT, STAGED, RUNS)),
    (
        "parallel/hdp/kernels.py",
        (unit("parallel/*hdp_kernels"), dist("ring", "context")),
    ),
    (
        "parallel/hdp/ring.py",
        (unit("parallel/*hdp_shard"), dist("ring", "context"), dist("documents")),
    ),
    (
        "parallel/offload/store.py",
        (unit("parallel/*offload"), dist("offload_activations")),
    ),
    ("parallel/folder.py", (unit("parallel/*folder", "trainer/*tiers"),)),
    ("parallel/buffers.py", (unit("optim/*swap_file"), unit("parallel/*offload_lanes"))),
    ("parallel/offload/lanes.py", (unit("parallel/*offload_lanes"),)),
    ("parallel/offload/pool.py", (unit("parallel/*offload_lanes"),)),
    ("parallel/offload/results.py", (unit("parallel/*offload"), dist("offload_activations"))),
    (
        "parallel/hdp/filling.py",
        (dist("documents", keyword="mixed or without or planned"), dist("pipeline_hdp")),
    ),
    (
        "scaling/hdp/*.py",
        (
            unit("parallel/test_parallel_hdp_*", "scaling/test_scaling_hdp*"),
            unit("trainer/*plans"),
            dist("documents", keyword="mixed or without or planned"),
        ),
    ),
    (
        "parallel/hdp/*.py",
        (
            unit("parallel/test_parallel_hdp_*"),
            unit("trainer/*plans"),
            dist("documents", keyword="mixed or without or planned"),
        ),
    ),
    (
        "trainer/step.py",
        (
            unit("trainer/*_step", "trainer/*feed", "trainer/*shares"),
            ONE,
            dist("faults"),
            RUNS,
            dist("corruption"),
        ),
    ),
    ("trainer/balance.py", (ONE, CUT, RUNS)),
    ("trainer/bad_steps.py", (unit("trainer/*bad_steps"), dist("bad_steps"))),
    ("trainer/skips.py", (unit("trainer/*bad_steps"), dist("bad_steps"))),
    (
        "trainer/feed.py",
        (
            unit("trainer/*shares", "trainer/*feed", "trainer/*plans"),
            dist("documents", keyword="mixed or planned"),
            RUNS,
        ),
    ),
    ("trainer/evaluate.py", (unit("trainer/*shares", "trainer/*_step"), RUNS, dist("runs"))),
    (
        "trainer/loop.py",
        (RUNS, unit("trainer/*resume_rules", "trainer/*callbacks"), unit("trainer/*")),
    ),
    ("data/documents.py", (unit("data/*documents"), unit("data/*stream", "data/*mixture"))),
    (
        "data/changes.py",
        (unit("data/*changes", "data/*mixture"), unit("trainer/test_trainer_mixtures")),
    ),
    (
        "data/reading.py",
        (unit("data/*reading", "data/*changes"), unit("trainer/test_trainer_mixtures")),
    ),
    ("data/lines.py", (unit("data/*lengths"), unit("data/*reading", "data/*stream"))),
    ("data/cuts.py", (unit("data/*lengths"), unit("data/*documents", "data/*reading"))),
    (
        "data/*.py",
        (
            unit("data/*stream", "data/*mixture", "data/*changes"),
            unit("data/*documents", "data/*reading"),
            RUNS,
        ),
    ),
    ("scaling/batch.py", (unit("scaling/*batch"), unit("scaling/*"))),
    ("scaling/stages.py", (unit("optim/test_optim_stages"), unit("trainer/*stages"))),
    ("scaling/count.py", (unit("scaling/*count"), unit("scaling/*"))),
    (
        "scaling/parameterizations/*.py",
        (unit("scaling/*parameterization", "scaling/*rules"), unit("scaling/*")),
    ),
)


def hot_files(root: Path) -> list[str]:
    """Return the files of the hot path, sorted."""
    found = {str(path.relative_to(root)) for pattern in HOT for path in root.glob(pattern)}
    return sorted(f for f in found if not any(fnmatch(f, pattern) for pattern in COLD))


def stages_of(root: Path, file: str) -> list[Stage]:
    """Return the stages for a fault in a file: the tests named after the file, then COVERING's."""
    room, stem = file.split("/")[0], Path(file).stem
    own = Stage((f"tests/unit/{room}/test_{room}_*{stem}*.py", f"tests/dist/test_dist_{stem}.py"))
    fitting = next(stages for pattern, stages in COVERING if fnmatch(file, pattern))
    return [stage for stage in (own, *fitting) if stage.files_in(root)]
