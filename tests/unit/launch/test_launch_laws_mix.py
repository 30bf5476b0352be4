"""``allometry mix``: the best mixture, D-CPT's ratio and CMR's, from fits, tables and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from allometry.laws.mixing import optimal_mixture
from fake_runs import fake_run
from law_data import law_data
from shell import Shell

QUICK = ("--starts", 8, "--bootstraps", 30, "--hold-out", "none")
SLOPES = {"docs": (-2.5, 0.3, -0.5), "code": (0.2, -2.0, -0.4)}
DOMAINS = ("web", "source", "books")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


class Exact:
    """Mixing law with its true coefficients."""

    def __init__(self, slopes: tuple[float, ...]) -> None:
        self.slopes = np.array(slopes)

    def predict(self, observations: object) -> np.ndarray:
        shares = np.stack([observations[name] for name in DOMAINS])  # type: ignore[index]
        return 1.5 + np.exp(self.slopes @ shares)


@pytest.fixture
def fits(shell: Shell, tmp_path: Path) -> dict[str, Path]:
    """Return fits of mixing laws of two validation losses over three domains."""
    rng = np.random.default_rng(0)
    shares_nK = rng.dirichlet(np.ones(3), 40)
    lines = [",".join([*DOMAINS, *SLOPES])]
    for shares_K in shares_nK:
        losses = [
            (1.5 + np.exp(np.dot(t, shares_K))) * (1 + 1e-3 * rng.standard_normal())
            for t in SLOPES.values()
        ]
        lines.append(",".join(f"{value:.12g}" for value in [*shares_K, *losses]))
    table = tmp_path / "mixtures.csv"
    table.write_text("\n".join(lines))
    files = {}
    for name in SLOPES:
        files[name] = tmp_path / f"{name}.json"
        law = f"mixing_exponential:{','.join(DOMAINS)}"
        shell("fit", law, table, "--map", f"loss={name}", *QUICK, "--out", files[name])
    return files


def test_the_best_mixture_has_intervals_that_hold_the_true_one(
    shell: Shell, fits: dict[str, Path]
) -> None:
    true = optimal_mixture({name: Exact(t) for name, t in SLOPES.items()}, DOMAINS)
    facts = shell.json("mix", "best", *fits.values())
    for name, share in true.shares.items():
        one = facts["shares"][name]
        assert one["share"] == pytest.approx(share, abs=0.03)
        assert one["low"] - 1e-3 <= share <= one["high"] + 1e-3
    assert facts["loss"] == pytest.approx(true.loss, rel=2e-3)
    assert facts["agreeing"] == facts["starts"] == 16
    text = shell("mix", "best", *fits.values())
    assert re.search(r"^web +0\.\d{4} +0\.\d+ to 0\.\d+ ", text, re.MULTILINE), text
    assert "16 of 16 searches agree on it" in text


def test_weights_and_bounds_move_the_best_mixture(shell: Shell, fits: dict[str, Path]) -> None:
    both = shell.json("mix", "best", *fits.values())["shares"]["web"]["share"]
    weighed = ("mix", "best", f"d={fits['docs']}", f"c={fits['code']}", "--weight", "d=5")
    assert shell.json(*weighed)["shares"]["web"]["share"] > both + 0.05
    bound = shell.json("mix", "best", *fits.values(), "--most", "web=0.2", "--least", "books=0.3")
    shares = {name: one["share"] for name, one in bound["shares"].items()}
    assert shares["web"] <= 0.2 + 1e-9
    assert shares["books"] >= 0.3 - 1e-9
    assert sum(shares.values()) == pytest.approx(1.0)


def test_shares_beyond_those_that_were_run_are_not_searched(shell: Shell, tmp_path: Path) -> None:
    """A law fitted to runs with at most 40 % of a cannot predict 100 %."""
    lines = ["a,b,c,loss"]
    for a, b in ((0.1, 0.3), (0.2, 0.2), (0.3, 0.5), (0.4, 0.3), (0.25, 0.65), (0.35, 0.1)):
        loss = 1.5 + np.exp(-2 * a - b)
        lines.append(f"{a},{b},{1 - a - b:.6f},{loss}")
    table, file = tmp_path / "few.csv", tmp_path / "few.json"
    table.write_text("\n".join(lines))
    shell("fit", "mixing_exponential:a,b,c", table, *QUICK, "--out", file)
    facts = shell.json("mix", "best", file)
    assert facts["shares"]["a"]["share"] == pytest.approx(0.4)
    assert any("a is at the largest share that was run, 0.4" in w for w in facts["warnings"])
    beyond = shell.json("mix", "best", file, "--most", "a=0.9")
    assert beyond["shares"]["a"]["share"] == pytest.approx(0.8)  # b and c had at least 0.1
    assert any("a=0.8 is outside of the fitted range" in w for w in beyond["warnings"])


def chemistry(shell: Shell, folder: Path) -> dict[str, Path]:
    """Return fits to the ratios of 2406.01375's table 5, by the law in r alone."""
    path = law_data("published_tables") / "published.json"
    table = json.loads(path.read_text(encoding="utf-8"))["dcpt_table5_chemistry_qwen1.5-1.8B_D10B"]
    files = {}
    for name, key, share in (("general", "L_general", "1-r_d"), ("domain", "L_domain", "r_d")):
        rows = [f"1.8e9,1e10,{r},{loss}" for r, loss in zip(table["r_d"], table[key], strict=True)]
        source = folder / f"{name}.csv"
        source.write_text("\n".join(["N,D,r_d,loss", *rows]))
        files[name] = folder / f"{name}.json"
        fixed = [f"--fix={text}" for text in ("A=0", "alpha=0.3", "B=0", "beta=0.3", "eta=1")]
        law = ("fit", "d_cpt", source, "--map", f"r={share}", *fixed, "--starts", 32)
        shell(*law, "--bootstraps", 20, "--hold-out", "none", "--out", files[name])
    files["start"], files["rise"] = table["L_g0"], 100 * table["T"]
    files["published"] = table["published_r_d"]
    return files


def test_the_published_ratio_for_chemistry(shell: Shell, tmp_path: Path) -> None:
    """2406.01375, usage 1: 1.8B, 10B tokens of chemistry, at most 3 % more general loss: .924."""
    found = chemistry(shell, tmp_path)
    asked = ("mix", "ratio", "--general", found["general"], "--domain", found["domain"])
    asked = (*asked, "--start", found["start"], "--rise", found["rise"], "--with", "N=1.8e9")
    facts = shell.json(*asked, "--with", "D=1e10")
    assert facts["share"]["value"] == pytest.approx(found["published"], abs=0.002)
    assert facts["share"]["low"] <= facts["share"]["value"] <= facts["share"]["high"]
    assert facts["domain_loss"] == pytest.approx(1.7291, abs=0.001)
    assert facts["bounded"]
    losses = [one["domain"] for one in facts["frontier"]]
    assert losses == sorted(losses, reverse=True)
    text = shell(*asked, "--with", "D=1e10")
    assert "largest share of the domain 0.92" in text
    assert "--with D is missing" in shell.refusal(*asked)
    more = ("--with", "D=1e10", "--with", "k=1")
    assert "--with k is read by no fit" in shell.refusal(*asked, *more)
    tight = shell.refusal(*asked, "--with", "D=1e10", "--rise", "0", "--start", "1")
    assert "the general loss is predicted as" in tight


def rise(share: float, tokens: np.ndarray) -> np.ndarray:
    return 0.16 * share * (tokens / 0.2e9) ** 0.25 - 0.02


RATIOS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)


@pytest.fixture
def shares_table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["share,tokens,general"]
    for share in RATIOS:
        tokens = np.geomspace(0.2e9, 10e9, 40)
        losses = 2.86 + rise(share, tokens) + 3e-4 * rng.standard_normal(40)
        lines += [f"{share},{t},{loss}" for t, loss in zip(tokens, losses, strict=True)]
    path = tmp_path / "shares.csv"
    path.write_text("\n".join(lines))
    return path


MAPPED = ("--map", "r=share", "--map", "D=tokens", "--map", "dloss=general-2.86")


@pytest.mark.slow
def test_the_critical_ratio_of_a_later_horizon(shell: Shell, shares_table: Path) -> None:
    """All of 2407.17467 on synthetic curves: rises by share, ratios by horizon, a later one."""
    asked = ("mix", "critical", shares_table, *MAPPED, "--tokens", "5e9,20e9")
    facts = shell.json(*asked, "--bootstraps", 10)
    for one in facts["ratios"]:
        exact = 0.07 / (0.16 * (one["tokens"] / 0.2e9) ** 0.25)
        assert one["ratio"] == pytest.approx(exact, abs=0.01)
        assert one["low"] <= one["high"]
        assert one["high"] - one["low"] < 0.05
    assert facts["shares"] == list(RATIOS)
    assert any("2e+10 tokens are outside of the runs'" in warning for warning in facts["warnings"])
    text = shell(*asked, "--bootstraps", 0)
    assert re.search(r"^2e\+10 +0\.1\d+ +- +law$", text, re.MULTILINE), text


def test_what_has_no_critical_ratio_is_one_sentence(shell: Shell, shares_table: Path) -> None:
    asked = ("mix", "critical", shares_table, *MAPPED, "--tokens", "5e9", "--bootstraps", 0)
    for options, words in (
        (("--bound", "0.0001"), "the general loss is predicted to rise by"),
        (("--bound", "5"), "the bound decides at 0 of 8 horizons"),
        (("--where", "share < 0.15"), "must be two or more"),
        (("--where", "tokens < 2.5e8"), "at a domain share of 0.1: cmr_general has 5 parameters"),
        (("--tokens", "-1"), "must be positive"),
    ):
        assert re.search(words, shell.refusal(*asked, *options)), options


def test_curves_of_runs_have_a_critical_ratio(shell: Shell, tmp_path: Path) -> None:
    """The general loss (of code) after D tokens rises with the share of web."""
    for share in (0.25, 0.5, 0.75):
        sources = [
            {"name": name, "train": name, "validation": f"{name}.val", "weight": weight}
            for name, weight in (("web", share), ("code", 1 - share))
        ]
        changes = (f"data.sources={json.dumps(sources)}", "training.total_steps=160")

        def law(_: float, D_T: np.ndarray, of: float = share) -> np.ndarray:
            return 3.16 + 0.16 * of * (D_T / 2e3) ** 0.25 - 0.02  # code's held-out loss is 0.3 less

        fake_run(tmp_path / f"s{share}", *changes, law=law)
    asked = ("mix", "critical", tmp_path, "--curves", "--loss", "validation/code")
    mapped = ("--map", "r=r/web", "--map", "dloss=loss - 2.86")
    facts = shell.json(*asked, *mapped, "--bound", "0.12", "--tokens", "2e4,4e4")
    assert facts["shares"] == [0.25, 0.5, 0.75]
    for one in facts["ratios"]:
        exact = 0.14 / (0.16 * (one["tokens"] / 2e3) ** 0.25)
        assert one["ratio"] == pytest.approx(exact, abs=0.01)
    assert any("no intervals: a bootstrap draws groups" in one for one in facts["warnings"])


def test_what_mix_cannot_do_is_one_sentence(
    shell: Shell, fits: dict[str, Path], tmp_path: Path
) -> None:
    docs, code = fits.values()
    other = tmp_path / "n.csv"
    other.write_text("\n".join(["B,S", *(f"{n},{10 + 9 / n}" for n in range(1, 12))]))
    plain = tmp_path / "plain.json"
    shell("fit", "steps_to_loss", other, *QUICK[:2], "--bootstraps", 0, "--hold-out", "none",
          "--out", plain)  # fmt: skip
    for arguments, words in (
        (("best", docs, docs), "two fits are called docs; name them"),
        (("best", docs, plain), "plain is a fit of steps_to_loss, which reads no shares"),
        (("best", docs, "--weight", "x=1"), "--weight x is none of the fits; they are docs"),
        (("best", docs, "--with", "N=1"), "--with N: no fit reads it"),
        (("best", docs, "--most", "x=0.2"), "most names 'x', which is none of the domains"),
        (("best", docs, code, "--most", "web=0.1", "--most", "source=0.1", "--most", "books=0.1"),
         "no mixture of web, source, books"),
        (("best", "nowhere.json"), "nowhere.json: cannot read the fit"),
        (("ratio", "--general", docs, "--domain", code, "--start", 2),
         "give a fit of the loss by r"),
    ):  # fmt: skip
        sentence = shell.refusal("mix", *arguments)
        assert words in sentence, sentence
