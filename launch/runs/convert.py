"""Conversion between runs and Hugging Face folders: ``allometry convert``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import cast

from allometry.configs.errors import UserError
from allometry.configs.loader import load, yaml_text
from allometry.interop.huggingface.compare import Comparison
from allometry.interop.huggingface.convert import (
    Dtype,
    ExportReport,
    export_hf,
    import_hf,
)
from allometry.interop.huggingface.model import read_model
from allometry.interop.huggingface.origin import read_origin
from allometry.launch.command import Report
from allometry.launch.runs.commands import Convert
from allometry.trainer.state.refused import mark_refused


def converted(asked: Convert) -> Report:
    """Export or import, depending on SOURCE. Raises UserError: an option or SOURCE does not fit."""
    is_run, is_model = ((asked.source / name).exists() for name in ("config.yaml", "config.json"))
    in_checkpoint = asked.source.parent.name == "checkpoints"
    if is_run and is_model:
        raise UserError(
            f"{asked.source} holds both config.yaml (a run) and config.json (a Hugging Face "
            "model); move one of them to a folder of its own"
        )
    if in_checkpoint and not is_model:
        raise UserError(
            f"{asked.source} is one checkpoint; name its run, {asked.source.parent.parent}, "
            "and the checkpoint with --step"
        )
    if is_run:
        return _export(asked)
    try:
        if is_model:
            return _import(asked)
        raise UserError(
            f"{asked.source} holds neither config.yaml (a run) nor config.json (a Hugging Face "
            "model); name a folder that does"
        )
    except BaseException as error:  # Ctrl-C included
        if asked.out is not None and (is_model or asked.config is not None):
            mark_refused(asked.out, asked.source, str(error) or type(error).__name__)
        raise


def _refuse(asked: Convert, names: tuple[str, ...], why: str) -> None:
    for name in names:
        value = getattr(asked, name)
        if value is not None and value is not False:
            raise UserError(f"--{name.replace('_', '-')} {why}; leave it out")


def _export(asked: Convert) -> Report:
    why = f"goes with a Hugging Face model, and {asked.source} is a run"
    _refuse(asked, ("config", "print_model"), why)
    dtype = asked.dtype or "fp32"
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype={dtype} is not known; use fp32 or bf16")
    report = export_hf(
        asked.source,
        _out(asked),
        asked.step,
        asked.family,
        cast(Dtype, dtype),
        tokenizer=str(asked.tokenizer) if asked.tokenizer else None,
        end_of_document=asked.end_of_document,
        optimizer_state=asked.optimizer_state,
        check=asked.check,
        main_model=asked.main_model,
    )
    lines = [
        f"{report.source}, step {report.step} -> {report.target}",
        f"{report.family}, {report.dtype}: {report.tensors:,} tensors, {report.bytes:,} bytes in "
        f"{len(report.files)} file(s)",
        *(f"folded: {fold}" for fold in report.folds),
        *_text(report),
        *_checked(report.check),
    ]
    return Report(asdict(report), "\n".join(lines))


def _import(asked: Convert) -> Report:
    why = f"goes with a run, and {asked.source} is a Hugging Face model"
    _refuse(asked, ("step", "family", "dtype", "tokenizer", "end_of_document", "main_model"), why)
    if asked.print_model:
        _refuse(
            asked, ("out", "config", "check", "optimizer_state"), "does not go with --print-model"
        )
        _, model = read_model(asked.source)
        section = {"model": model.model_dump(mode="json")}
        origin = read_origin(asked.source)
        if origin is not None and origin["parameterization"]["kind"] != "sp":
            section["parameterization"] = origin["parameterization"]
        return Report(section, yaml_text(section).rstrip("\n"))
    if asked.config is None:
        raise UserError(
            "importing a model needs --config, the run that is to be trained; --print-model prints "
            "the model section for it"
        )
    report = import_hf(
        asked.source,
        load(asked.config),
        _out(asked),
        optimizer_state=asked.optimizer_state,
        check=asked.check,
    )
    lines = [
        f"{report.source} -> {report.target}, step 0",
        f"{report.family}: {report.parameters:,} parameters"
        + (", and the optimizer's states" if asked.optimizer_state else ""),
        *(f"divided out: {unfold}" for unfold in report.unfolds),
        *report.notes,
        f"tokenizer: {report.tokenizer or 'none in that folder'}",
        *_checked(report.check),
        f"train it: allometry train {asked.config} run.folder={report.target}",
    ]
    return Report(asdict(report), "\n".join(lines))


def _text(report: ExportReport) -> list[str]:
    """Return lines on the tokenizer and the end of documents, with options for missing ones."""
    lines = [f"tokenizer: {report.tokenizer}"] if report.tokenizer else []
    if report.end_of_document:
        lines.append(f"end of documents: {report.end_of_document}")
    remedy = {"tokenizer": "--tokenizer", "end of documents": "--end-of-document"}
    return lines + [f"{why}; give it with {remedy[why.split(':')[0]]}" for why in report.unknown]


def _out(asked: Convert) -> Path:
    if asked.out is None:
        raise UserError("--out is missing; name the folder to make")
    return asked.out


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
