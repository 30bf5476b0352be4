"""``allometry convert``: which way to convert, and what it prints when it is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import cast

from ruamel.yaml import YAML

from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.model import ModelConfig
from allometry.interop.huggingface.compare import Comparison
from allometry.interop.huggingface.convert import (
    Dtype,
    ExportReport,
    ImportReport,
    export_hf,
    import_hf,
    read_model,
)

_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None is what was not given."""

    source: Path
    out: Path | None = None
    step: int | None = None
    family: str | None = None
    dtype: str | None = None
    config: str | None = None
    print_model: bool = False
    check: bool = False


def run(request: Request, *, as_json: bool) -> str:
    """Convert and return a report, as lines or as JSON. Raises UserError for what does not fit."""
    is_run, is_model = ((request.source / name).exists() for name in ("config.yaml", "config.json"))
    in_checkpoint = request.source.parent.name == "checkpoints"
    if is_run and is_model:
        raise UserError(
            f"{request.source} holds both config.yaml (a run) and config.json (a Hugging Face "
            "model); move one of them to a folder of its own"
        )
    if in_checkpoint and not is_model:
        raise UserError(
            f"{request.source} is one checkpoint; name its run, {request.source.parent.parent}, "
            "and the checkpoint with --step"
        )
    if is_run:
        return _export(request, as_json)
    if is_model:
        return _import(request, as_json)
    raise UserError(
        f"{request.source} holds neither config.yaml (a run) nor config.json (a Hugging Face "
        "model); name a folder that does"
    )


def _refuse(request: Request, names: tuple[str, ...], why: str) -> None:
    for name in names:
        value = getattr(request, name)
        if value is not None and value is not False:
            raise UserError(f"--{name.replace('_', '-')} {why}; leave it out")


def _export(request: Request, as_json: bool) -> str:
    _refuse(
        request,
        ("config", "print_model"),
        f"goes with a Hugging Face model, and {request.source} is a run",
    )
    dtype = request.dtype or "fp32"
    if dtype not in _DTYPES:
        raise UserError(f"--dtype={dtype} is not known; use fp32 or bf16")
    report = export_hf(
        request.source,
        _out(request),
        request.step,
        request.family,
        cast(Dtype, dtype),
        check=request.check,
    )
    return json.dumps(asdict(report), indent=2) if as_json else _exported(report)


def _import(request: Request, as_json: bool) -> str:
    _refuse(
        request,
        ("step", "family", "dtype"),
        f"goes with a run, and {request.source} is a Hugging Face model",
    )
    if request.print_model:
        _refuse(request, ("out", "config", "check"), "does not go with --print-model")
        _, model = read_model(request.source)
        described = {"model": model.model_dump(mode="json")}
        return json.dumps(described, indent=2) if as_json else _yaml(model)
    if request.config is None:
        raise UserError(
            "importing a model needs --config, the run that is to be trained; --print-model prints "
            "the model section for it"
        )
    report = import_hf(request.source, load(request.config), _out(request), check=request.check)
    return json.dumps(asdict(report), indent=2) if as_json else _imported(report, request.config)


def _out(request: Request) -> Path:
    if request.out is None:
        raise UserError("--out is missing; name the folder to make")
    return request.out


def _yaml(model: ModelConfig) -> str:
    out = StringIO()
    yaml = YAML(typ="rt")
    yaml.default_flow_style = False
    yaml.dump({"model": model.model_dump(mode="json")}, out)
    return out.getvalue().rstrip("\n")


def _exported(report: ExportReport) -> str:
    lines = [
        f"{report.source}, step {report.step} -> {report.target}",
        f"{report.family}, {report.dtype}: {report.tensors:,} tensors, {report.bytes:,} bytes in "
        f"{len(report.files)} file(s)",
        *(f"folded: {fold}" for fold in report.folds),
        f"tokenizer: {report.tokenizer or 'none, as data.tokenizer names none'}",
    ]
    return "\n".join(lines + _checked(report.check))


def _imported(report: ImportReport, config: str) -> str:
    lines = [
        f"{report.source} -> {report.target}, step 0",
        f"{report.family}: {report.parameters:,} parameters",
        f"tokenizer: {report.tokenizer or 'none in that folder'}",
    ]
    begin = f"train it: allometry train {config} run.folder={report.target}"
    return "\n".join([*lines, *_checked(report.check), begin])


def _checked(check: Comparison | None) -> list[str]:
    if check is None:
        return []
    lines = [
        f"check: logits differ by at most {check.max_difference:.3g} ({check.relative:.3g} of the "
        f"largest); {check.tensors:,} tensors equal bit for bit"
    ]
    if check.rounding is not None:
        lines.append(
            f"check: rounding the weights moved logits by {check.rounding:.3g} of the largest"
        )
    return lines
