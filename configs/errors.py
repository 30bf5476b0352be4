"""The one error that a user is meant to read."""

from __future__ import annotations

import re

_LONG_WORD = re.compile(r"\S{400,}")


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one sentence that says what is wrong (key and value), where, and what to do.
    The command line prints it without a traceback and exits with code 2. Of a value of thousands of
    characters it shows the beginning and the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_LONG_WORD.sub(lambda word: f"{word[0][:100]}...{word[0][-50:]}", message))


class RankError(UserError):
    """An error that one rank alone has found: it says so itself, and no other one is waited for."""


class ConfigError(UserError):
    """A run's description is wrong: an unknown key, a bad value, a contradiction."""


HUNG = 75
"""Exit code of a rank of a run that hangs: EX_TEMPFAIL, to be started again."""
