"""Read shards of an untrusted checkpoint.

torch writes ``.metadata``, the index of the tensors, by pickle, and reads it with a call that can
execute arbitrary code. This reader unpickles only the few classes used in the index, and checks the
index against the files of the folder before any tensor is allocated: each piece must be inside its
file and as large as its shape requires. The bytes read are compared with ``complete.json``
(``verified.py``).
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    metadata,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future
from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.trainer.state.integrity import METADATA
from allometry.trainer.state.verified import Span, VerifiedFiles

_CLASSES = {
    torch.distributed.checkpoint.metadata.__name__: {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(
            str(d).removeprefix("torch.")
            for d in vars(torch).values()
            if isinstance(d, torch.dtype)
        ),
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Classes in torch's tensor metadata; all of them only store values."""

MOST_METADATA_BYTES = 1 << 30


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if global_name not in _CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class ShardReader(FileSystemReader):
    """torch's reader of the shards in ``path``, for checkpoints from untrusted sources.

    Raises UserError if the metadata cannot be read, contain other objects than tensors and their
    locations, or do not match the files; and if the bytes read differ from those written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path
        self._files = VerifiedFiles(path)

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, with the location of each tensor."""
        place = self._folder / METADATA
        try:
            if place.stat().st_size > MOST_METADATA_BYTES:
                raise ValueError("it is too large")
            found = _Unpickler(io.BytesIO(self._files.whole(METADATA))).load()
            _check(found, {file.name: file.stat().st_size for file in self._folder.iterdir()})
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        except UserError:
            raise
        except (pickle.UnpicklingError, *_MALFORMED) as error:
            raise self._refused(str(error) or type(error).__name__) from None
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found  # type: ignore[no-any-return]

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load the tensors of the plan, reading each file sequentially.

        Needs memory for twice the largest stored tensor, which is one rank's part of a tensor.
        """
        wanted: dict[str, dict[Span, list[ReadItem]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            wanted[place.relative_path][Span(place.offset, place.length)].append(item)
        spans: dict[str, list[Span]] = defaultdict(list)
        for place in self.storage_data.values():
            if place.relative_path in wanted:
                spans[place.relative_path].append(Span(place.offset, place.length))
        for name, items in wanted.items():
            for span, data in self._files.pieces(name, items, spans[name]):
                tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                for item in items[span]:
                    _fill(planner, item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _refused(self, reason: str) -> UserError:
        return UserError(
            f"checkpoint {self._folder} cannot be read ({METADATA}: {reason}); it is damaged or "
            "was not written by allometry: use another one"
        )


def refusal_in(error: CheckpointException) -> UserError | None:
    """Return the first UserError among the failures of all ranks, without torch's wrapping."""
    failures = [failure for failure, _ in error.failures.values()]
    return next((failure for failure in failures if isinstance(failure, UserError)), None)


def _fill(planner: LoadPlanner, item: ReadItem, stored: torch.Tensor) -> None:
    """Copy the part of ``stored`` that ``item`` requests into its target."""
    part = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
    target = planner.resolve_tensor(item).detach()
    if target.size() != part.size():
        raise ValueError(
            f"{item.dest_index.fqn} is stored as {tuple(part.size())}, not {tuple(target.size())}"
        )
    target.copy_(part)
    planner.commit_tensor(item, target)


_MALFORMED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError),
    *(OverflowError, RecursionError, MemoryError, ImportError),
)


def _check(found: Any, files: Mapping[str, int]) -> None:
    """Raise ValueError if the metadata do not describe tensors within ``files``."""
    if not isinstance(found, Metadata):
        raise ValueError(f"it holds a {type(found).__name__}")
    tensors, places = found.state_dict_metadata, found.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("it lists no tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    known = {}
    for index, place in places.items():
        if not isinstance(place, _StorageInfo) or place.relative_path not in files:
            raise ValueError(f"{index.fqn} lies in a file that is not there")
        end = files[place.relative_path]
        if min(place.offset, place.length) < 0 or place.offset + place.length > end:
            raise ValueError(f"{index.fqn} lies past the end of {place.relative_path}")
        known[index.fqn, tuple(index.offset or ())] = place.length
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            kept = known.get((name, tuple(chunk.offsets)))
            if kept is None or min(chunk.sizes, default=0) < 0:
                raise ValueError(f"{name} has a piece that is in no file")
            if math.prod(chunk.sizes) * tensor.properties.dtype.itemsize > kept:
                raise ValueError(f"{name} is larger than what is kept of it")
        covered = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if math.prod(tensor.size) > covered:
            raise ValueError(f"{name} is not there as a whole")
