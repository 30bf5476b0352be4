"""Paths as users write them."""

from __future__ import annotations

import os
import re

from allometry.configs.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")


def expanded(path: str) -> str:
    """``path`` with ``~`` at its beginning and ``$VAR`` or ``${VAR}`` replaced, as shells do.

    A file or folder that is there under its name with ``$`` is meant as it is written.

    Raises ConfigError for a user or a variable that there is not, so that no folder is ever called
    ``~`` or ``$VAR`` by mistake.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(
                f"{path} names the variable ${name}, which is not set; set it or write the path out"
            )
        return os.environ[name]

    if path.startswith("~"):
        whole = os.path.expanduser(path)
        if whole == path:
            raise ConfigError(
                f"{path} names a home folder that is not known; write the path out, or ./~ for a "
                "folder of that name"
            )
        path = whole
    match = _VARIABLE.search(path)
    if match is None or os.path.exists(path[: match.end()] + path[match.end() :].partition("/")[0]):
        return path
    return _VARIABLE.sub(value, path)
