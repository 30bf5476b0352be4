"""Parse layouts given on a command line: ``pp=2,hdp=2,zero.stage=1``."""

from __future__ import annotations

from pydantic import ValidationError

from allometry.configs.errors import ConfigError
from allometry.configs.execution import ParallelConfig
from allometry.configs.source import KeyPath, Tree, parse_value


def parse_parallel(text: str, base: ParallelConfig) -> ParallelConfig:
    """Return the ``parallel`` section for ``text``, a list of its keys with values.

    Degrees missing from ``text`` are 1, and ``hdp`` is ``ep * zero.replicas``; other keys are taken
    from ``base``. For example, ``tp=2,zero.stage=1``.

    Raises:
        ConfigError: a key is unknown or a value is invalid.
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
