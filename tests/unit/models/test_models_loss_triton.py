"""Row kernels of the loss in Triton's interpreter, against the fp64 full-logits reference.

Triton selects the interpreter when it is imported, so the tests run in a separate process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from allometry.models import loss as losses
from allometry.models.loss import IGNORE, linear_cross_entropy, reference_cross_entropy
from allometry.models.vocabulary import SharedSoftmax
from loss_example import example, relative, results

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton"
)
OPTIONS = [(1.0, 0.0), (0.25, 0.0), (0.5, 1e-2)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETED, reason="starts the process with TRITON_INTERPRET=1")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed, 1 skipped" in done.stdout, done.stdout


@pytest.fixture
def kernels(monkeypatch):
    """Return the module in the interpreter on a CPU, used for every loss."""
    from allometry.models import loss_triton as module

    monkeypatch.setattr(module, "BLOCK", 16)  # several blocks in a row of 61, the last one short

    def chosen(logits_cv):
        return module if module.takes(logits_cv) else None

    monkeypatch.setattr(losses, "row_kernels", chosen)
    monkeypatch.setattr("allometry.models.vocabulary.row_kernels", chosen)
    return module


@inside
@pytest.mark.parametrize(("logit_scale", "z_loss"), OPTIONS)
def test_equals_the_twin_in_fp64(kernels, logit_scale, z_loss, monkeypatch):
    def never(*_):
        raise AssertionError("torch computed it")

    monkeypatch.setattr("allometry.models.loss.softmax_gradient_", never)
    options = {"logit_scale": logit_scale, "z_loss": z_loss}
    expected = results(reference_cross_entropy, *example(torch.float64), **options)
    got = results(linear_cross_entropy, *example(torch.float32), chunk_tokens=8, **options)
    for some, other in zip(got, expected, strict=True):
        assert relative(some, other) < 1e-6


@inside
@pytest.mark.parametrize(("logit_scale", "z_loss"), OPTIONS)
def test_gradient_of_half_logits_is_rounded_once(kernels, logit_scale, z_loss):
    torch.manual_seed(0)
    logits = torch.randn(5, 61).bfloat16()
    targets = torch.tensor([3, IGNORE, 60, 0, 17])
    exact = logits.double()
    losses.softmax_gradient_(exact, targets, logit_scale, z_loss)
    kernels.gradient_(logits, targets, logit_scale, z_loss, IGNORE)
    assert float((logits.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())
    assert not logits[1].any()


class Alone:
    """One of two parts, whose exchanges return the other part's results."""

    def __init__(self, first, columns, other):
        self.first, self.columns, self._other = first, columns, list(other)

    def max_(self, values):
        torch.maximum(values, self._other[0], out=values)

    def sum_(self, values):
        values += self._other[1]


@inside
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(("logit_scale", "z_loss"), OPTIONS)
def test_a_part_of_the_vocabulary(kernels, logit_scale, z_loss, part):
    torch.manual_seed(0)
    whole = torch.randn(5, 61, dtype=torch.float64)
    targets = torch.tensor([3, IGNORE, 60, 0, 40])
    expected = whole.clone()
    nll, penalty = losses.softmax_gradient_(expected, targets, logit_scale, z_loss)
    cuts = [slice(0, 31), slice(31, 61)]
    mine, other = whole[:, cuts[part]].float(), whole[:, cuts[1 - part]] * logit_scale
    largest = whole.amax(1) * logit_scale
    own = targets - cuts[1 - part].start
    here = (own >= 0) & (own < other.shape[1])
    target = other.gather(1, own.where(here, 0)[:, None])[:, 0].where(here, 0.0)
    sums = (other - largest[:, None]).exp().sum(1)
    told = (other.amax(1).float(), torch.stack([sums, target]).float())
    softmax = SharedSoftmax(Alone(cuts[part].start, 31, told))
    got_nll, got_penalty = softmax.gradient_(mine, targets, logit_scale, z_loss)
    assert relative(mine, expected[:, cuts[part]]) < 1e-6
    assert relative(got_nll, nll) < 1e-6
    assert float(got_penalty) == pytest.approx(float(penalty), rel=1e-6)


@inside
def test_wide_logits_are_left_to_torch(kernels):
    assert not kernels.takes(torch.zeros(2, 3, dtype=torch.float64))
