"""Commands that train runs, prepare their inputs, and read their results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, ConfigCommand, argument, option


@dataclass(frozen=True, kw_only=True)
class Train(ConfigCommand):
    """Train the run that CONFIG describes, or continue it from its last checkpoint.

    Further arguments override single keys: optimizer.lr=3e-4. For several processes:
    python -m allometry.launch.torchrun --nproc-per-node N -m allometry.launch.train CONFIG ...
    """

    dry_run: bool = option("validate, print the plan, train nothing", False)
    print_config: bool = option("print the resolved configuration and stop", False)
    stage: str | None = option("with --print-config: the run as it is in this one of its stages")
    world_size: int | None = option("ranks to plan for (with --dry-run); default: 1", min=1)
    allocator: str = option("on CPU: auto, jemalloc, tcmalloc, glibc-tuned or system", "auto")
    stop_at_step: int | None = option("save and stop after this step; run again to go on", min=1)
    json: bool = option("with --dry-run: print one JSON object", False)


@dataclass(frozen=True, kw_only=True)
class Fetch(Command):
    """Create a run folder from an upload (``checkpoint.upload``), for ``train`` to continue."""

    url: str = argument("the run's place in an object store: its checkpoint.upload.url", paths=True)
    folder: Path = argument("the folder to make")
    step: int | None = option("the step of the upload; default: the newest whole one")


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
    """Convert text into token files for training (Megatron's .bin/.idx)."""

    inputs: tuple[str, ...] = argument(
        "NAME=PATH or PATH: text, JSON Lines (both also as .gz, .zst, .bz2, .xz), parquet, a "
        "folder or a pattern of them, or builtin:python-code, builtin:python-prose",
        paths=True,
    )
    out: Path = option("folder for the token files", REQUIRED, "-o")
    tokenizer: Path | None = option("tokenizer.json to use; without one, a BPE is trained")
    end_of_document: str | None = option(
        "token of --tokenizer that ends documents; default: its eos_token, or a well-known name"
    )
    vocab_size: int | None = option("size of the BPE to train; default: 8192")
    validation_fraction: float = option(
        "share of the documents held out, chosen by their hash", 0.05
    )
    text_key: str = option("field that holds the text; meta.text: a field in a field", "text")
    split_key: str | None = option(
        "field whose hash decides what is held out: the text or id that a document was made from; "
        "default: the text itself"
    )
    separator: str | None = option(
        "what stands between the documents of a text file; default: each file is one document"
    )
    on_bad_line: str = option(
        "stop, or skip: leave out and count text that is missing or damaged", "stop"
    )
    max_bad_lines: int = option("stop all the same after this many in a source", 1000, min=0)
    max_documents: int | None = option("read at most this many documents of each source")
    processes: int | None = option("worker processes; default: cores")


@dataclass(frozen=True, kw_only=True)
class Adopt(Command):
    """Create one source from shards of token files, without copying the shards.

    Shards are pairs of .bin and .idx as written by Megatron, datatrove or NeMo Curator. Each shard
    is read once and checked; repeat an interrupted command to continue it.
    """

    shards: tuple[str, ...] = argument(
        "NAME=PATTERN or PATTERN of .idx files, or their folder: web='shards/*.idx'", paths=True
    )
    out: Path = option("folder for the index, the list of shards and manifest.json", REQUIRED, "-o")
    tokenizer: Path = option("tokenizer.json that they were made with", REQUIRED)
    validation: tuple[str, ...] = option(
        "NAME=PATTERN of shards that are held out; repeat for more", (), paths=True
    )
    end_of_document: str | None = option(
        "token of --tokenizer that ends documents; default: its eos_token, or a well-known name"
    )
    allow_inner_ends: bool = option("take documents that hold the end-of-document token", False)
    allow_missing_ends: bool = option("take documents that do not end with it", False)
    processes: int | None = option("worker processes; default: cores", min=1)


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Export a run's checkpoint as a Hugging Face folder, or import one as a new run.

    Llama, Qwen3, Mixtral and Qwen3-MoE, as safetensors with config.json and the tokenizer.
    """

    source: Path = argument("run folder, or folder of a Hugging Face model")
    out: Path | None = option("folder to make; it must not hold anything", None, "-o")
    step: int | None = option("export this checkpoint; default: the latest", min=0)
    family: str | None = option("export as llama, qwen3, mixtral or qwen3_moe; default: fit")
    dtype: str | None = option("type of exported weights, fp32 or bf16; default: fp32")
    tokenizer: Path | None = option("export: tokenizer.json of a run that does not know its own")
    end_of_document: str | None = option("export: token that ended the documents, likewise")
    config: str | None = option("import: the run to be trained, a YAML file or preset:NAME")
    print_model: bool = option("print the model section of a model and stop", False)
    optimizer_state: bool = option(
        "export: keep the optimizer's states beside the weights; import: go on with them", False
    )
    check: bool = option("compare logits with transformers, and every tensor", False)


@dataclass(frozen=True, kw_only=True)
class Merge(Command):
    """Merge the last checkpoints of RUN into one, in place of a decay of the learning rate.

    Makes a run folder whose step 0 are the merged weights, to evaluate, convert or begin runs with
    (run.initial.folder). With --forecast nothing is made: the held-out losses of merges, beside
    what the law of ``allometry forecast`` says of decays over the same steps.
    """

    run: Path = argument("run folder, trained at a constant rate")
    last: int = option("checkpoints to merge, the newest ones", 8)
    decay: str = option(
        "shape of the decay in whose place they are: linear, cosine, sqrt (1 - "
        "sqrt), or mean: all alike",
        "linear",
    )
    step: int | None = option("the newest checkpoint to merge; default: the run's newest", min=1)
    out: Path | None = option("folder to make; it must not hold anything", None, "-o")
    forecast: bool = option("measure merges of the last 2, 4, 8, ... checkpoints", False)
    against: tuple[str, ...] = option(
        "with --forecast: a branch of RUN that decayed, measured on the same tokens (repeat)", ()
    )
    like: Path | None = option("with --forecast: take what a decay gains from this run's curve")
    device: str | None = option("with --forecast: cpu, cuda; default: a GPU where there is one")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Score checkpoints of a run, or a Hugging Face model, with the lm-evaluation-harness.

    Scores are appended to scores.jsonl in that folder, for reports and for laws of scores. Requires
    the extra: pip install 'allometry[evaluate]'.
    """

    source: Path = argument("run folder, or folder of a Hugging Face model")
    tasks: tuple[str, ...] = option(
        "the harness' names, .yaml files or folders of them, with commas or repeated", REQUIRED
    )
    checkpoints: str = option("all that are kept, last, or steps: 1000,2000", "last")
    fewshot: int | None = option("examples before each question; default: the task's", min=0)
    limit: int | None = option("of each task only so many documents", min=1)
    batch_size: int = option("requests at a time", 8, min=1)
    device: str | None = option("cpu, cuda, cuda:1; default: a GPU where there is one")
    dtype: str | None = option("type of the weights, fp32 or bf16; default: fp32")
    tokenizer: Path | None = option("tokenizer.json of a run that does not know its own")
    end_of_document: str | None = option("token that ended the documents, likewise")
    again: bool = option("evaluate also what was evaluated before", False)


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """List installed and usable components, with instructions for missing ones."""

    disk: Path | None = option(
        "also measure the disk of this folder, for parallel.zero.optimizer_states.nvme"
    )
    build: bool = option(
        "also compile what parallel.zero.engine=deepspeed needs for NVMe, once on a machine", False
    )
    measure: bool = option(
        "also measure this machine for the planner: hardware this-machine (a minute or two)", False
    )
    out: Path | None = option("with --measure: write the description to this YAML file too")


@dataclass(frozen=True, kw_only=True)
class Runs(Command):
    """List the runs in FOLDER: state, step, tokens, loss, size, parent, checkpoints.

    States: new, running, stopped (by a signal or a step), crashed (no event at its end), diverged
    (its loss was not finite), ended. A line is printed for each folder that is not a run.
    """

    folder: Path = argument("a folder that holds runs, ladders or trees of runs", Path("runs"))
    tree: bool = option("branches below their trunks", False)


@dataclass(frozen=True, kw_only=True)
class Branch(Command):
    """Describe a run that starts from a checkpoint of RUN, or train a tree of such branches.

    The branch shares the checkpoint, which its trunk then keeps. Its description is RUN's with
    --config and --set on top; the printed command trains it, or --train. With --tree, the remaining
    runs of the file of kind: tree are trained; safe to interrupt and to run again. With
    launch.kind: sbatch in that file, scripts for Slurm are written instead.
    """

    run: Path | None = argument("the run to branch from", None, metavar="[RUN]")
    at: int | None = option("step of its checkpoint", min=1)
    config: str | None = option(
        "YAML file of what the branch has otherwise: schedule, data, length"
    )
    sets: tuple[str, ...] = option("section.key=value; repeat for more", (), "--set")
    name: str | None = option(
        "the branch's folder, beside RUN; default: RUN-CONFIG-STEP", None, "--run"
    )
    train: bool = option("train it here, in this process", False)
    tree: str | None = option("a YAML file of kind: tree, or a tree's folder: train what it lacks")
    parallel: int | None = option("with --tree: runs at a time; default: the tree's", min=1)
    dry_run: bool = option("with --tree: print how far its runs are, train nothing", False)


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw loss against tokens and against FLOPs for one or more runs, or one step's schedule."""

    runs: tuple[Path, ...] = argument("run folders")
    hdp: bool = option(
        "draw which rank ran which documents in one step: RUN --hdp [STEP]; default: "
        "the last recorded step",
        False,
    )
    out: Path | None = option("PNG to write; default: loss.png, plan.png", None, "-o")
    labels: tuple[str, ...] = option(
        "name of a run in the figure and the table, once for each run in their order; default: "
        "its folder's",
        (),
        "--label",
    )


@dataclass(frozen=True, kw_only=True)
class Forecast(Command):
    """Forecast the final loss of RUN from its curve: its own schedule, another, or a decay now."""

    folder: Path = argument("the run's folder", metavar="RUN")
    schedule: str | None = option("kind of another schedule, e.g. wsd; default: the run's own")
    decay_fraction: float | None = option("share of the steps that the decay takes")
    decay: str | None = option("form of the decay: 1-sqrt, linear or exponential")
    final_fraction: float | None = option("last rate over peak rate")
    total_steps: int | None = option("length of the run", min=1)
    decay_now: bool = option(
        "as if the decay began now, a tenth of the run (--decay-fraction)", False
    )
    others: tuple[Path, ...] = option(
        "fit this run's curve as well: the same model; repeat for more", (), "--with"
    )
    like: Path | None = option("a run to borrow from where this one has measured nothing yet")
    at_step: int | None = option("forget what the run recorded after this step", min=1)
    loss: str = option("train, validation, train/NAME or validation/NAME", "train")
    level: float = option("probability of the interval", 0.95)
