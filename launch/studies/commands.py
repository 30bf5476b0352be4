"""Commands that check a layout, a parameterization and a learning rate before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from allometry.launch.command import REQUIRED, Command, ConfigCommand, argument, option


@dataclass(frozen=True, kw_only=True)
class Verify(ConfigCommand):
    """Verify that CONFIG's model computes the same run in several layouts as on one process.

    Compares gradients, resumes, checkpoints loaded in other layouts and exports, on processes of
    this machine. Shrink a large model first: model.num_layers=4 data.sequence_length=256. Exits
    with code 1 if a layout differs.
    """

    layout: tuple[str, ...] = option(
        "layout such as tp=2 or pp=2,hdp=2,zero.stage=1; repeat for more; default: a standard set",
        (),
    )
    out: Path = option("JSON file for the certificate", Path("certificate.json"), "-o")


@dataclass(frozen=True, kw_only=True)
class SelfTest(ConfigCommand):
    """Test the machines of CONFIG's run, under torchrun: the first command on new hardware.

    Sends, checks and times every message of a step; compares one step's gradients of a small model
    in the same layout with one rank's; measures devices and the disk. Exits with code 1 on any
    fault. Start it with:
    python -m allometry.launch.torchrun ... -m allometry.launch.selftest CONFIG
    """

    out: Path = option("JSON file for the measurements", Path("selftest.json"), "-o")
    seconds: float = option("approximate duration of the message tests, in seconds", 45.0, min=1.0)
    disk_mib: int = option("MiB that each rank writes and reads", 256, min=1)


@dataclass(frozen=True, kw_only=True)
class Memory(ConfigCommand):
    """Predict the peak memory of CONFIG's fullest rank by kind, and its moment in a step.

    --probe takes two real steps on random tokens, not compiled, and prints measured next to
    predicted bytes: on this machine's CPU or GPU, or on all ranks of a launch:
    python -m allometry.launch.torchrun ... -m allometry.launch.memory CONFIG --probe
    """

    world_size: int | None = option(
        "number of ranks to predict for; default: 1, or as launched", min=1
    )
    rank: int | None = option("rank to predict; default: the fullest", min=0)
    device: str | None = option("cuda or cpu; default: cuda, with --probe the available device")
    probe: bool = option("also measure; reduce a large model by overrides", False)


@dataclass(frozen=True, kw_only=True)
class Plan(ConfigCommand):
    """Predict whether CONFIG's run fits on a number of GPUs, its layouts, and the speed of each.

    Searches over degrees, ZeRO stage, pipeline schedule, checkpointing and micro-batch; the batch
    is not changed. --write stores the best layout in a file for training. Exits with code 1 if no
    layout fits. Further arguments override single keys.
    """

    cluster: str = option(
        "hardware: h100 or another shipped description, or a YAML file (docs/planner.md)", REQUIRED
    )
    gpus: str = option("number of GPUs, or several: 512,1024", REQUIRED)
    tokens: str | None = option("training tokens: 2T, 300B; default: the run's")
    objective: str = option("quantity to minimize: time, cost (GPU-hours) or memory", "time")
    price: float | None = option("price of one GPU-hour, in any currency", min=0)
    reserve: float | None = option(
        "fraction of device memory to leave free; default: 0.1", min=0, max=0.9
    )
    keep: tuple[str, ...] = option(
        "key that keeps its value in CONFIG (parallel.tp); repeat for more", ()
    )
    top: int = option("number of layouts to print, each with other degrees", 10, min=1)
    explain: int = option("number of layouts for which to print time terms and memory", 0, min=0)
    write: Path | None = option("file to write CONFIG with the best layout to")
    scale: bool = option(
        "instead, strong and weak scaling from 8 to 16,384 GPUs; weak scaling starts from CONFIG's "
        "batch at --gpus",
        False,
    )
    out: Path = option("with --scale: figure to write", Path("scaling.png"), "-o")
    fit: Path | None = option(
        "file of allometry fit: instead, find the size, tokens and layout that reach --loss at the "
        "least cost"
    )
    loss: float | None = option("with --fit: loss to reach", min=0)
    calibrate: tuple[Path, ...] = option(
        "run with recorded step predictions (record.prediction) from which to calibrate the cost "
        "model's constants; repeat for more",
        (),
    )
    constants: Path | None = option(
        "with --calibrate: file to store the constants in; without: file of constants to plan with"
    )


@dataclass(frozen=True, kw_only=True)
class Suggest(ConfigCommand):
    """Suggest learning rate, batch, schedule and a model to tune, by published laws.

    Each with its source and fitted range; and the axes over which the learning rate was measured to
    transfer, their range and regret. Further arguments override single keys.
    """

    params: float | None = option(
        "number of parameters without embedding and head; default: the model's", min=1
    )
    tokens: float | None = option("number of tokens of the run; default: the config's", min=1)
    loss: float | None = option("expected loss in nats per token, for MiniCPM's batch law", min=0.1)


@dataclass(frozen=True, kw_only=True)
class CoordCheck(ConfigCommand):
    """Check that CONFIG's parameterization changes activations equally at every size.

    Trains small models of the family for a few steps on the config's data. Exits with code 1 if a
    change grows or shrinks with the size; further arguments override single keys.
    """

    widths: str | None = option("widths, such as 64,128,256; default: the model's narrowest")
    depths: str | None = option(
        "depths, such as 4,8,16; default: only if the parameterization has a rule"
    )
    experts: str | None = option("numbers of experts, such as 4,8,16, by mssp's regime")
    lr: float | None = option("constant learning rate, preferably large; default: the config's")
    steps: int = option("number of steps on one batch", 5, min=1)
    seeds: int = option("number of initializations and batches", 3, min=1)
    sequences: int | None = option("number of sequences in a batch; default: 4, or by width", min=1)
    length: int = option("maximum number of tokens in a sequence", 64, min=2)
    block_bound: float | None = option("maximum slope of a block; default: by kind", min=0.0)
    logit_bound: float | None = option("maximum slope of the logits; default: by kind", min=0.0)
    processes: int | None = option("number of worker processes; default: number of cores", min=1)
    out: Path = option("figure to write", Path("coordcheck.png"), "-o")


@dataclass(frozen=True, kw_only=True)
class Transfer(ConfigCommand):
    """Measure the regret of the best learning rate of a small model or run at larger sizes.

    Sweeps rates at each size on the config's data. The regret is the loss at the best rate of the
    smallest size minus the loss at the size's own best rate. Exits with code 1 if it is above
    --regret-bound, or if the seeds leave this undecided; further arguments override single keys.
    """

    axis: str | None = option(
        "width, depth, width-and-depth, horizon, batch, experts, or regime-ii and regime-iii: "
        "number of experts with width and visits in proportion, and in III width of experts; "
        "default: width, or mssp's regime"
    )
    sizes: str | None = option(
        "sizes, such as 64,128,256 (horizon: steps; batch: sequences); default: small sizes"
    )
    octaves: float = option(
        "initial range of rates around optimizer.lr, in octaves to either side", 1.0
    )
    step: float = option("spacing of rates, in octaves", 0.5)
    seeds: int = option(
        "number of initializations and data orders; with one the result is undecided", 3, min=1
    )
    place_first: bool = option(
        "search the best rates with one seed; train the others only around them", False
    )
    steps: int = option("number of steps of a run", 80, min=2)
    schedule: str = option("linear: decay to a tenth; run: CONFIG's schedule", "linear")
    warmup_steps: int = option("number of warm-up steps", 0, "--warmup", min=0)
    sequences: int = option("number of sequences in a batch", 8, min=1)
    length: int = option("maximum number of tokens in a sequence", 64, min=2)
    regret_bound: float = option("maximum regret, in percent of the loss", 0.5, min=0.0)
    against: Path | None = option(
        "trials of the same sweep under another parameterization (sp); the regret must be at most "
        "a fifth of its regret"
    )
    bound: float | None = option(
        "maximum drift of best rates, in octaves, as well; default: any", min=0.0
    )
    engine: str = option(
        "processes: one process per run; stacked: all runs of a size as one model", "processes"
    )
    device: str = option("cpu, or cuda for stacked runs", "cpu")
    runs_at_once: int | None = option(
        "maximum number of runs in a stack; default: all of a size", min=1
    )
    processes: int | None = option("number of worker processes; default: number of cores", min=1)
    trials: Path | None = option(
        "file with the loss of each run, from which an interrupted sweep continues"
    )
    out: Path = option("figure to write", Path("transfer.png"), "-o")


@dataclass(frozen=True, kw_only=True)
class Refine(Command):
    """Compute a learning-rate schedule from a run's gradient norms (arXiv 2310.07831).

    Train with it: schedule={kind: refined, file: schedule.json}
    """

    folder: Path = argument("folder of a finished run", metavar="run")
    out: Path = option("JSON file to write", Path("schedule.json"), "-o")
    optimizer: str = option("adam (1-norms of gradients) or sgd (squared 2-norms)", "adam")
    smoothing: float = option("width of the median filter, as a fraction of the run", 0.1)


@dataclass(frozen=True, kw_only=True)
class MixBilevel(ConfigCommand):
    """Learn the weights of CONFIG's sources for a target: ScaleBiO (arXiv 2406.19976).

    Trains two models of CONFIG on equal batches of all sources, in one process: choose a small
    model. The weights given in CONFIG are not used, except that a source of weight 0 takes no part.
    """

    target: str = option("name of the source whose training documents are the target", REQUIRED)
    alpha: float = option("weight of the penalty (arXiv 2406.19976: 10 for GPT-2)", 10.0)
    weight_lr: float = option("peak learning rate of the weights (of lambda)", 1e-2)
    seeds: int = option("number of studies, for standard deviations", 1, min=1)
    max_epochs: float = option("largest number of epochs over a source in the run to weight", 4.0)
    tokens: float | None = option("tokens of the run to weight; default: those of CONFIG")
    yaml: Path | None = option("file to write data.sources to")
    device: str | None = option("cpu or cuda; default: a GPU if available")
