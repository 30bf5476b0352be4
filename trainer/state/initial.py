"""Begin a new run from a checkpoint of another run, or from a Hugging Face model.

The run gets its own checkpoint ``step-0``, whose facts record the parts that are kept and their
origin; shards are hard links. The run therefore does not depend on the files it began with.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.configs.lineage import Initial
from allometry.configs.run import RunConfig
from allometry.data.run_tokenizer import tokenizer_that_agrees
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import ForwardScales
from allometry.scaling.stages import place_of
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import Taken, link_files, stored_config
from allometry.trainer.state.changed import Difference, leaves
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.identity import Identity, problem_of
from allometry.trainer.state.integrity import BLOCK_BYTES, COMPLETE, FACTS, Files, seal

TRAINING_ONLY = ("dropout", "z_loss", "router.balance", "router.z_loss")
"""Keys of a model that change its training but not its forward pass."""


class Imported(NamedTuple):
    """An imported model: shards and their checksums, its origin, and its tokenizer.json."""

    files: Files
    origin: dict[str, Any]
    tokenizer: Path | None


class Importer(Protocol):
    """Writes a Hugging Face model as the shards of a checkpoint (``interop``'s ``import_model``).

    Raises UserError if the model or its tokenizer differs from that of the run.
    """

    def __call__(self, source: Path, config: RunConfig, shards: Path) -> Imported: ...  # noqa: D102


def initial_facts(
    config: RunConfig, keep: tuple[str, ...], origin: dict[str, Any]
) -> dict[str, Any]:
    """Return the facts (JSON) of a checkpoint of a run that has not yet trained or read data."""
    return {
        "step": 0,
        "position_sequences": 0,
        "tokens": 0,
        "seed": config.run.seed,
        "weights_only": True,
        "optimizer": "optimizer" in keep,
        "keep": list(keep),
        "origin": {**origin, "keep": list(keep)},
    }


class Chosen(NamedTuple):
    """The checkpoint that ``run.initial.folder`` and ``step`` name, and the parts that are kept."""

    path: Path
    facts: dict[str, Any]  # facts of the run that begins
    changes: tuple[Difference, ...]  # differences in the training of its model


def choose_initial(config: RunConfig, initial: Initial) -> Chosen:
    """Find the checkpoint of another run, without writing files or reading shards.

    Raises:
        UserError: the checkpoint is missing or incomplete, or the parts to keep do not match this
            run.
    """
    assert initial.folder is not None
    source, key = RunFolder(initial.folder), f"run.initial.folder={initial.folder}"
    if source.path.resolve() == Path(config.run.folder).resolve():
        raise UserError(f"{key} is the run's own folder; choose another run.folder")
    if source.is_new():
        hf = source.path / "config.json"
        meant = f"; for a Hugging Face model say run.initial.hf={initial.folder}"
        raise UserError(f"{key} holds no run{meant if hf.exists() else '; name the folder of one'}")
    path = _checkpoint(source, initial, key)
    try:
        facts = checkpoint.read_facts(path)
        content = (path / COMPLETE).read_bytes()
    except (OSError, ValueError):
        raise unusable(path, "it is not whole") from None
    problem = problem_of(source, path)
    if problem is not None:
        raise unusable(path, problem)
    before = stored_config(source)
    # Each config as of the stage of this step: the last stage there, the first one here.
    there = place_of(before, checkpoint.step_of(path)).config
    changes = _check_model(there, config.of_stages()[0], key)
    if "optimizer" in initial.keep:
        _check_optimizer(before, config, facts, path, key)
    tokenizer_that_agrees(config.data, source.path)
    origin = {
        "source": str(source.path.resolve()),
        "run": initial.folder,
        "step": checkpoint.step_of(path),
        "hash": hashlib.sha256(content).hexdigest()[:16],
        "seed": before.run.seed,
        **{key: facts[key] for key in ("tokens", "data", "reading", "origin") if key in facts},
        **source.origin(),
    }
    return Chosen(path, initial_facts(config, initial.keep, origin), changes)


def take_initial(
    folder: RunFolder,
    config: RunConfig,
    initial: Initial,
    check: Callable[[dict[str, Any]], None],
    importer: Importer | None,
) -> Taken:
    """Make a checkpoint in the new ``folder`` from ``run.initial``, still under a temporary name.

    ``check`` receives the facts before anything is written. The contents of a run's checkpoint are
    not read here. Raises UserError: see ``choose_initial``; also if a model cannot be imported.
    """
    partial = folder.checkpoints / ".step-0.partial"
    for left in (partial, folder.checkpoints / "step-0"):  # left by an interrupted launch
        shutil.rmtree(left, ignore_errors=True)
    if initial.hf is not None:
        return _imported(partial, config, initial, check, importer)
    chosen = choose_initial(config, initial)
    check(chosen.facts)
    partial.mkdir(parents=True)
    try:
        copies = link_files(chosen.path, partial, but=(FACTS, COMPLETE))
        listed = json_file.read_object(chosen.path / COMPLETE)
        files = {name: entry for name, entry in listed["files"].items() if name != FACTS}
        each = listed.get("block_bytes", BLOCK_BYTES)
        seal(partial, 0, files, chosen.facts, each, run=Identity.new().run)
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        raise unusable(chosen.path, "it was removed meanwhile") from None
    kept = RunFolder(str(initial.folder)).path / "tokenizer.json"
    tokenizer = kept if kept.is_file() else None
    return Taken(partial, chosen.facts, copies, chosen.changes, tokenizer)


def unusable(path: Path, problem: str) -> UserError:
    """Return the error about a checkpoint that ``run.initial`` names."""
    return UserError(
        f"checkpoint {path} cannot be begun with ({problem}); choose another run.initial.step or "
        "restore it"
    )


def check_converted(folder: RunFolder, initial: Initial, facts: dict[str, Any]) -> None:
    """Raise UserError if ``allometry convert`` put another model into the folder."""
    there = Path(facts["origin"]["source"])
    held = f"run.folder={folder.path} holds the model of {there}, which allometry convert put there"
    if initial.hf is None or Path(initial.hf).resolve() != there:
        said = f"hf={initial.hf}" if initial.hf is not None else f"folder={initial.folder}"
        raise UserError(
            f"run.initial.{said}, but {held}; say run.initial.hf={there}, leave run.initial out, "
            "or choose another run.folder"
        )
    if facts.get("optimizer"):
        raise UserError(
            f"run.initial.keep=[weights], but {held} with the optimizer's states; leave "
            "run.initial out to go on with them, or choose another run.folder"
        )


def _imported(
    partial: Path,
    config: RunConfig,
    initial: Initial,
    check: Callable[[dict[str, Any]], None],
    importer: Importer | None,
) -> Taken:
    assert initial.hf is not None
    source, key = Path(initial.hf), f"run.initial.hf={initial.hf}"
    if importer is None:
        raise UserError(f"{key} is read by allometry train; give train() its importer")
    if not (source / "config.json").is_file():
        run = (source / "config.yaml").is_file()
        raise UserError(
            f"{key} holds no Hugging Face model (no config.json)"
            + (f"; for a run of ours say run.initial.folder={source}" if run else "")
            + ("" if run else "; name the folder of one")
        )
    check(initial_facts(config, initial.keep, {}))
    partial.mkdir(parents=True)
    try:
        made = importer(source, config, partial)
        facts = initial_facts(config, initial.keep, made.origin)
        seal(partial, 0, made.files, facts, run=Identity.new().run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Taken(partial, facts, (), tokenizer=made.tokenizer)


def _checkpoint(source: RunFolder, initial: Initial, key: str) -> Path:
    there = checkpoint.saved(source)
    if not there:
        raise UserError(f"{key} has no checkpoint yet; let it train to one, or name another run")
    if initial.step == "latest":
        named = source.read_latest()
        if named is None:
            return there[-1]
        if source.checkpoints / named not in there:
            raise UserError(f"{key}: {source.latest} does not name a checkpoint; restore it")
        return source.checkpoints / named
    path = source.checkpoints / f"step-{initial.step}"
    if path not in there:
        names = ", ".join(other.name for other in there)
        raise UserError(
            f"run.initial.step={initial.step}: {initial.folder} has no such checkpoint; it has "
            f"{names}"
        )
    return path


def _check_model(before: RunConfig, config: RunConfig, key: str) -> tuple[Difference, ...]:
    """Return differences in the model's training; raise UserError if its forward pass differs."""
    old, new = (leaves(one.model.model_dump(mode="json")) for one in (before, config))
    widths = ("num_kv_heads", "head_dim")  # null has the same meaning as an explicit value
    different = [
        Difference(f"model.{name}", old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if name not in widths and old.get(name) != new.get(name)
    ]
    sizes = [(one.model.kv_heads, one.model.head_width) for one in (before, config)]
    different += [
        Difference(f"model.{name}", was, now)
        for name, was, now in zip(widths, *sizes, strict=True)
        if was != now
    ]
    free = tuple(f"model.{name}" for name in ("rope_theta", "rope_scaling", *TRAINING_ONLY))
    other = [one for one in different if not one.key.startswith(free)]
    if other:
        listed = ", ".join(f"{one.key}={one.after!r} (there {one.before!r})" for one in other)
        raise UserError(
            f"{key} has another model: {listed}; set these keys to the values there, or leave "
            "run.initial out"
        )
    forward = [_multipliers(one) for one in (before, config)]
    if forward[0] != forward[1]:
        raise UserError(
            f"parameterization.kind={config.parameterization.kind} multiplies otherwise in the "
            f"forward pass than that of {key} (kind={before.parameterization.kind}), so that the "
            "same weights would be another model; set the parameterization as it is there, or "
            "bring the weights over with allometry convert, which divides multipliers out"
        )
    return tuple(different)


def _multipliers(config: RunConfig) -> ForwardScales:
    """What the forward pass multiplies, but for ``rope_scaling``'s factor, which may change."""
    model = config.model.model_copy(update={"rope_scaling": None})
    return Parameterization.of_run(config.model_copy(update={"model": model})).forward


def _check_optimizer(
    before: RunConfig, config: RunConfig, facts: dict[str, Any], path: Path, key: str
) -> None:
    """Raise UserError if optimizer states are missing or unreadable by this run's update rules."""
    remedy = "take optimizer out of run.initial.keep to begin with fresh states"
    if facts.get("weights_only") and not facts.get("optimizer"):
        raise UserError(
            f"run.initial.keep has optimizer, but checkpoint {path} holds weights alone; {remedy}"
        )
    old, new = before.optimizer, config.optimizer
    problem = None
    if old.kind != new.kind:
        problem = f"optimizer.kind={new.kind} (there {old.kind})"
    elif getattr(old, "rank", None) != getattr(new, "rank", None):
        problem = (
            f"optimizer.rank={getattr(new, 'rank', None)} (there {getattr(old, 'rank', None)})"
        )
    elif old.kind in ("apollo", "apollo_mini") and before.run.seed != config.run.seed:
        problem = f"run.seed={config.run.seed} (there {before.run.seed}), which draws projections"
    else:
        rules = [Parameterization.of_run(one) for one in (before, config)]
        for spec in inventory(config.model):
            was, now = (rule.resolve(spec) for rule in rules)
            if (was.rule, was.sphere) != (now.rule, now.sphere):
                problem = f"parameterization.kind={config.parameterization.kind}: {spec.name} is "
                problem += f"updated by {now.rule} (there {was.rule})"
                break
    if problem is not None:
        raise UserError(
            f"{problem} does not read the optimizer states of {key}; set it as it is there, or "
            f"{remedy}"
        )
