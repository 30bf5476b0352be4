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

    dry_run: bool = option("validate and print the plan without training", False)
    print_config: bool = option("print the resolved configuration without training", False)
    stage: str | None = option("with --print-config: stage whose configuration to print")
    world_size: int | None = option(
        "with --dry-run: number of ranks to plan for; default: 1", min=1
    )
    allocator: str = option(
        "CPU memory allocator: auto, jemalloc, tcmalloc, glibc-tuned or system", "auto"
    )
    stop_at_step: int | None = option(
        "step after which to save and stop; a later launch continues", min=1
    )
    json: bool = option("with --dry-run: print one JSON object", False)


@dataclass(frozen=True, kw_only=True)
class Fetch(Command):
    """Create a run folder from an upload (``checkpoint.upload``), for ``train`` to continue."""

    url: str = argument("URL of the run in an object store: its checkpoint.upload.url", paths=True)
    folder: Path = argument("run folder to create")
    step: int | None = option("step of the upload; default: the newest complete one")


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
    """Convert text into token files for training (Megatron's .bin/.idx).

    With --engine, many tasks write the files, on this machine, a Slurm cluster or a Ray cluster;
    repeat an interrupted command to continue it. Requires: pip install 'allometry[prepare]'.
    """

    inputs: tuple[str, ...] = argument(
        "NAME=PATH or PATH: text or JSON Lines (both also as .gz, .zst, .bz2, .xz), parquet, a "
        "folder or a pattern of these, or builtin:python-code, builtin:python-prose",
        paths=True,
    )
    out: Path = option("folder for the token files", REQUIRED, "-o")
    tokenizer: Path | None = option("tokenizer.json to use; default: train a BPE")
    end_of_document: str | None = option(
        "token of --tokenizer that ends documents; default: its eos_token, or a well-known name"
    )
    vocab_size: int | None = option("vocabulary size of the BPE to train; default: 8192")
    validation_fraction: float = option("fraction of held-out documents, selected by hash", 0.05)
    text_key: str = option("field of the text; meta.text: a nested field", "text")
    split_key: str | None = option(
        "field whose hash selects held-out documents, such as the text or id that a document was "
        "derived from; default: the text itself"
    )
    separator: str | None = option(
        "separator of the documents of a text file; default: one document per file"
    )
    on_bad_line: str = option(
        "reaction to missing or damaged text: stop, or skip (omit and count it)", "stop"
    )
    max_bad_lines: int = option("with skip: maximum number of bad lines in a source", 1000, min=0)
    max_documents: int | None = option("maximum number of documents of each source; default: all")
    processes: int | None = option("number of worker processes; default: number of cores")
    engine: str | None = option(
        "datatrove:local, datatrove:slurm or datatrove:ray: divide the input files into tasks; "
        "default: processes of this machine"
    )
    tasks: int | None = option(
        "with --engine: number of tasks and shards; default: one per file, at most 1000", min=1
    )
    workers: int | None = option(
        "with --engine: number of tasks at a time; default: number of cores (local), no limit",
        min=1,
    )
    sbatch: tuple[str, ...] = option(
        "with datatrove:slurm: KEY=VALUE, an option of sbatch; partition and time are required", ()
    )
    deduplicate: bool = option("with --engine: drop near duplicates, found by MinHash", False)
    decontaminate: tuple[str, ...] = option(
        "with --engine: file of benchmark texts; drop documents that share 12 consecutive words",
        (),
        paths=True,
    )


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
    tokenizer: Path = option("tokenizer.json with which the shards were made", REQUIRED)
    validation: tuple[str, ...] = option(
        "NAME=PATTERN of held-out shards; repeat for more", (), paths=True
    )
    end_of_document: str | None = option(
        "token of --tokenizer that ends documents; default: its eos_token, or a well-known name"
    )
    allow_inner_ends: bool = option(
        "accept documents that contain the end-of-document token", False
    )
    allow_missing_ends: bool = option("accept documents that do not end with this token", False)
    processes: int | None = option("number of worker processes; default: number of cores", min=1)


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Export a run's checkpoint as a Hugging Face folder, or import one as a new run.

    Llama, Qwen3, Mixtral and Qwen3-MoE, as safetensors with config.json and the tokenizer.
    """

    source: Path = argument("run folder, or folder of a Hugging Face model")
    out: Path | None = option("folder to create; an existing folder must be empty", None, "-o")
    step: int | None = option("export: step of the checkpoint; default: the latest", min=0)
    family: str | None = option(
        "export: llama, qwen3, mixtral or qwen3_moe; default: the family that fits"
    )
    dtype: str | None = option("export: type of the weights, fp32 or bf16; default: fp32")
    tokenizer: Path | None = option("export: tokenizer.json of a run without a recorded tokenizer")
    end_of_document: str | None = option("export: token that ended the documents of such a run")
    config: str | None = option("import: run to train, a YAML file or preset:NAME")
    print_model: bool = option("print the model section for a Hugging Face model and stop", False)
    optimizer_state: bool = option(
        "export: include the optimizer states; import: continue with these states", False
    )
    main_model: bool = option("export: leave multi-token prediction out", False)
    check: bool = option("compare every tensor, and the logits with those of transformers", False)


@dataclass(frozen=True, kw_only=True)
class Merge(Command):
    """Merge the last checkpoints of RUN into one, as a substitute for a learning-rate decay.

    Creates a run folder with the merged weights as step 0, for evaluate, convert or new runs
    (run.initial.folder). With --forecast no folder is created: prints the held-out losses of merges
    next to the losses that the law of ``allometry forecast`` predicts for decays over the same
    steps.
    """

    run: Path = argument("folder of a run with constant learning rate")
    last: int = option("number of checkpoints to merge, the newest ones", 8)
    decay: str = option(
        "shape of the decay that the merge emulates: linear, cosine, sqrt (1 - sqrt), or mean "
        "(equal weights)",
        "linear",
    )
    step: int | None = option(
        "step of the newest checkpoint to merge; default: the run's newest", min=1
    )
    out: Path | None = option("folder to create; an existing folder must be empty", None, "-o")
    forecast: bool = option("measure merges of the last 2, 4, 8, ... checkpoints", False)
    against: tuple[str, ...] = option(
        "with --forecast: branch of RUN with a decay, measured on the same tokens; repeat for more",
        (),
    )
    like: Path | None = option("with --forecast: run whose curve provides the gain of a decay")
    device: str | None = option("with --forecast: cpu or cuda; default: a GPU if available")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Score checkpoints of a run, or a Hugging Face model, with the lm-evaluation-harness.

    Scores are appended to scores.jsonl in that folder, for reports and for laws of scores. Requires
    the extra: pip install 'allometry[evaluate]'.
    """

    source: Path = argument("run folder, or folder of a Hugging Face model")
    tasks: tuple[str, ...] = option(
        "task names of the harness, .yaml files or folders of these; comma-separated or repeated",
        REQUIRED,
    )
    checkpoints: str = option("checkpoints to score: all, last, or steps such as 1000,2000", "last")
    fewshot: int | None = option(
        "number of examples before each question; default: the task's", min=0
    )
    limit: int | None = option("maximum number of documents of each task; default: all", min=1)
    batch_size: int = option("number of requests in a batch", 8, min=1)
    device: str | None = option("cpu, cuda or cuda:1; default: a GPU if available")
    dtype: str | None = option("type of the weights, fp32 or bf16; default: fp32")
    tokenizer: Path | None = option("tokenizer.json of a run without a recorded tokenizer")
    end_of_document: str | None = option("token that ended the documents of such a run")
    again: bool = option("also repeat evaluations that are already recorded", False)


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """List installed and usable components, with instructions for missing ones."""

    disk: Path | None = option(
        "folder whose disk to measure as well, for parallel.zero.optimizer_states.nvme"
    )
    build: bool = option(
        "also compile the NVMe extension for parallel.zero.engine=deepspeed, once per machine",
        False,
    )
    measure: bool = option(
        "also measure this machine for the planner, as hardware this-machine (1-2 minutes)", False
    )
    out: Path | None = option("with --measure: additional YAML file for the description")


@dataclass(frozen=True, kw_only=True)
class Runs(Command):
    """List the runs in FOLDER: state, step, tokens, loss, size, parent, checkpoints.

    States: new, running, stopped (by a signal or a step), crashed (no event at its end), diverged
    (its loss was not finite), ended. A line is printed for each folder that is not a run.
    """

    folder: Path = argument("folder that contains runs, ladders or trees of runs", Path("runs"))
    tree: bool = option("list branches below their trunks", False)


@dataclass(frozen=True, kw_only=True)
class Branch(Command):
    """Describe a run that starts from a checkpoint of RUN, or train a tree of such branches.

    The branch shares the checkpoint, which its trunk then keeps. Its description is RUN's with
    --config and --set on top; the printed command trains it, or --train. With --tree, the remaining
    runs of the file of kind: tree are trained; safe to interrupt and to run again. With
    launch.kind: sbatch in that file, scripts for Slurm are written instead.
    """

    run: Path | None = argument("run to branch from", None, metavar="[RUN]")
    at: int | None = option("step of the run's checkpoint", min=1)
    config: str | None = option("YAML file with the changes of the branch: schedule, data, length")
    sets: tuple[str, ...] = option("section.key=value to change; repeat for more", (), "--set")
    name: str | None = option(
        "folder of the branch, next to RUN; default: RUN-CONFIG-STEP", None, "--run"
    )
    train: bool = option("train the branch here, in this process", False)
    tree: str | None = option(
        "YAML file of kind: tree, or folder of a tree: train its remaining runs"
    )
    parallel: int | None = option(
        "with --tree: number of runs at a time; default: the tree's", min=1
    )
    dry_run: bool = option("with --tree: print the progress of its runs without training", False)


@dataclass(frozen=True, kw_only=True)
class Plot(Command):
    """Draw loss against tokens and against FLOPs for one or more runs, or one step's schedule."""

    runs: tuple[Path, ...] = argument("run folders")
    hdp: bool = option(
        "draw the ranks and documents of one step: RUN --hdp [STEP]; default: the last recorded "
        "step",
        False,
    )
    out: Path | None = option(
        "PNG file to write; default: loss.png, or plan.png with --hdp", None, "-o"
    )
    labels: tuple[str, ...] = option(
        "label of a run in the figure and the table, once per run in order; default: its folder's "
        "name",
        (),
        "--label",
    )


@dataclass(frozen=True, kw_only=True)
class Forecast(Command):
    """Forecast the final loss of RUN from its curve: its own schedule, another, or a decay now."""

    folder: Path = argument("run folder", metavar="RUN")
    schedule: str | None = option("kind of another schedule, e.g. wsd; default: the run's own")
    decay_fraction: float | None = option("fraction of the steps in the decay")
    decay: str | None = option("shape of the decay: 1-sqrt, linear or exponential")
    final_fraction: float | None = option("final rate divided by peak rate")
    total_steps: int | None = option("length of the run in steps; default: the run's own", min=1)
    decay_now: bool = option(
        "start the decay now, for a tenth of the run (or --decay-fraction)", False
    )
    others: tuple[Path, ...] = option(
        "run of the same model whose curve is also fitted; repeat for more", (), "--with"
    )
    like: Path | None = option("run that provides values which this run has not measured yet")
    at_step: int | None = option("step after which the run's records are ignored", min=1)
    loss: str = option(
        "loss to forecast: train, validation, train/NAME or validation/NAME", "train"
    )
    level: float = option("probability of the interval", 0.95)
