"""Layouts written on a command line: ``pp=2,hdp=2,zero.stage=1``."""

from __future__ import annotations

from pydantic import ValidationError

from allometry.configs.errors import ConfigError
from allometry.configs.execution import ParallelConfig
from allometry.configs.source import KeyPath, Tree, parse_value


def parse_parallel(text: str, base: ParallelConfig) -> ParallelConfig:
    """Return the ``parallel`` section that ``text`` describes: keys of it with their values.

    The degrees that are not named are 1, and ``hdp`` is as large as ``ep`` and ``zero.replicas``
    need; what is not a degree is as in ``base``. Raises ConfigError.
    """
    tree = Tree(
        base.model_dump(mode="json") | {"pp": 1, "tp": 1, "ep": 1, "hdp": "auto", "auto": None}
    )
    place = f"layout {text!r}"
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not key or not equals:
            raise ConfigError(f"{place}: expected key=value,... such as tp=2 or pp=2,zero.stage=1")
        path: KeyPath = tuple(key.removeprefix("parallel.").split("."))
        tree.set(path, parse_value(value, place), place)
    try:
        parallel = ParallelConfig.model_validate(tree.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(step) for step in first["loc"]) or "parallel"
        if first["type"] == "extra_forbidden":
            fields = (n for n in ParallelConfig.model_fields if n not in ("timeout_s", "watch"))
            valid = ", ".join(fields)
            raise ConfigError(
                f"{place}: {name} is not a key of parallel; its keys are {valid}"
            ) from None
        raise ConfigError(
            f"{place}: {name}={first.get('input')!r} is not valid: {first['msg']}"
        ) from None
    if parallel.hdp == "auto":
        parallel = parallel.model_copy(update={"hdp": parallel.ep * parallel.zero.replicas})
    return parallel
