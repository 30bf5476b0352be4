"""The table of attention back ends, and the memory estimate that uses it."""

import pytest

from allometry.configs.execution import Zero
from allometry.configs.model import DenseModel
from allometry.scaling.attention import BACKENDS, AttentionCall, choose_backend
from allometry.scaling.memory import FUSED_ATTENTION, estimate_memory

LENGTH, TOKENS = 512, 1024


def test_names_are_given_once() -> None:
    names = [backend.name for backend in BACKENDS]
    assert len(set(names)) == len(names)


def test_what_needs_a_package_says_how_to_install_it() -> None:
    assert [b.name for b in BACKENDS if b.package] == ["flash3", "flash2"]
    assert all(bool(b.install) == (b.package is not None) for b in BACKENDS)


def activations(call: AttentionCall) -> int:
    model = DenseModel(vocab_size=64, width=64, num_layers=3, num_heads=4, ffn_width=128)
    return estimate_memory(
        model,
        micro_batch_tokens=TOKENS,
        compute_bytes=4,
        zero=Zero(),
        hdp=1,
        attention=call,
    ).activations


@pytest.mark.parametrize(
    ("changes", "more_bytes"),
    [
        ({}, 0),  # flash: a log-sum-exp per head, for any length
        ({"packed": True}, 0),  # a kernel for documents of any lengths
        ({"packed": True, "dtype": "fp32"}, 4 * LENGTH),  # a saved mask
        ({"packed": True, "dtype": "fp32", "device": "cpu"}, 0),
    ],
)
def test_memory_is_what_the_back_end_keeps(changes: dict[str, object], more_bytes: int) -> None:
    call = FUSED_ATTENTION._replace(length=LENGTH, **changes)
    assert choose_backend(call).kept(call, 4, 4, sequences=1) == 4 * 4 + more_bytes
    fused = FUSED_ATTENTION._replace(device=call.device)
    assert activations(call) - activations(fused) == 3 * TOKENS * more_bytes


def test_a_named_back_end_counts_as_what_it_keeps() -> None:
    model = DenseModel(vocab_size=64, width=64, num_layers=3, num_heads=4, ffn_width=128)

    def kept(backend: str | None) -> int:
        return estimate_memory(
            model,
            **{"micro_batch_tokens": TOKENS, "compute_bytes": 4, "zero": Zero(), "hdp": 1},
            attention=FUSED_ATTENTION._replace(length=LENGTH),
            attention_backend=backend,
        ).activations

    assert kept(None) == kept("cudnn")
    assert kept("reference") - kept(None) == 3 * TOKENS * (4 * 4 * LENGTH - 4 * 4)
