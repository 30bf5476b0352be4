"""Run the command line in this process: output of commands, and sentences of refused ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from allometry.launch.cli import main


class Shell:
    """Command line that runs in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> str:
        """Return the output of a command, which must succeed."""
        code, out, err = self._run(arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))

    def refusal(self, *arguments: object) -> str:
        """Return the single sentence of a refused command."""
        code, _, err = self._run(arguments)
        assert code == 2, err
        (line,) = err.strip().splitlines()
        assert line.startswith("allometry: ")
        return line

    def _run(self, arguments: tuple[object, ...]) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        found = self._capsys.readouterr()
        return code, found.out, found.err
