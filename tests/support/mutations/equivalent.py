"""Faults without an observable effect, by file and changed line, with the reason."""

from __future__ import annotations

from mutations.choose import Mutant

EQUIVALENT: dict[tuple[str, str], str] = {
    ("optim/schedule.py", "return 2.0"): "a constant schedule has no decay to ask for",
    (
        "optim/sphere.py",
        "turned: Tensor = radius * moved / (moved.double().norm())",
    ): "a matrix of zeros is refused when its radius is measured",
    (
        "optim/optimizer.py",
        'group["fused"] = False  # load_state_dict then leaves ``step`` on the device',
    ): "on a CPU the device is the host",
    (
        "models/attention_packed.py",
        "octave = (lengths + 1).clamp(min=1).log2().floor().long()",
    ): "powers of two and their predecessors alone differ, and all round to the power",
    (
        "scaling/parameterizations/base.py",
        "adjusted = Fraction(2)",
    ): "a constant that cancels in the quotient of two such numbers",
    (
        "models/loss.py",
        "x_TD, (weight_VD), handle, targets_T, *options, gradient_sum",
    ): "an edge of the graph through which no gradient comes",
    ("models/loss.py", "return total, (nll_T)"): "in the plain twin, which tests alone call",
    (
        "parallel/hdp/orders.py",
        "is_last=True,",
    ): "of stages that compute nothing the order alone is read",
    (
        "parallel/pipeline.py",
        'total = torch.empty((), dtype=wide, device="meta", requires_grad=False)',
    ): "the last stage sends its output to nobody",
    (
        "parallel/zero.py",
        'overlap = mesh.device.type == "cuda" and mesh.pp.size != 1',
    ): "on a CPU nothing overlaps",
    (
        "parallel/context.py",
        "torch.zeros(1, device=mesh.device)",
    ): "connects NCCL, on a GPU alone",
}
"""(file, line with the fault) -> reason why the result is the same."""


def reason_of(mutant: Mutant) -> str | None:
    """Return why a fault has no observable effect, or None if tests should detect it."""
    return EQUIVALENT.get((mutant.file, mutant.after))
