"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user asked for cannot be done.

    The message is one sentence that says what is wrong (key and value), where, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class ConfigError(UserError):
    """A run's description is wrong: an unknown key, a bad value, a contradiction."""
