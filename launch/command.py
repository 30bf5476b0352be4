"""Commands as dataclasses: a dataclass per command and a function that runs it.

The fields are the arguments and options, the docstring is the help text, and the function returns a
Report::

    @dataclass(frozen=True, kw_only=True)
    class Count(Command):
        '''Count the tokens of STORE.'''

        store: Path = argument("folder of token files")
        source: str | None = option("count this source alone")

    def counted(asked: Count) -> Report:
        tokens = ...
        return Report({"tokens": tokens}, f"{tokens:,} tokens")

    register(app, "count", Count, "allometry.launch.runs.count:counted")

Every dataclass is imported to print any help text, so the functions, which import heavy packages,
are in separate modules.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from allometry.configs.paths import expanded

if TYPE_CHECKING:
    from allometry.configs.run import RunConfig

T = TypeVar("T")
FURTHER = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that accepts further arguments."""
REQUIRED = MISSING


def option(help: str, default: Any = None, *names: str, paths: bool = False, **more: Any) -> Any:
    """Return a dataclass field that is an option, required if ``default`` is REQUIRED.

    ``names``: option names in place of the field's name, such as ``--text-key``, or short names.
    ``paths``: as for ``argument``. ``more``: arguments of ``typer.Option``. For example,
    ``option("samples", 200, "-n", min=0)``.
    """
    metadata = {"names": names, "typer": {"help": help, **more}, "paths": paths}
    return field(default=default, metadata=metadata)


def argument(
    help: str, default: Any = REQUIRED, metavar: str | None = None, *, paths: bool = False
) -> Any:
    """Return a dataclass field that is a positional argument, with many values if it is a tuple.

    ``paths``: True if its text is a path or NAME=PATH, in which ``~`` and variables are expanded; a
    field of type Path is always expanded.
    """
    more = {"help": help, "metavar": metavar}
    return field(default=default, metadata={"typer": more, "paths": paths})


@dataclass(frozen=True)
class Report:
    """Result of a command: ``facts`` to print as JSON, or ``text`` ("" if already printed).

    ``passed``: False if a check failed; the command then exits with ``code``.
    """

    facts: Any
    text: str
    passed: bool = True
    code: int = 1


@dataclass(frozen=True, kw_only=True)
class Command:
    """Base class of all commands."""

    json: bool = option("print one JSON object instead of text", False)


@dataclass(frozen=True, kw_only=True)
class ConfigCommand(Command):
    """Command about the run that CONFIG describes; further arguments override single keys."""

    config: str = argument("YAML file, or preset:NAME")
    overrides: tuple[str, ...] = ()

    def load(self, *, stages: bool = False) -> RunConfig:
        """Return the configuration; ``stages``: True if the command accepts a run with stages.

        Raises:
            UserError: the configuration is not valid, or has stages although ``stages`` is False.
        """
        from allometry.configs.errors import UserError
        from allometry.configs.loader import load

        config = load(self.config, list(self.overrides))
        if config.stages is not None and not stages:
            raise UserError(
                f"{self.config} has stages, and this command looks at one run without; write one "
                f"of them into a file: allometry train {self.config} --print-config --stage "
                f"{config.stages[0].name} > stage.yaml"
            )
        return config


def register(app: typer.Typer, name: str, command: type[Command], work: str) -> None:
    """Add ``command`` to ``app``; ``work`` is the function that runs it, as ``module:name``.

    This function prints every report and sets the exit code.
    """
    further = issubclass(command, ConfigCommand)

    def callback(**given: Any) -> None:
        if further:
            given["overrides"] = given.pop("context").args
        asked = _made(command, given)
        module, function = work.split(":")
        report: Report = getattr(importlib.import_module(module), function)(asked)
        _print(json.dumps(report.facts, indent=2) if asked.json else report.text)
        if not report.passed:
            raise typer.Exit(report.code)

    parameters = list(_parameters(command).values())
    if further:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("context", kind, annotation=typer.Context))
    signed: Any = callback
    signed.__signature__ = inspect.Signature(parameters)
    register_callback: Callable[..., Any] = app.command(
        name, help=command.__doc__, context_settings=FURTHER if further else None
    )
    register_callback(signed)


def _print(text: str) -> None:
    """Print a report, and flush earlier output that could not be written so far.

    Raises:
        UserError: the output cannot be written, for example on a full disk.
    """
    from allometry.configs.errors import UserError

    try:
        if text:
            print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  nothing to flush at exit
        raise UserError(
            f"the output cannot be written to its end ({error.strerror}); all else was done"
        ) from None


def _parameters(command: type[Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters for typer, with ``json`` last.

    A field that is itself a dataclass is replaced by its fields.
    """
    hints = get_type_hints(command)
    parameters: dict[str, inspect.Parameter] = {}
    for one in sorted(fields(command), key=lambda one: one.name == "json"):
        if is_dataclass(hints[one.name]):
            parameters |= _parameters(hints[one.name])
        elif "typer" in one.metadata:
            parameters[one.name] = _parameter(one, hints[one.name])
    return parameters


def _parameter(one: Field[Any], kind: Any) -> inspect.Parameter:
    more, names = one.metadata["typer"], one.metadata.get("names")
    if names is None:
        said: Any = typer.Argument(**more)
    else:  # a flag gets no --no-flag
        if not any(name.startswith("--") for name in names):
            names = (f"--{one.name.replace('_', '-')}", *names)
        said = typer.Option(*names, **more)
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    if get_origin(kind) is tuple:  # typer reads many values as a list, and no value as None
        kind, default = list[get_args(kind)[0]] | None, None if default == () else default  # type: ignore[misc]
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, said]
    )


def _made(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return the dataclass with the given values; other fields keep their defaults."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        value = given.get(one.name)
        if is_dataclass(hints[one.name]):
            values[one.name] = _made(hints[one.name], given)
        elif value is not None:
            paths = bool(one.metadata.get("paths"))
            many = isinstance(value, list)
            values[one.name] = (
                tuple(_whole(item, paths) for item in value) if many else _whole(value, paths)
            )
    return kind(**values)


def _whole(value: Any, is_path: bool) -> Any:
    """Return a value unchanged, or a path with ``~`` and environment variables expanded."""
    if isinstance(value, Path):
        return Path(expanded(str(value)))
    if not is_path:
        return value
    name, equals, path = value.partition("=")
    if path.startswith("~"):  # the shell does not expand ~ after =
        return name + equals + expanded(path)
    return expanded(value)
