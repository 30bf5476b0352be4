"""The command line. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from allometry.configs.errors import UserError
from allometry.launch.laws import commands as cli_laws
from allometry.launch.options import OVERRIDES, Config, Json
from allometry.launch.runs import commands as cli_runs
from allometry.launch.studies import commands as cli_gates
from allometry.launch.studies import ladder_commands as cli_ladder
from allometry.launch.train import fail

app = typer.Typer(
    name="allometry",
    help="Pretrain language models whose hyperparameters, losses and layouts scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(context_settings=OVERRIDES)
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
        from allometry.launch.runs.dry_run import report

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
    from allometry.launch.runs.prepare import run

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
    from allometry.launch.runs.convert import Request, run

    request = Request(source, out, step, family, dtype, config, print_model, check)
    typer.echo(run(request, as_json=json))


@app.command(context_settings=OVERRIDES)
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
    from allometry.launch.studies.verify import run

    text, passed = run(load(config, context.args), layout, out, as_json=json)
    typer.echo(text)
    if not passed:
        raise typer.Exit(1)


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed and usable here, and how to mend what is not."""
    from allometry.launch.runs.doctor import examine, render

    typer.echo(render(examine(), as_json=json))


for _group in (cli_gates, cli_runs, cli_laws, cli_ladder):
    app.add_typer(_group.commands)


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
