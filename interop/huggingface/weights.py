"""Weights on disk, one tensor at a time: our checkpoints and folders of safetensors.

Reading and writing keep one tensor, or one safetensors file, in memory, never a full model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.configs.json_file import read_object
from allometry.interop.huggingface.names import Counterpart
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.identity import problem_of
from allometry.trainer.state.integrity import Files, ShardWriter, seal, step_named
from allometry.trainer.state.shards import ShardReader, refusal_in

MODEL, OPTIMIZER = "model.", "optimizer."
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FLOATS = ("F32", "BF16", "F16")

Shapes = dict[str, tuple[int, ...]]


class CheckpointWeights:
    """Model tensors of one checkpoint of any layout; optimizer states with ``prefix=OPTIMIZER``."""

    def __init__(self, path: Path, prefix: str = MODEL) -> None:
        self.path = path
        self._prefix = prefix
        self._reader = ShardReader(path)
        tensors = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            name.removeprefix(prefix): stored
            for name, stored in tensors.items()
            if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
        }
        self.shapes: Shapes = {n: tuple(stored.size) for n, stored in self._tensors.items()}

    def types(self) -> dict[str, torch.dtype]:
        """Return the types of the tensors by name."""
        return {name: stored.properties.dtype for name, stored in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return one unsharded tensor on the CPU; UserError if the stored bytes are damaged."""
        stored = self._tensors[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        try:
            with _alone():
                dcp.load({self._prefix + name: tensor}, storage_reader=self._reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise (refusal_in(error) or error) from None
        return tensor


def value_of(weights: CheckpointWeights, counterpart: Counterpart) -> Tensor:
    """Return our parameter or a router's bias; zeros for a bias missing in the checkpoint."""
    name = counterpart.spec.name
    if counterpart.buffer and name not in weights.shapes:
        return torch.zeros(counterpart.spec.shape)
    return weights.read(name)


class FolderWeights:
    """Tensors of a Hugging Face folder: ``model.safetensors``, or several files with an index.

    Raises UserError for a folder without such files, a missing or unreadable file, and tensors that
    are not floating point (quantized weights).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: Shapes = {}
        for file in self._files():
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    kept = tensors.get_slice(name)
                    if kept.get_dtype() not in _FLOATS:
                        raise UserError(
                            f"{file}: tensor {name} has type {kept.get_dtype()}; only weights in "
                            "fp32, bf16 or fp16 can be imported"
                        )
                    self._file_of[name] = file
                    self.shapes[name] = tuple(kept.get_shape())

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored type."""
        with _opened(self._file_of[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.exists():
            if single.exists():
                return [_within(self.folder, SINGLE)]
            raise UserError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; save the model in "
                "safetensors format there"
            )
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} names no files; save the model there again")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or name == "..":
                raise UserError(
                    f"{index} names {name!r}, which is no file of its folder; copy the model again"
                )
        return [_within(self.folder, name) for name in sorted(set(places.values()))]


def _within(folder: Path, name: str) -> Path:
    """Return a file of ``folder``; links may only point into ``blobs`` of its Hugging Face cache.

    Raises UserError for a link to any other place.
    """
    path, home = folder / name, folder.resolve()
    blobs = home.parent.parent / "blobs"
    if path.resolve().parent not in (home, blobs):
        raise UserError(
            f"{path} is a link out of its folder, to {path.resolve()}; copy the file, or name the "
            "folder that it lies in"
        )
    return path


@contextmanager
def _alone() -> Iterator[None]:
    """Suppress torch's warning for each tensor that it works in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy the model again") from None


def hash_of(folder: Path) -> str:
    """Return the first 16 digits of the SHA-256 of a model's weight files, names included."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError if the file is missing or has no object."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name the folder that holds it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None


def chosen_checkpoint(folder: RunFolder, step: int | None) -> Path:
    """Return the checkpoint of ``step``, or the latest; UserError if it is absent or damaged."""
    there = checkpoint.saved(folder)
    names = ", ".join(path.name for path in there) or "none"
    latest = f"step-{step}"
    if step is None:
        if not there:
            raise UserError(f"{folder.path} has no checkpoint yet; train it first")
        latest = folder.read_latest() or there[-1].name
    path = folder.checkpoints / latest
    if path not in there:
        raise UserError(f"{folder.path} has no checkpoint {latest}; it has {names}")
    problem = problem_of(folder, path, contents=True)
    if problem is not None:
        raise UserError(
            f"checkpoint {path} is damaged ({problem}); choose another with --step (there are "
            f"{names})"
        )
    return path


def write_safetensors(
    folder: Path,
    parts: Sequence[tuple[Sequence[tuple[str, int]], Callable[[], dict[str, Tensor]]]],
    shard_bytes: int,
) -> list[str]:
    """Write ``model.safetensors``, or several files and an index; return the file names.

    Each part has the (name, bytes) of its tensors, known in advance, and a function that returns
    them. A part is never divided; a file has parts of up to ``shard_bytes``, at least one.
    """
    shards: list[list[Callable[[], dict[str, Tensor]]]] = []
    filled = 0
    for tensors, make in parts:
        size = sum(nbytes for _, nbytes in tensors)
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(make)
        filled += size
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        held: dict[str, Tensor] = {}
        for make in shard:
            held |= make()
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
        files.append(file)
    if not single:
        total = sum(nbytes for tensors, _ in parts for _, nbytes in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def write_checkpoint(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    states: CheckpointWeights | None = None,
) -> Files:
    """Write checkpoint shards with these fp32 parameters of a model, and optimizer ``states``.

    ``read`` is called for one parameter at a time while the files are written. Returns sizes and
    checksums, for ``integrity.seal``.
    """
    # The save plan needs only shapes and types, which meta tensors have.
    state = {
        MODEL + name: torch.empty(shape, dtype=torch.float32, device="meta")
        for name, shape in shapes.items()
    }
    if states is not None:
        state |= _planned(states)

    def part(name: str) -> Tensor:
        if states is not None and name.startswith(OPTIMIZER):
            return states.read(name.removeprefix(OPTIMIZER))
        return read(name.removeprefix(MODEL))

    return write_tensors(path, state, part)


def write_states(path: Path, states: CheckpointWeights) -> None:
    """Write optimizer states without parameters, for ``CheckpointWeights(path, OPTIMIZER)``."""
    files = write_tensors(
        path, _planned(states), lambda name: states.read(name.removeprefix(OPTIMIZER))
    )
    step = step_named(states.path) or 0
    seal(path, step, files, {"step": step})


def _planned(states: CheckpointWeights) -> dict[str, Tensor]:
    types = states.types()
    return {
        OPTIMIZER + name: torch.empty(shape, dtype=types[name], device="meta")
        for name, shape in states.shapes.items()
    }


def write_tensors(path: Path, state: dict[str, Tensor], read: Callable[[str], Tensor]) -> Files:
    """Write checkpoint shards for the tensors of ``state``, which are on the meta device.

    ``read`` is called with one name of ``state`` at a time. Returns sizes and checksums.
    """
    writer = ShardWriter(path)
    try:
        with _alone():
            dcp.save(state, storage_writer=writer, planner=_OneByOne(read), no_dist=True)
    except dcp.CheckpointException as error:  # an error of ``read``
        raise (refusal_in(error) or error) from None
    return writer.files


class _OneByOne(DefaultSavePlanner):
    """Save planner that reads each tensor only when the writer needs the tensor."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._read(index.fqn)
