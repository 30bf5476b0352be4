"""Expansion of paths in configurations and on the command line."""

from __future__ import annotations

import os
import re

from allometry.configs.errors import ConfigError

_LONGEST_NAME, _LONGEST_PATH = 255, 4000
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")


def expanded(path: str) -> str:
    """Return ``path`` with a leading ``~`` and ``$VAR`` or ``${VAR}`` expanded, as in a shell.

    An existing file or folder whose name contains ``$`` is not expanded.

    Raises:
        ConfigError: the user or the variable does not exist, so that no folder is created with the
            name ``~`` or ``$VAR`` by mistake; or the path is invalid on every system.
    """

    longest = max(len(part.encode(errors="surrogatepass")) for part in path.split("/"))
    if longest > _LONGEST_NAME or len(path) > _LONGEST_PATH or "\0" in path:
        raise ConfigError(f"{path!r} cannot be a path: no system takes such a name; write another")

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
