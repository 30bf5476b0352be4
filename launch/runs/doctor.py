"""Installed and usable components, and fixes for missing ones: ``allometry doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.runs.commands import Doctor
from allometry.launch.start import choose, find_library
from allometry.launch.text import table
from allometry.scaling.attention import (
    BACKENDS,
    AttentionCall,
    choose_backend,
    installed,
    worth_measuring,
)
from allometry.scaling.kernels import BUILD, apex_folder

Status = Literal["ok", "absent", "problem"]


@dataclass(frozen=True)
class Finding:
    """Result of one check. ``fix`` is empty if no action is needed."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def examined(asked: Doctor) -> Report:
    """Run all checks; a failing check does not prevent the others."""

    def offload() -> Iterator[Finding]:
        return _offload(asked.disk)

    def deepspeed() -> Iterator[Finding]:
        return _deepspeed(asked.disk, build=asked.build)

    def machine() -> Iterator[Finding]:
        return _machine(asked.disk, asked.out)

    if asked.out is not None and not asked.measure:
        raise UserError("--out is where --measure writes; add --measure, or leave --out out")
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _torch, _nvml, _attention, _apex, deepspeed, _megatron, _allocator, _compiler,
        _memory, *((machine,) if asked.measure else (offload,)),
    )  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            findings.extend(check())
        except UserError:
            raise
        except Exception as error:  # a broken install may raise any exception
            findings.append(Finding(name, "problem", f"{type(error).__name__}: {error}"))
    rows = []
    for one in findings:
        mark = "PROBLEM" if one.status == "problem" else one.status
        rows.append([mark, one.name, one.detail])
        rows += [["", "", f"-> {one.fix}"]] if one.fix else []
    return Report([asdict(one) for one in findings], table(rows, least=(7,)))


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield Finding("torch", "problem", str(error), "pip install 'torch>=2.11,<2.14'")
        return
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (2, 11) <= numbers < (2, 14):
        yield Finding("torch", "ok", torch.__version__)
    else:
        fix = "allometry is tested with 2.11 to 2.13: pip install 'torch>=2.11,<2.14'"
        yield Finding("torch", "problem", torch.__version__, fix)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("CUDA", "ok", f"{torch.version.cuda}, {len(names)} x {names[0]}")
    elif torch.version.cuda:
        detail = f"torch is built for CUDA {torch.version.cuda} but sees no device"
        fix = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
        yield Finding("CUDA", "problem", detail, fix)
    else:
        fix = "for GPUs install torch's CUDA build; the CPU one trains too, with gloo"
        yield Finding("CUDA", "absent", "this is torch's CPU build", fix)
    if dist.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "absent", "comes with torch's CUDA build; the CPU uses gloo")
    if dist.is_gloo_available():
        yield Finding("gloo", "ok", "available")
    else:
        why = "this torch was built without gloo"
        yield Finding("gloo", "problem", why, "install an official build of torch")


def _nvml() -> Iterator[Finding]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding(
            "NVML", "absent", f"no NVML ({error})", "needs NVIDIA's driver; training works without"
        )
        return
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        yield Finding("NVML", "ok", f"driver {driver}, {pynvml.nvmlDeviceGetCount()} devices")
    finally:
        pynvml.nvmlShutdown()


def _attention() -> Iterator[Finding]:
    import torch

    for backend in BACKENDS:
        if backend.package is None:
            continue
        name = _DISTRIBUTIONS[backend.package]
        if installed(backend.package):
            importlib.import_module(backend.package)
            yield Finding(name, "ok", f"{version(name)}, attention back end {backend.name}")
        else:
            why = f"no attention back end {backend.name}; torch's own kernels are used"
            yield Finding(name, "absent", why, backend.install)
    on_cuda = torch.cuda.is_available()
    call = AttentionCall(
        "cuda" if on_cuda else "cpu", "bf16", packed=False, length=4096, compiled=False
    )
    whole, packed = (
        ", ".join(worth_measuring(one)) if on_cuda else choose_backend(one).name
        for one in (call, call._replace(packed=True))
    )
    how = "the fastest, measured when a run begins, of" if on_cuda else "by rule"
    yield Finding("attention", "ok", f"bf16: {how} {whole}; with several documents {packed}")


_DISTRIBUTIONS = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3"}
"""Distribution name of flash-attn's packages, by import name."""


def _apex() -> Iterator[Finding]:
    folder = apex_folder()
    if folder is not None:
        why = f"{folder}: kernels.norm and kernels.adamw may be apex"
        yield Finding("NVIDIA apex", "ok", why)
    elif importlib.util.find_spec("apex") is None:
        yield Finding("NVIDIA apex", "absent", "optional; torch's fused AdamW and norm are used")
    else:
        why = "the installed package 'apex' is a web toolkit of the same name, not NVIDIA's"
        fix = f"pip uninstall apex; if you want NVIDIA's kernels, {BUILD}"
        yield Finding("NVIDIA apex", "problem", why, fix)


def _deepspeed(disk: Path | None, *, build: bool) -> Iterator[Finding]:
    from allometry.parallel.deepspeed import ops, package

    number = version("deepspeed")
    if number is None:
        why = "optional; only parallel.zero.engine=deepspeed needs it"
        yield Finding("deepspeed", "problem" if build else "absent", why, package.INSTALL)
        return
    if number != package.VERSION:
        why = f"{number}, and parallel.zero.engine=deepspeed needs {package.VERSION}"
        yield Finding("deepspeed", "problem", why, package.INSTALL)
        return
    yield Finding("deepspeed", "ok", number)
    name = "deepspeed async_io"
    if not (build or ops.is_built()):
        why = "not built; only NVMe with parallel.zero.engine=deepspeed needs it"
        yield Finding(name, "absent", why, f"apt install libaio-dev, then {ops.BUILD}")
        return
    try:
        place = ops.build()
        with tempfile.TemporaryDirectory() as scratch:
            ops.probe(disk or Path(scratch))
    except UserError as error:
        yield Finding(name, "problem", str(error), f"mend that, then {ops.BUILD}")
    else:
        where = disk or "a temporary folder"
        yield Finding(name, "ok", f"{place}; what it wrote in {where} was read back")


def _megatron() -> Iterator[Finding]:
    if number := version("megatron-core"):
        yield Finding("megatron-core", "ok", f"{number} (writes token files)")
    else:
        why = "needed by allometry prepare, not by training"
        yield Finding("megatron-core", "absent", why, "pip install 'megatron-core>=0.16,<0.17'")


def _allocator() -> Iterator[Finding]:
    faster = "for faster training on CPU: apt install libjemalloc2 (found by itself)"
    fix = "" if find_library("jemalloc") or find_library("tcmalloc") else faster
    yield Finding("CPU allocator", "ok", choose("auto", os.environ).name, fix)


def _compiler() -> Iterator[Finding]:
    if compiler := (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        yield Finding("C++ compiler", "ok", compiler)
    else:
        why = "needed by training.compile on CPU and by deepspeed's ops"
        yield Finding("C++ compiler", "absent", why, "apt install g++")


def _memory() -> Iterator[Finding]:
    import psutil

    memory, shared = psutil.virtual_memory(), shutil.disk_usage("/dev/shm")
    sizes = (
        f"{memory.total / 2**30:.0f} GiB, {psutil.cpu_count(logical=False)} cores, /dev/shm "
        f"{shared.total / 2**30:.1f} GiB"
    )
    if shared.total < 1 << 30:
        fix = "give the container a larger /dev/shm (docker run --shm-size=8g)"
        yield Finding("memory", "problem", sizes, fix)
    else:
        yield Finding("memory", "ok", sizes)


RATES = Path("~/.cache/allometry/offload.json")
"""The newest measured rates, by machine and by folder."""


def _offload(disk: Path | None, kept: Path = RATES) -> Iterator[Finding]:
    from allometry.optim.offload.rates import adam_rate, disk_rates
    from allometry.parallel.folder import FileSystem

    rate = adam_rate()
    found: dict[str, Any] = {"adam_parameters_per_s": rate}
    said = f"{rate / 1e6:,.0f} M parameters/s, torch's fused AdamW on the threads in use"
    yield Finding("host AdamW", "ok", said)
    if disk is not None:
        try:
            write, read = disk_rates(disk)
        except UserError as error:
            yield Finding("disk", "problem", str(error), "name another folder")
        else:
            found["disks"] = {str(disk.resolve()): {"write_b_per_s": write, "read_b_per_s": read}}
            said = f"{disk}: {write / 1e9:.2f} GB/s written, {read / 1e9:.2f} GB/s read, checked"
            system = FileSystem.of(disk)
            yield Finding("disk", "ok", said, "" if system is None else system.note)
    _keep(found, kept)


def _machine(disk: Path | None, out: Path | None, kept: Path = RATES) -> Iterator[Finding]:
    from allometry.launch.runs.doctor_measure import measure

    place = disk or Path.cwd()
    one = measure(place, out)
    hardware, gpu, links = one.hardware, one.hardware.gpu, one.hardware.inside
    for dtype, peak in gpu.peak_flops.items():
        large = f"{peak * gpu.attainable[dtype] / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s"
        yield Finding(f"products, {dtype}", "ok", f"{large}, large ones of the fastest")
    speed = gpu.attention * gpu.peak_flops["bf16"]
    yield Finding("attention", "ok", f"{speed / 1e9:,.0f} GFLOP/s of long sequences in bf16")
    yield Finding("copies", "ok", f"{gpu.memory_bandwidth / 1e9:.1f} GB/s read and written")
    told = f"{links.bandwidth / 1e9:.2f} GB/s, {links.latency_s * 1e6:.0f} us a step"
    yield Finding("messages", "ok", told if hardware.gpus_per_node > 1 else "there is one rank")
    for crowd in hardware.crowds:
        kept_back = f"{crowd.products:.0%} of products, {crowd.memory:.0%} of copies"
        yield Finding(f"{crowd.ranks} ranks at once", "ok", f"leave each other {kept_back}")
    yield Finding("host AdamW", "ok", f"{one.adam_rate / 1e6:,.0f} M parameters/s of one process")
    write, read = one.disk
    said = f"{place}: {write / 1e9:.2f} GB/s written, {read / 1e9:.2f} GB/s read, checked"
    yield Finding("disk", "ok", said)
    files = ", ".join(map(str, one.files))
    yield Finding("written", "ok", f"{files}: hardware this-machine")
    rates = {"write_b_per_s": write, "read_b_per_s": read}
    disks = {str(place.resolve()): rates}
    _keep({"adam_parameters_per_s": one.adam_rate, "disks": disks}, kept)


def _keep(found: dict[str, Any], kept: Path) -> None:
    """Merge this machine's rates into the file; rates of other folders are kept."""
    from allometry.trainer.state.folder import write_atomically

    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        place = kept.expanduser()
        place.parent.mkdir(parents=True, exist_ok=True)
        known: Any = {}
        with suppress(OSError, ValueError):
            known = json_file.read(place)
        known = known if isinstance(known, dict) else {}
        before = known.get(platform.node(), {})
        disks = {**before.get("disks", {}), **found.get("disks", {})}
        known[platform.node()] = {**before, **found, "disks": disks}
        write_atomically(place, json.dumps(known, indent=1) + "\n")
