"""Command-line entry point. Each command imports its heavy packages when it runs."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from allometry.configs.errors import RankError, UserError
from allometry.configs.renamed import RenamedKeyWarning
from allometry.configs.version import VERSION
from allometry.data.processes import end_with_launcher
from allometry.launch.command import Command, register
from allometry.launch.laws import commands as laws
from allometry.launch.report import commands as report
from allometry.launch.runs import commands as runs
from allometry.launch.select import commands as select
from allometry.launch.studies import commands as studies
from allometry.launch.studies.ladder import commands as ladder

Commands = dict[str, tuple[type[Command], str]]
"""Dataclass of each command and the function that runs it, as ``module:function`` of launch/."""

COMMANDS: Commands = {
    "train": (runs.Train, "runs.train:trained"),
    "runs": (runs.Runs, "runs.listing:listed"),
    "branch": (runs.Branch, "runs.branch:branched"),
    "prepare": (runs.Prepare, "runs.prepare:prepared"),
    "adopt": (runs.Adopt, "runs.adopt:adopted"),
    "convert": (runs.Convert, "runs.convert:converted"),
    "fetch": (runs.Fetch, "runs.fetch:fetched"),
    "merge": (runs.Merge, "runs.merge:merged"),
    "evaluate": (runs.Evaluate, "runs.evaluate:evaluated"),
    "verify": (studies.Verify, "studies.verify:verified"),
    "selftest": (studies.SelfTest, "studies.selftest:tested"),
    "memory": (studies.Memory, "studies.memory:counted"),
    "plan": (studies.Plan, "studies.plan:planned"),
    "doctor": (runs.Doctor, "runs.doctor:examined"),
    "suggest": (studies.Suggest, "studies.suggest:suggested"),
    "coordcheck": (studies.CoordCheck, "studies.coordcheck:checked"),
    "transfer": (studies.Transfer, "studies.transfer:swept"),
    "refine": (studies.Refine, "studies.refine:refined"),
    "plot": (runs.Plot, "runs.plot:plotted"),
    "report": (report.WriteReport, "report.report:written"),
    "gallery": (report.WriteGallery, "report.gallery:written"),
    "forecast": (runs.Forecast, "runs.forecast:forecasted"),
    "fit": (laws.Fit, "laws.fit:fitted"),
    "compare": (laws.Compare, "laws.compare:compared"),
    "predict": (laws.Predict, "laws.predict:predicted"),
    "optimum": (laws.Optimum, "laws.optimum:optima"),
    "isoflop": (laws.IsoFlop, "laws.isoflop:profiled"),
    "sweeps": (laws.Sweeps, "laws.sweeps:swept"),
    "laws": (laws.Laws, "laws.list:listed"),
}
MIX: Commands = {
    "replay": (laws.MixReplay, "laws.replay:chosen"),
    "best": (laws.MixBest, "laws.mix:best"),
    "ratio": (laws.MixRatio, "laws.continual:ratio"),
    "critical": (laws.MixCritical, "laws.continual:critical"),
    "pools": (laws.MixPools, "laws.pools:pools"),
    "filter-rate": (laws.MixFilterRate, "laws.filter_rate:filter_rate"),
    "ot": (select.MixOt, "select.transport:screened"),
    "bilevel": (studies.MixBilevel, "studies.bilevel:learned"),
}
SELECT: Commands = {
    "show": (select.Show, "select.show:shown"),
    "import": (select.Import, "select.show:imported"),
    "random": (select.Random, "select.show:random"),
    "perplexity": (select.Perplexity, "select.perplexity:scored"),
    "betr": (select.Betr, "select.near:near_targets"),
    "prototypes": (select.Prototypes, "select.near:near_centres"),
    "ot": (select.Ot, "select.transport:scored"),
}
LADDER: Commands = {
    "run": (ladder.Run, "studies.ladder.work:run"),
    "status": (ladder.Status, "studies.ladder.work:status"),
    "fit": (ladder.Fit, "studies.ladder.work:fit"),
    "predict": (ladder.Predict, "studies.ladder.work:predict"),
}


class Mix(TyperGroup):
    """Command group ``mix``, in which ``mix RUNS...`` is short for ``mix replay RUNS...``."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *self.get_help_option_names(ctx)):
            args = ["replay", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="allometry",
    help="Pretrain language models whose hyperparameters, losses and layouts scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_ladder = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
_mix = typer.Typer(cls=Mix, no_args_is_help=True, rich_markup_mode=None)
_select = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
_groups = ((app, COMMANDS), (_ladder, LADDER), (_mix, MIX), (_select, SELECT))
for _app, _commands in _groups:
    for _name, (_command, _work) in _commands.items():
        register(_app, _name, _command, f"allometry.launch.{_work}")
app.add_typer(
    _ladder,
    name="ladder",
    help="Train small runs, fit a law to their losses, predict a larger run.",
)
app.add_typer(
    _select, name="select", help="Score documents and show the documents that a selection keeps."
)
app.add_typer(
    _mix,
    name="mix",
    help="Choose data mixtures by laws of small runs, by bilevel training, or by distances.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"allometry {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Pretrain language models whose hyperparameters, losses and layouts scale."""


def _is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_renamed_keys() -> None:
    """Print a RenamedKeyWarning as one sentence, on the main rank and once for each key."""
    printed, show = set(), warnings.showwarning

    def shown(message: Warning | str, *place: Any, **more: Any) -> None:
        if not isinstance(message, RenamedKeyWarning):
            show(message, *place, **more)
        elif _is_main_rank() and message.key not in printed:
            printed.add(message.key)
            print(f"allometry: warning: {message}", file=sys.stderr, flush=True)

    warnings.showwarning = shown


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. The main rank prints a UserError as one sentence; the exit code is 2.

    A RankError is printed by each rank that raises it. For example, ``main(["runs", "runs/demo"])``
    lists the runs in the folder runs/demo.
    """
    end_with_launcher()
    # torch warns about views that are modified in place; no view is modified in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    try:
        with warnings.catch_warnings():  # restores the way to print them
            _print_renamed_keys()
            return app(args=arguments, prog_name=None if arguments is None else "allometry")
    except UserError as error:
        if _is_main_rank() or isinstance(error, RankError):
            print(f"allometry: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
