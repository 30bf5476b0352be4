"""Exceptions whose messages are written for the user."""

from __future__ import annotations

import re

_LONG_WORD = re.compile(r"\S{400,}")


class UserError(ValueError):
    """A request of the user that cannot be carried out.

    The message is one sentence that gives the error (key and value), the place, and the remedy. The
    command line prints the message without a traceback and exits with code 2. A word of 400 or more
    characters is shortened to its first 100 and last 50 characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_LONG_WORD.sub(lambda word: f"{word[0][:100]}...{word[0][-50:]}", message))


class RankError(UserError):
    """An error that one rank finds alone; this rank prints it without waiting for other ranks."""


class ConfigError(UserError):
    """An error in a configuration: an unknown key, an invalid value, or a contradiction."""


class RenamedKeyWarning(FutureWarning):
    """A config uses the old name ``key``, which a later version refuses."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


HUNG = 75
"""Exit code of a rank of a hanging run: EX_TEMPFAIL, which requests a restart."""
