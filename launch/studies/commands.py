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
        "tp=2 or pp=2,hdp=2,zero.stage=1; repeat for more; default: a handful", ()
    )
    out: Path = option("where the certificate goes", Path("certificate.json"), "-o")


@dataclass(frozen=True, kw_only=True)
class SelfTest(ConfigCommand):
    """Test the machines of CONFIG's run, under torchrun: the first command on new hardware.

    Sends, checks and times every message of a step; compares one step's gradients of a small model
    in the same layout with one rank's; measures devices and the disk. Exits with code 1 on any
    fault. Start it with:
    python -m allometry.launch.torchrun ... -m allometry.launch.selftest CONFIG
    """

    out: Path = option("where the measurements go, JSON", Path("selftest.json"), "-o")
    seconds: float = option("about how long messages may take", 45.0, min=1.0)
    disk_mib: int = option("MiB that each rank writes and reads", 256, min=1)


@dataclass(frozen=True, kw_only=True)
class Memory(ConfigCommand):
    """Predict the peak memory of CONFIG's fullest rank by kind, and its moment in a step.

    --probe takes two real steps on random tokens, not compiled, and prints measured next to
    predicted bytes: on this machine's CPU or GPU, or on all ranks of a launch:
    python -m allometry.launch.torchrun ... -m allometry.launch.memory CONFIG --probe
    """

    world_size: int | None = option("ranks to predict for; default: 1, or as launched", min=1)
    rank: int | None = option("the rank to predict; default: the fullest", min=0)
    device: str | None = option("cuda or cpu; default: cuda, with --probe the one at hand")
    probe: bool = option("measure as well; scale a large model down by overrides", False)


@dataclass(frozen=True, kw_only=True)
class Plan(ConfigCommand):
    """Predict whether CONFIG's run fits on a number of GPUs, its layouts, and the speed of each.

    Searches over degrees, ZeRO stage, pipeline schedule, checkpointing and micro-batch; the batch
    is not changed. --write stores the best layout in a file for training. Exits with code 1 if no
    layout fits. Further arguments override single keys.
    """

    cluster: str = option("kind of node: h100, or a YAML file as docs/planner.md has it", REQUIRED)
    gpus: str = option("number of GPUs, or several: 512,1024", REQUIRED)
    tokens: str | None = option("tokens to train on: 2T, 300B; default: the run's")
    objective: str = option("what the best has least of: time, cost (GPU-hours) or memory", "time")
    price: float | None = option("of one GPU for an hour, in any currency", min=0)
    reserve: float | None = option(
        "share of a card's memory left free; default: 0.1", min=0, max=0.9
    )
    keep: tuple[str, ...] = option(
        "key that stays as CONFIG has it (parallel.tp); repeat for several", ()
    )
    top: int = option("layouts to print, each of other degrees", 10, min=1)
    explain: int = option("print terms and memory of the first K layouts", 0, min=0)
    write: Path | None = option("write CONFIG in the best layout to this file")
    scale: bool = option(
        "strong and weak scaling instead, from 8 to 16,384 GPUs; batches of weak scaling grow from "
        "CONFIG's on --gpus",
        False,
    )
    out: Path = option("with --scale: figure to write", Path("scaling.png"), "-o")
    fit: Path | None = option(
        "file of allometry fit: which size, tokens and layout reach --loss at the least cost, "
        "instead"
    )
    loss: float | None = option("with --fit: the loss to reach", min=0)
    calibrate: tuple[Path, ...] = option(
        "run that recorded predicted steps (record.prediction), to learn the constants from; "
        "repeat for several",
        (),
    )
    constants: Path | None = option(
        "with --calibrate: file to keep the constants in; without: the one to plan with"
    )


@dataclass(frozen=True, kw_only=True)
class Suggest(ConfigCommand):
    """Suggest learning rate, batch, schedule and a model to tune, by published laws.

    Each with its source and fitted range; and the axes over which the learning rate was measured to
    transfer, their range and regret. Further arguments override single keys.
    """

    params: float | None = option(
        "parameters without embedding and head; default: the model's", min=1
    )
    tokens: float | None = option("tokens of the run; default: the config's", min=1)
    loss: float | None = option("expected loss, nats per token, for MiniCPM's batch", min=0.1)


@dataclass(frozen=True, kw_only=True)
class CoordCheck(ConfigCommand):
    """Check that CONFIG's parameterization changes activations equally at every size.

    Trains small models of the family for a few steps on the config's data. Exits with code 1 if a
    change grows or shrinks with the size; further arguments override single keys.
    """

    widths: str | None = option("as 64,128,256; default: the model's narrowest")
    depths: str | None = option("as 4,8,16; default where the parameterization has a rule")
    experts: str | None = option("as 4,8,16; by mssp's regime")
    lr: float | None = option("constant rate, best a large one; default: the config's")
    steps: int = option("steps on one batch", 5, min=1)
    seeds: int = option("initial values and batches", 3, min=1)
    sequences: int | None = option("default: 4, or by width", min=1)
    length: int = option("tokens of a sequence, at most", 64, min=2)
    block_bound: float | None = option("largest slope of a block; default: by kind", min=0.0)
    logit_bound: float | None = option("largest slope of the logits; default: by kind", min=0.0)
    processes: int | None = option("default: cores", min=1)
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
        "as 64,128,256 (of a horizon: steps; of a batch: sequences); default: small ones"
    )
    octaves: float = option("rates around optimizer.lr to begin with, to either side", 1.0)
    step: float = option("octaves between rates", 0.5)
    seeds: int = option("initial values and orders of data; one decides nothing", 3, min=1)
    place_first: bool = option(
        "let one seed look for the best rates, and train the others around them alone", False
    )
    steps: int = option("steps of a run", 80, min=2)
    schedule: str = option("linear: to a tenth; run: that of CONFIG", "linear")
    warmup_steps: int = option("steps of warm-up", 0, "--warmup", min=0)
    sequences: int = option("sequences of a batch", 8, min=1)
    length: int = option("tokens of a sequence, at most", 64, min=2)
    regret_bound: float = option("percent of the loss that a regret may be", 0.5, min=0.0)
    against: Path | None = option(
        "trials of the same sweep under another parameterization (sp), of whose regret this one's "
        "may be a fifth at most"
    )
    bound: float | None = option("octaves that best rates may drift as well; default: any", min=0.0)
    engine: str = option(
        "processes: each run by itself; stacked: all runs of a size as one model", "processes"
    )
    device: str = option("cpu, or cuda for stacked runs", "cpu")
    runs_at_once: int | None = option("runs of a stack, at most; default: all of a size", min=1)
    processes: int | None = option("default: cores", min=1)
    trials: Path | None = option("file that keeps each run's loss, to go on from")
    out: Path = option("figure to write", Path("transfer.png"), "-o")


@dataclass(frozen=True, kw_only=True)
class Refine(Command):
    """Compute a learning-rate schedule from a run's gradient norms (arXiv 2310.07831).

    Train with it: schedule={kind: refined, file: schedule.json}
    """

    folder: Path = argument("the folder of a run that trained to its end", metavar="run")
    out: Path = option("JSON to write", Path("schedule.json"), "-o")
    optimizer: str = option("adam (1-norms of gradients) or sgd (2-norms, squared)", "adam")
    smoothing: float = option("width of the median filter, as a share of the run", 0.1)
