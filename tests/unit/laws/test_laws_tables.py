from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.expressions import Condition, Expression
from allometry.laws.tables import is_table, read_table
from law_data import law_data

CSV = """\
Model Size,Training FLOP,loss,set,D/N
1e6,6e13,4.0,C4,10
2e6,24e13,3.5,C4,10
2e6,48e13,,C4,20
4e6,96e13,3.0,"Pile, all",10
"""
MAPPING = {"N": "Model Size", "C": "Training FLOP", "D": "C/(6*N)"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(CSV)
    return path


def test_json_lines_are_rows_whose_missing_keys_are_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "Runs.JSONL"
    path.write_text('{"N": 1000, "loss": 4, "set": "C4"}\n\n{"loss": 3.5, "N": 2e3, "x": null}\n')
    found = read_table(path, ["N", "loss"])
    np.testing.assert_array_equal(found["N"], [1000, 2000])
    assert found.groups == ("Runs.JSONL:1", "Runs.JSONL:3")
    assert read_table(path, ["N"], where=["set == 'C4'"])["N"].tolist() == [1000]
    with pytest.raises(UserError, match=r"line 3, column 'set': '' is not a finite number"):
        read_table(path, ["set"], where=["N > 1500"])
    path.write_text('{"N": 1}\n[1, 2]\n')
    with pytest.raises(UserError, match="line 2, is no JSON object; mend it"):
        read_table(path, ["N"])


def test_semicolons_separate_cells_where_the_header_has_no_comma(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("N;loss;note\n1e6;3.5;a, b\n2e6;3.25;\n")
    np.testing.assert_array_equal(read_table(path, ["loss"])["loss"], [3.5, 3.25])


@pytest.mark.parametrize("cell", ["3,5", "10,000,000", "10M", "7.5 B", "3.5e3 tokens", "12 %"])
def test_a_number_written_otherwise_is_named_as_such(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "runs.tsv"
    path.write_text(f"N\tloss\n1e6\t3\n{cell}\t3\n")
    with pytest.raises(UserError) as caught:
        read_table(path, ["N"])
    assert f"line 3, column 'N': {cell!r} is no plain number; write it with" in str(caught.value)
    assert "--where" not in str(caught.value), "that would leave out every such row"


@pytest.mark.parametrize("cell", ["inf", "-inf", "nan", "", "diverged"])
def test_what_is_no_finite_number_is_left_out_as_the_message_says(
    tmp_path: Path, cell: str
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"N,loss\n1e6,3\n2e6,{cell}\n")
    with pytest.raises(UserError) as caught:
        read_table(path, ["N", "loss"])
    condition = str(caught.value).partition("as --where '")[2].partition("'")[0]
    assert read_table(path, ["N", "loss"], where=[condition])["N"].tolist() == [1e6]


def test_columns_are_mapped_computed_and_chosen(table: Path) -> None:
    found = read_table(table, ["N", "D", "loss"], mapping=MAPPING, where=["loss < 3.9"])
    np.testing.assert_array_equal(found["N"], [2e6, 4e6])
    np.testing.assert_allclose(found["D"], [2e7, 4e7], rtol=1e-15)
    np.testing.assert_array_equal(found["loss"], [3.5, 3.0])
    np.testing.assert_array_equal(found["C"], [24e13, 96e13])
    assert found.groups == ("runs.csv:3", "runs.csv:5")
    assert found.conventions["N"] == "Model Size of runs.csv"
    assert found.conventions["loss"] == "loss of runs.csv"


def test_names_with_other_signs_are_columns_by_themselves_or_in_backticks(table: Path) -> None:
    mapping = {"N": "`Model Size` * 1", "D": "`Training FLOP`/(6*N)", "M": "D/N"}
    found = read_table(table, ["N", "D", "M"], mapping=mapping)
    np.testing.assert_array_equal(found["M"], [10, 10, 20, 10])  # the column with this name
    np.testing.assert_allclose(found["D"], [1e7, 2e7, 4e7, 4e7], rtol=1e-15)
    mapping["M"] = "(D/N)"
    np.testing.assert_allclose(read_table(table, ["M"], mapping=mapping)["M"], [10, 10, 20, 10])


def test_a_mapping_may_scale_the_column_of_its_own_name(table: Path) -> None:
    found = read_table(table, ["loss"], mapping={"loss": "loss / 2"}, where=["`D/N` == 10"])
    np.testing.assert_array_equal(found["loss"], [2.0, 1.75, 1.5])


def test_text_is_compared_in_quotes(table: Path) -> None:
    found = read_table(table, ["N"], mapping=MAPPING, where=["set != 'C4'"])
    np.testing.assert_array_equal(found["N"], [4e6])
    found = read_table(table, ["N"], mapping=MAPPING, where=["set == 'C4'", "C >= 24e13"])
    np.testing.assert_array_equal(found["N"], [2e6, 2e6])


def test_a_column_says_whose_rows_are(table: Path) -> None:
    found = read_table(table, ["N"], mapping=MAPPING, group="set")
    assert found.groups == ("C4", "C4", "C4", "Pile, all")


def test_files_of_any_kind_are_read_together(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "more.tsv.gz"
    other.write_bytes(gzip.compress("\ufeffloss\tModel Size\n\n2.5\t8e6\n".encode()))
    found = read_table([table, other], ["N"], mapping={"N": "Model Size"})
    np.testing.assert_array_equal(found["N"], [1e6, 2e6, 2e6, 4e6, 8e6])
    assert found.groups[-1] == "more.tsv.gz:3"
    assert is_table(other)
    assert not is_table(tmp_path)


@pytest.mark.parametrize(
    ("names", "mapping", "where", "words"),
    [
        (["loss"], {}, [], r"runs\.csv, line 4, column 'loss': '' is not a finite number"),
        (["N"], {}, [], r"is called 'N' \(--map N=COLUMN\).*Model Size, Training FLOP"),
        (["N"], {"N": "Model"}, [], r"is called 'Model' \(--map N=Model\)"),
        (["N"], {"N": "set"}, [], r"line 2, column 'set': 'C4' is not"),
        (
            ["N"],
            {"N": "Model Size * 2"},
            [],
            r"--map N 'Model Size \* 2' cannot be read.*backticks",
        ),
        (["N"], {"N": "loss.real"}, [], "more than arithmetic"),
        (["N"], {"N": "loss()"}, [], "more than arithmetic"),
        (["N"], {"N": "loss % 2"}, [], "more than arithmetic"),
        (["N"], {"N": "True"}, [], "more than arithmetic"),
        (["N"], {"N": "1j"}, [], "more than arithmetic"),
        (["N"], {"N": ""}, [], "cannot be read"),
        (["N"], {"N": "D", "D": "N"}, [], "needs itself by way of D"),
        (["N"], {"N": "`Model Size`/0"}, [], r"line 2: N = `Model Size`/0 is not a finite"),
        (["loss"], {}, ["loss < 1"], r"no row is left by --where 'loss < 1'"),
        (["loss"], {}, ["loss"], "not one comparison"),
        (["loss"], {}, ["loss is 2"], "something else than <"),
        (["loss"], {}, ["loss in 2"], "after in stands a list in parentheses"),
        (["loss"], {}, ["loss in ()"], "after in stands a list in parentheses"),
        (["loss"], {}, ["loss < 1 or loss"], "not one comparison, or several"),
        (["loss"], {}, ["log(loss, 2) < 1"], "more than arithmetic"),
        (["loss"], {}, ["open('x') == 1"], "more than arithmetic"),
        (["loss"], {}, ["set < 'C4' or loss > 1"], "by == or !="),
        (["loss"], {}, ["set < 'C4'"], "by == or !="),
        (["loss"], {}, ["'C4' == 'C4'"], "by == or !="),
        (["loss"], {}, ["set == C4"], r"is called 'C4' \(--where 'set == C4'\)"),
    ],
)
def test_what_cannot_be_had_is_said(
    table: Path, names: list[str], mapping: dict[str, str], where: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        read_table(table, names, mapping=mapping, where=where)


def test_an_unknown_group_is_said(table: Path) -> None:
    with pytest.raises(UserError, match=r"is called 'run' \(--group\)"):
        read_table(table, ["N"], mapping=MAPPING, group="run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n", "no row below its header"),
        ("a,a\n1,2\n", "two columns called 'a'"),
        ("a,b\n1,2\n1\n", "line 3, has 1 cells where the header has 2"),
        ('a,b\n"1"2,3\n', "line 2, is not CSV"),
    ],
)
def test_damaged_files_are_said(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_table(path, ["a"])


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        read_table(tmp_path / "x.csv", ["a"])
    (tmp_path / "x.xls").write_text("a")
    with pytest.raises(
        UserError, match=r"save it as CSV or JSON Lines under a name that ends in one of \.csv"
    ):
        read_table(tmp_path / "x.xls", ["a"])
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "x.csv", ["a"])


def test_arithmetic_is_pythons() -> None:
    columns = {"a": np.array([2.0, 3.0]), "b": np.array([4.0, 5.0])}
    for text in ("-a + b*2 - 1", "a**-b/3", "(a - b)**2", "2**3**a"):
        found = Expression.parse(text, "--map x").evaluate(columns.__getitem__)
        np.testing.assert_allclose(found, eval(text, {}, columns), rtol=1e-15)
    huge = Expression.parse("9**9**9**9", "--map x").evaluate(columns.__getitem__)
    assert np.isinf(huge), "numbers are floats: no integer that takes for ever"
    assert Expression.parse("b + `c d` + b", "--map x").names == ("b", "c d")


def test_a_missing_number_meets_no_condition() -> None:
    columns = {"a": np.array([np.nan, 1.0])}
    for text in ("a < 5", "a != 5"):
        met = Condition.parse(text).evaluate(columns.__getitem__, lambda name: np.array([""]))
        np.testing.assert_array_equal(met, [False, True])


def test_conditions_are_joined_and_read_lists_and_functions() -> None:
    columns = {"N": np.array([1e6, 1e7, 1e8, np.nan]), "loss": np.array([4.0, 3.0, 2.0, 1.0])}
    cells = {"set": np.array(["C4", "Pile", "books", "C4"])}

    def met(text: str) -> list[int]:
        found = Condition.parse(text).evaluate(columns.__getitem__, cells.__getitem__)
        return np.flatnonzero(found).tolist()

    assert met("set in ('C4', 'Pile')") == [0, 1, 3]
    assert met("set not in ['C4', 'Pile']") == [2]
    assert met("N in (1e6, 1e8)") == [0, 2]
    assert met("N not in (1e6, 1e8)") == [1]  # a missing number matches neither
    assert met("set == 'C4' or loss < 2.5") == [0, 2, 3]
    assert met("set == 'C4' and loss > 2.5") == [0]
    assert met("loss < 1.5 or loss > 2.5 and set != 'C4'") == [1, 3]
    assert met("(loss < 1.5 or loss > 2.5) and set != 'C4'") == [1]
    assert met("not (N < 1e7 or loss < 2.5)") == [1]
    assert met("not N < 5e6") == [1, 2]
    assert met("1e6 < N <= 1e8") == [1, 2]
    assert met("not 1e6 < N <= 1e7") == [0, 2]
    assert met("log10(N) >= 7 and sqrt(loss) < 1.5") == [2]
    assert met("log2(loss) == 1 or abs(loss - 5) < exp(0) + 0.5") == [0, 2]
    assert set(Condition.parse("log(log) > 1 or `a b` in (1, 2)").names) == {"log", "a b"}


def test_the_points_behind_chinchilla_are_240() -> None:
    path = law_data("chinchilla_epoch") / "svg_extracted_data.csv"
    mapping = {"N": "Model Size", "D": "`Training FLOP`/(6*N)"}
    found = read_table(path, ["N", "D", "loss"], mapping=mapping, where=["loss < 3.44"])
    assert len(found) == 240
    assert found["D"].min() > 1e8


def test_files_of_one_name_keep_their_rows_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "runs.csv" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("N\n1\n2\n")
    assert len(set(read_table(paths, ["N"]).groups)) == 4
    with pytest.raises(UserError, match="given twice"):
        read_table([paths[0], paths[0].parent / "../a/runs.csv"], ["N"])


@pytest.mark.parametrize("cell", ["0", "-1.5"])
def test_what_must_be_positive_is_named_by_its_line(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"N,loss,run\n1,3.0,a\n2,{cell},b\n")
    assert len(read_table(path, ["N", "loss"])) == 2
    with pytest.raises(UserError, match=rf"runs\.csv, line 3: loss is {cell}, and .*positive"):
        read_table(path, ["N", "loss"], group="run", positive=("loss",))
    with pytest.raises(UserError, match=rf"line 3: y is {cell} \(y=loss\)"):
        read_table(path, ["N"], mapping={"y": "loss"}, positive=("y",))
    assert len(read_table(path, ["loss"], where=["loss > 0"], positive=("loss",))) == 1
