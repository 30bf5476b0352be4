"""Hostile Hugging Face model folders are refused in one sentence."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from allometry.configs.errors import UserError
from allometry.data.tokenizer import read_tokenizer_json
from allometry.interop.huggingface.config import from_hf
from allometry.interop.huggingface.origin import read_origin
from allometry.interop.huggingface.weights import FolderWeights

INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "one"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2, 2)}, folder / "model.safetensors")
    save_file({"secret": torch.ones(2, 2)}, tmp_path / "outside.safetensors")
    return folder


def with_index(model: Path, weight_map: Any) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "weight_map",
    [
        {"secret": "../../outside.safetensors"},
        {"secret": "/etc/passwd"},
        {"secret": ".."},
        {"a": 5},
        {"a": None},
        {"a": ["model.safetensors"]},
        ["model.safetensors"],
        5,
        {},
    ],
)
def test_an_index_names_only_files_of_its_folder(model: Path, weight_map: Any) -> None:
    with_index(model, weight_map)
    with pytest.raises(UserError, match=r"no file of its folder|names no files"):
        FolderWeights(model)


def test_links_out_of_a_folder(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="is a link out of its folder"):
        FolderWeights(model)
    # The layout of Hugging Face's own cache: snapshots/HASH/model.safetensors -> ../../blobs/HASH.
    snapshot, blobs = tmp_path / "models" / "snapshots" / "h", tmp_path / "models" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    save_file({"a": torch.ones(2, 2)}, blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert FolderWeights(snapshot).read("a").shape == (2, 2)


def header(
    content: dict[str, Any] | str | bytes, length: int | None = None, data: int = 16
) -> bytes:
    text = json.dumps(content) if isinstance(content, dict) else content
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def tensor(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "huge header": header("{}", length=1 << 62),
    "header past the end": header("{}", length=1000),
    "huge shape": header({"a": tensor(shape=(1 << 40, 1 << 20))}),
    "overflow": header({"a": tensor(shape=(1 << 63, 2))}),
    "negative": header({"a": tensor(shape=(-2, 2))}),
    "overlapping": header({"a": tensor(), "b": tensor()}),
    "past the end": header({"a": tensor(offsets=(16, 32))}),
    "backwards": header({"a": tensor(offsets=(16, 0))}),
    "unknown type": header({"a": tensor("F33")}),
    "quantized": header({"a": tensor("I8", (16,))}),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2, 2]}}),
    "a list": header("[1]"),
    "deep": header('{"a": ' + DEEP),
    "torn": header({"a": tensor()})[:20],
    "empty": b"",
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_safetensors_that_lie(model: Path, what: str) -> None:
    (model / "model.safetensors").write_bytes(HEADERS[what])
    with pytest.raises(UserError) as caught:
        FolderWeights(model)
    assert "\n" not in str(caught.value)


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Attack(tmp_path / "mark"), model / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds neither"):
        FolderWeights(model)
    assert not (tmp_path / "mark").exists()


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "layer_types": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [],
    "head_dim": 8,
}
WRONG: tuple[Any, ...] = (
    *(None, True, "x", "", -1, 0, 1.5, 1e308, float("inf"), float("nan"), [], [1], [[1]], ["x", 1]),
    *({}, {"a": 1}, {"rope_theta": "x"}, {"factor": [1]}, 10**400),
)


@pytest.mark.parametrize("base", [LLAMA, {**LLAMA, **EXPERTS}])
def test_any_value_of_a_config_is_a_model_or_a_sentence(base: dict[str, Any]) -> None:
    from_hf(base, "config.json")
    said = []
    for key in base:
        for value in WRONG:
            try:
                from_hf({**base, key: value}, "config.json")
            except UserError as error:
                said.append(str(error))
    assert len(said) > len(base) * len(WRONG) // 2
    assert not any("\n" in one for one in said)


READERS: dict[str, Callable[[Path], Any]] = {
    INDEX: FolderWeights,
    "tokenizer.json": read_tokenizer_json,
    "allometry_origin.json": lambda folder: read_origin(folder),
}


@pytest.mark.parametrize("text", [DEEP, "[1]", "{", "", "7", '{"kind": 5, "parameterization": 5}'])
@pytest.mark.parametrize("name", READERS)
def test_json_of_a_folder(model: Path, name: str, text: str) -> None:
    from allometry.interop.huggingface import origin

    path = model / (origin.ORIGIN if "origin" in name else name)
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        READERS[name](model)
    assert "\n" not in str(caught.value)
