"""The command line. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from allometry.configs.errors import UserError
from allometry.launch.train import fail

app = typer.Typer(
    name="allometry",
    help="Pretrain language models whose hyperparameters, losses and layouts scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[str, typer.Argument(help="a YAML file, or preset:NAME")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
_EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=_EXTRA)
def train(
    context: typer.Context,
    config: Config,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="validate, print the plan, train nothing")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the resolved configuration and stop")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="ranks to plan for (with --dry-run); default: 1")
    ] = None,
    allocator: Annotated[
        str, typer.Option(help="on CPU: auto, jemalloc, tcmalloc, glibc-tuned or system")
    ] = "auto",
    stop_at_step: Annotated[
        int | None, typer.Option(min=1, help="save and stop after this step; run again to go on")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="with --dry-run: print one JSON object")
    ] = False,
) -> None:
    """Train the run that CONFIG describes, or continue it where it stopped.

    Further arguments override single keys: optimizer.lr=3e-4. For several processes:
    torchrun --nproc-per-node N -m allometry.launch.train CONFIG ...
    """
    from allometry.configs.loader import dump, load

    overrides = list(context.args)
    if dry_run and print_config:
        raise UserError("--dry-run and --print-config are two commands; give one of them")
    for flag, given in (("--world-size", world_size is not None), ("--json", json)):
        if given and not dry_run:
            raise UserError(f"{flag} goes with --dry-run; add it or leave {flag} out")
    if print_config:
        typer.echo(dump(load(config, overrides)), nl=False)
    elif dry_run:
        from allometry.launch.dry_run import report

        typer.echo(report(load(config, overrides), world_size or 1, as_json=json))
    else:
        from allometry.launch.train import run

        run(config, overrides, allocator, stop_at_step)


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="NAME=PATH or PATH: text, JSONL (.gz, .zst), parquet, a folder of them, or "
            "builtin:python-code, builtin:python-prose"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the token files")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to use; without one, a BPE is trained")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="size of the BPE to train; default: 8192")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="share of the documents held out, chosen by their hash")
    ] = 0.05,
    text_key: Annotated[str, typer.Option(help="field that holds the text")] = "text",
    max_documents: Annotated[
        int | None, typer.Option(help="read at most this many documents of each source")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="worker processes; default: cores")] = None,
    json: Json = False,
) -> None:
    """Turn text into token files that training reads (Megatron's .bin/.idx)."""
    from allometry.data.prepare import PrepareRequest
    from allometry.launch.prepare import run

    request = PrepareRequest(
        inputs=tuple(inputs),
        out=str(out),
        tokenizer=str(tokenizer) if tokenizer else None,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        text_key=text_key,
        max_documents=max_documents,
        processes=processes,
    )
    typer.echo(run(request, as_json=json))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="run folder, or folder of a Hugging Face model")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder to make; it must not hold anything")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="export this checkpoint; default: the latest")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="export as llama, qwen3, mixtral or qwen3_moe; default: fit")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="type of exported weights, fp32 or bf16; default: fp32")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="import: the run to be trained, a YAML file or preset:NAME")
    ] = None,
    print_model: Annotated[
        bool, typer.Option("--print-model", help="print the model section of a model and stop")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="compare logits with transformers, and every tensor")
    ] = False,
    json: Json = False,
) -> None:
    """Export a run's checkpoint as a Hugging Face folder, or import one as a new run.

    Llama, Qwen3, Mixtral and Qwen3-MoE, as safetensors with config.json and the tokenizer.
    """
    from allometry.launch.convert import Request, run

    request = Request(source, out, step, family, dtype, config, print_model, check)
    typer.echo(run(request, as_json=json))


@app.command(context_settings=_EXTRA)
def verify(
    context: typer.Context,
    config: Config,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="tp=2 or pp=2,hdp=2,zero.stage=1; repeat for more; default: a handful"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="where the certificate goes")] = Path(
        "certificate.json"
    ),
    json: Json = False,
) -> None:
    """Certify that CONFIG's model computes the same run in several layouts as on one process.

    Compares gradients, resumes, checkpoints carried over and exports, on processes of this
    machine. Shrink a large model first: model.num_layers=4 data.sequence_length=256. Ends with
    code 1 where a layout differs.
    """
    from allometry.configs.loader import load
    from allometry.launch.verify import run

    text, passed = run(load(config, context.args), layout, out, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@app.command(context_settings=_EXTRA)
def suggest(
    context: typer.Context,
    config: Config,
    params: Annotated[
        float | None,
        typer.Option(min=1, help="parameters without embedding and head; default: the model's"),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="tokens of the run; default: the config's")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(min=0.1, help="expected loss, nats per token, for MiniCPM's batch"),
    ] = None,
    json: Json = False,
) -> None:
    """Say what published laws hold for CONFIG: learning rate, batch, schedule, where to tune.

    Each with its source and the range behind it; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.suggest import report

    run = load(config, context.args)
    n, d = (None if size is None else round(size) for size in (params, tokens))
    typer.echo(report(run, n, d, loss, as_json=json))


@app.command(context_settings=_EXTRA)
def coordcheck(
    context: typer.Context,
    config: Config,
    widths: Annotated[
        str | None, typer.Option(help="as 64,128,256; default: the model's narrowest")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="as 4,8,16; default where the parameterization has a rule")
    ] = None,
    experts: Annotated[str | None, typer.Option(help="as 4,8,16")] = None,
    lr: Annotated[
        float | None, typer.Option(help="constant rate, best a large one; default: the config's")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="steps on one batch")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="initial values and batches")] = 3,
    sequences: Annotated[int, typer.Option(min=1, help="sequences of a batch")] = 4,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence, at most")] = 64,
    block_bound: Annotated[
        float | None, typer.Option(min=0.0, help="largest slope of a block; default: by kind")
    ] = None,
    logit_bound: Annotated[
        float | None, typer.Option(min=0.0, help="largest slope of the logits; default: by kind")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: cores")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="figure to write")] = Path(
        "coordcheck.png"
    ),
    json: Json = False,
) -> None:
    """Check that CONFIG's parameterization moves activations alike at every size.

    Trains small models of the family for a few steps on the config's data. Ends with code 1 where
    a movement grows or shrinks with the size; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.coordcheck import Request, run

    request = Request(
        widths=widths,
        depths=depths,
        experts=experts,
        lr=lr,
        steps=steps,
        seeds=seeds,
        sequences=sequences,
        length=length,
        processes=processes,
        block_bound=block_bound,
        logit_bound=logit_bound,
        out=out,
    )
    text, passed = run(load(config, context.args), request, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@app.command(context_settings=_EXTRA)
def transfer(
    context: typer.Context,
    config: Config,
    axis: Annotated[str, typer.Option(help="width, depth, experts or horizon")] = "width",
    sizes: Annotated[
        str | None, typer.Option(help="as 64,128,256 (of a horizon: steps); default: small ones")
    ] = None,
    octaves: Annotated[
        float, typer.Option(help="rates around optimizer.lr to begin with, to either side")
    ] = 1.0,
    step: Annotated[float, typer.Option(help="octaves between rates")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="initial values and orders of data")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="steps of a run")] = 80,
    warmup: Annotated[int, typer.Option(min=0, help="steps of warm-up")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="sequences of a batch")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens of a sequence, at most")] = 64,
    bound: Annotated[float, typer.Option(min=0.0, help="octaves that best rates may drift")] = 0.5,
    processes: Annotated[int | None, typer.Option(min=1, help="default: cores")] = None,
    trials: Annotated[
        Path | None, typer.Option(help="file that keeps each run's loss, to go on from")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="figure to write")] = Path(
        "transfer.png"
    ),
    json: Json = False,
) -> None:
    """Measure whether CONFIG's best learning rate stays as its model or its run grows.

    Sweeps rates at each size on the config's data and ends with code 1 where the best ones are
    further apart than --bound; further arguments override single keys.
    """
    from allometry.configs.loader import load
    from allometry.launch.transfer import Request, run

    request = Request(
        axis=axis,
        sizes=sizes,
        octaves=octaves,
        step=step,
        seeds=seeds,
        steps=steps,
        warmup_steps=warmup,
        sequences=sequences,
        length=length,
        bound=bound,
        processes=processes,
        trials=trials,
        out=out,
    )
    text, passed = run(load(config, context.args), request, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@app.command()
def refine(
    run: Annotated[Path, typer.Argument(help="the folder of a run that trained to its end")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON to write")] = Path("schedule.json"),
    optimizer: Annotated[
        str, typer.Option(help="adam (1-norms of gradients) or sgd (2-norms, squared)")
    ] = "adam",
    smoothing: Annotated[
        float, typer.Option(help="width of the median filter, as a share of the run")
    ] = 0.1,
) -> None:
    """Make a learning-rate schedule from a run's gradient norms (arXiv 2310.07831).

    Train with it: schedule={kind: refined, file: schedule.json}
    """
    from allometry.laws.refine import refined_schedule, write_schedule

    if optimizer not in ("adam", "sgd"):
        raise UserError(f"--optimizer={optimizer} is not known; use adam or sgd")
    content = refined_schedule(run, optimizer, smoothing)
    write_schedule(content, out)
    fractions, norm = content["fractions"], content["from"]["norm"]
    peak = 1 + fractions.index(max(fractions))
    typer.echo(f"{out}: {len(fractions)} steps from {norm}, the peak at step {peak}")


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed and usable here, and how to mend what is not."""
    from allometry.launch.doctor import examine, render

    typer.echo(render(examine(), as_json=json))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    hdp: Annotated[
        bool,
        typer.Option(
            "--hdp",
            help="draw which rank ran which documents in one step: RUN --hdp [STEP]; default: "
            "the last recorded step",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="PNG to write; default: loss.png, plan.png")
    ] = None,
    json: Json = False,
) -> None:
    """Draw loss against tokens and against FLOPs for one or more runs, or one step's schedule."""
    if hdp:
        from allometry.launch.gantt import draw_plan, run_and_step

        folder, step = run_and_step(runs)
        typer.echo(draw_plan(folder, step, out or Path("plan.png"), as_json=json))
        return
    from allometry.launch.plot import draw

    typer.echo(draw(runs, out or Path("loss.png"), as_json=json))


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a UserError is one sentence and exit code 2."""
    # torch warns of views that are changed in place; nothing here changes one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    try:
        return app(args=arguments)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
