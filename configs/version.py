"""Version of the package, which ``pyproject.toml`` and ``allometry --version`` read."""

VERSION = "0.1.0"


def release(text: str) -> tuple[int, ...]:
    """Return a version as comparable numbers: ``release("0.10.0") > release("0.9.1")``."""
    return tuple(int(part) for part in text.split("."))
