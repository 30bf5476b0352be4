"""DeepSpeed's asynchronous I/O operator, compiled once per machine before the first run."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from allometry.configs.errors import UserError
from allometry.parallel.deepspeed.files import CheckedHandle
from allometry.parallel.deepspeed.package import check_installed, quieten

BUILD = "allometry doctor --build"
_NAME = "async_io"


def folder() -> Path:
    """Return the folder of compiled operators, one for each version of torch."""
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(base) / "allometry" / f"torch-{torch.__version__}"


def is_built() -> bool:
    """Return True if the operator is compiled."""
    return any((folder() / _NAME).glob("*.so"))


def build() -> Path:
    """Compile the operator if needed (this takes minutes) and load the operator; return its folder.

    Concurrent processes wait. The file locks that a dead process left are removed, since the system
    has released its ``flock``. Raises UserError if a compiler or the headers of libaio are missing
    or the build fails.
    """
    check_installed()
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise UserError("building async_io needs a C++ compiler; apt install g++")
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "build.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in place.glob("*/lock"):  # torch's lock files; their owners have ended
            left.unlink()
        try:
            _load()
        except Exception as error:  # compilers and loaders fail in many ways
            said = f"{type(error).__name__}: {error}".split("\n")[0]
            raise UserError(
                f"async_io could not be built in {place} ({said}); it needs the headers of libaio: "
                "apt install libaio-dev"
            ) from None
    return place / _NAME


def probe(place: Path, nbytes: int = 4 << 20) -> None:
    """Write a file in ``place``, read the file back and compare; raise UserError on failure."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror or error}; name another folder") from None
    handle = CheckedHandle(_load().aio_handle())
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        kind = torch.zeros(1, dtype=torch.float32)
        buffers = [handle.new_cpu_locked_tensor(nbytes // 4, kind) for _ in range(2)]
        buffers[0].copy_(torch.arange(nbytes // 4))
        for buffer, call in zip(buffers, (handle.async_pwrite, handle.async_pread), strict=True):
            call(buffer, os.path.join(scratch, "probe.swp"), 0)
            handle.wait()
        assert torch.equal(*buffers)
        for buffer in buffers:
            handle.free_cpu_locked_tensor(buffer)


def check_built() -> None:
    """Raise UserError if the operator has not been compiled on this machine."""
    if not is_built():
        raise UserError(
            "parallel.zero.optimizer_states.nvme with parallel.zero.engine=deepspeed needs the "
            f"operator async_io, which is not in {folder()}; build it with {BUILD}"
        )


@contextmanager
def checked_io() -> Iterator[None]:
    """Replace every I/O handle that DeepSpeed creates in this context by a ``CheckedHandle``."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    original = AsyncIOBuilder.load
    made = _load()

    def load(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(aio_handle=lambda *a, **k: CheckedHandle(made.aio_handle(*a, **k)))

    AsyncIOBuilder.load = load
    try:
        yield
    finally:
        AsyncIOBuilder.load = original


def _load() -> Any:
    """Return DeepSpeed's extension module; compile the module if needed."""
    if "deepspeed" not in sys.modules:
        quieten("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder())
    try:
        return AsyncIOBuilder().load(verbose=False)
    finally:
        if before is None:
            del os.environ["TORCH_EXTENSIONS_DIR"]
        else:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
