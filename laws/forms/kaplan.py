"""Kaplan's laws: of finished models, and of a model during training."""

# S parameter sets, n rows

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.forms.base import Form, LogForm, Parameter, Predictions, Values, Variable
from allometry.laws.forms.dense import LOSS, D
from allometry.laws.observations import Observations

NON_EMBEDDING = Variable("N", "parameters", "non-embedding parameters")

# Constants of the paper, from memory and never compared with it, so they are not published sets:
# N_c 8.8e13, α_N .076, D_c 5.4e13, α_D .095; of the trajectory N_c 6.5e13, α_N .077, S_c 2.1e3, α_S
# .76; B_crit = 2e8 tokens · L^(-1/.21).


class Kaplan(LogForm):
    """L = ((N_c/N)^(α_N/α_D) + D_c/D)^α_D, without irreducible loss."""

    name = "kaplan"
    equation = "loss = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D"
    source = "Kaplan et al., arXiv 2001.08361, equation 1.5"
    inputs = (NON_EMBEDDING, D)
    target = LOSS
    parameters = (
        Parameter("N_c", "parameters", 0.0, np.inf, (1e6, 1e18), "log"),
        Parameter("D_c", "tokens", 0.0, np.inf, (1e6, 1e18), "log"),
        Parameter("alpha_N", "1", 1e-4, 5.0, (0.02, 1.0), "log"),
        Parameter("alpha_D", "1", 1e-4, 5.0, (0.02, 1.0), "log"),
    )
    valid = "the paper: 768 to 1.5B non-embedding parameters, 22M to 23B tokens"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_d = prepared
        ratio = values["alpha_N"] / values["alpha_D"]
        part_n = np.exp(ratio * (np.log(values["N_c"]) - log_n))
        part_d = np.exp(np.log(values["D_c"]) - log_d)
        return np.asarray(np.exp(values["alpha_D"] * np.log(part_n + part_d)))


class KaplanTrajectory(LogForm):
    """L = (N_c/N)^α_N + (S_c/S_min)^α_S, after S_min steps of a batch far above the critical batch.

    Rows have S_min, or S, B and B_crit (tokens of the batch and of the critical batch), from which
    S_min = S/(1 + B_crit/B). The law ``critical_batch`` gives B_crit at a loss.
    """

    name = "kaplan_trajectory"
    equation = "loss = (N_c/N)^alpha_N + (S_c/S_min)^alpha_S, S_min = S/(1+B_crit/B)"
    source = "Kaplan et al., arXiv 2001.08361, equation 1.6; Su et al., arXiv 2403.06563"
    inputs = (
        NON_EMBEDDING,
        Variable("S_min", "steps", "least steps to the loss: S/(1+B_crit/B), after warm-up"),
    )
    target = LOSS
    parameters = (
        Parameter("N_c", "parameters", 0.0, np.inf, (1e6, 1e18), "log"),
        Parameter("S_c", "steps", 0.0, np.inf, (1.0, 1e6), "log"),
        Parameter("alpha_N", "1", 1e-4, 5.0, (0.02, 1.0), "log"),
        Parameter("alpha_S", "1", 1e-4, 5.0, (0.1, 2.0), "log"),
    )
    valid = "one data set and tokenizer, steps after warm-up, an undecayed learning rate"

    def prepare(self, observations: Observations) -> Any:
        """Return ln N and ln S_min [n]."""
        if "S_min" not in observations.columns:
            observations = with_minimum_steps(observations)
        return super().prepare(observations)

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_s = prepared
        part_n = np.exp(values["alpha_N"] * (np.log(values["N_c"]) - log_n))
        part_s = np.exp(values["alpha_S"] * (np.log(values["S_c"]) - log_s))
        return np.asarray(part_n + part_s)


def with_minimum_steps(observations: Observations) -> Observations:
    """Return the rows with a column S_min = S/(1 + B_crit/B) (arXiv 2001.08361, equation 5.5).

    Raises UserError: S, B or B_crit is missing.
    """
    missing = [name for name in ("S", "B", "B_crit") if name not in observations.columns]
    if missing:
        raise UserError(
            f"kaplan_trajectory needs S_min, or S, B and B_crit to find it, and the observations "
            f"have no {', '.join(missing)}; map columns to them"
        )
    steps, batch, critical = (observations[name] for name in ("S", "B", "B_crit"))
    columns = {**observations.columns, "S_min": steps / (1.0 + critical / batch)}
    return replace(observations, columns=columns)


FORMS: tuple[Form, ...] = (Kaplan(), KaplanTrajectory())
