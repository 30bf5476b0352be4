"""Faults that change nothing that could be seen: by file and line after, with the reason."""

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
    ("models/loss.py", "return total, (nll_T)"): "in the plain twin, which tests alone call",
    (
        "parallel/context.py",
        "torch.zeros(1, device=mesh.device)",
    ): "connects NCCL, on a GPU alone",
}
"""(file, the line with the fault) -> why it computes the same."""


def reason_of(mutant: Mutant) -> str | None:
    """Return why a fault could not be seen; None: it should be."""
    return EQUIVALENT.get((mutant.file, mutant.after))
