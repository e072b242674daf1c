"""Figures of a run, and the tables that the documentation makes of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_forward_inf.evaluation.figures import as_markdown, save_figures, short

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {
    "forward_inf": {"lds": 0.7654, "lds_low": 0.7, "lds_high": 0.8, "seconds": 12.34, "mrr": 1.0, "mrr_se": 0.01},
    "bm25": {"lds": -0.0312, "lds_low": -0.1, "lds_high": 0.05, "seconds": None, "mrr": "not run"},
}


def test_a_table_has_intervals_and_errors_in_the_cells_of_their_figures(tmp_path: Path) -> None:
    made = save_figures(tmp_path / "figures.json", ROWS, command="python x.py", note="40 queries.")
    assert json.loads((tmp_path / "figures.json").read_text()) == made
    assert as_markdown(made).splitlines() == [
        "| | lds | seconds | mrr |",
        "| --- | --- | --- | --- |",
        "| **Forward-INF** | .765 (.700 - .800) | 12.3 | 1.00 (.010) |",
        "| BM25 | -.031 (-.100 - .050) | | not run |",
        "",
        f"`python x.py`, {made['date']}, {made['machine']}. 40 queries.",
    ]


def test_columns_are_chosen_and_titled(tmp_path: Path) -> None:
    made = save_figures(tmp_path / "figures.json", ROWS, columns={"lds": "LDS", "mrr": "MRR"})
    assert as_markdown(made).splitlines()[0] == "| | LDS | MRR |"
    assert as_markdown(made, ["mrr"], ["bm25"]).splitlines()[:3] == [
        "| | MRR |",
        "| --- | --- |",
        "| BM25 | not run |",
    ]
    with pytest.raises(KeyError, match="no column recall"):
        as_markdown(made, ["recall"])


def test_a_figure_that_is_not_a_number_is_an_empty_cell(tmp_path: Path) -> None:
    made = save_figures(tmp_path / "figures.json", {"bm25": {"lds": float("nan")}, "random": {"lds": 0.5}})
    assert as_markdown(made).splitlines()[2:4] == ["| BM25 | |", "| random | .500 |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.64449, ".644"), (-0.03, "-.030"), (0.99961, "1.00"), (1.2886, "1.29"), (23.94, "23.9"), (1200.4, "1,200"),
     (7, "7"), (0.0, ".000"), (10.04, "10.0"), (300.0, "300")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert short(value) == text


def test_the_tables_of_the_documentation_are_those_of_the_figures() -> None:
    ended = subprocess.run([sys.executable, DOCS / "make_results.py", "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_file_of_figures_is_shown_on_a_page() -> None:
    named = {name for page in DOCS.rglob("*.md") for name in re.findall(r"<!-- figures: (\S+)", page.read_text())}
    assert named == {path.stem for path in (DOCS / "results" / "figures").glob("*.json")}
