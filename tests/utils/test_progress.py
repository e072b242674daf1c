import pytest

from hf_forward_inf import ForwardInf
from hf_forward_inf.utils import progress as bars
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.progress import counting, progress, shown
from tests.helpers.line import points


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Bars are shown from the first unit on."""
    monkeypatch.setattr(bars, "DELAY", 0)
    monkeypatch.setattr(bars, "are_progress_bars_disabled", lambda: False)


def last_lines(capsys):
    return [line.strip() for line in capsys.readouterr().err.replace("\n", "\r").split("\r") if line.strip()]


def test_a_bar_counts_units_and_names_them(capsys):
    assert list(shown("abc", "reading", 3, "rows")) == ["a", "b", "c"]
    lines = last_lines(capsys)
    assert lines[0].startswith("reading:   0%") and "0/3 rows" in lines[0]
    assert lines[-1].startswith("reading: 100%") and "3/3 rows" in lines[-1]


def test_work_within_other_work_has_no_bar_of_its_own_but_is_named(capsys, monkeypatch):
    notes = []
    name = bars._Bar.name
    monkeypatch.setattr(bars._Bar, "name", lambda self, part: (notes.append((part, self.bar.n)), name(self, part)))
    with progress("tracing", 4, "queries"):
        for _ in shown(range(2), "fitting", 2, "rows"):
            pass
        with counting(4), progress("losses", 10, "rows") as advance:
            advance(5)
            advance(5)
    assert notes == [
        ("fitting, 0/2 rows", 0), ("fitting, 1/2 rows", 0), ("fitting, 2/2 rows", 0), ("", 0),
        ("losses, 0/10 rows", 0), ("losses, 5/10 rows", 0), ("losses, 10/10 rows", 2), ("", 4), ("", 4),
    ]  # fmt: skip
    assert all(line.startswith("tracing") for line in last_lines(capsys))


def test_what_is_cached_counts_as_done_and_nothing_counts_twice(capsys):
    with progress("tracing", 4, "queries"):
        with counting(2):  # nothing is computed
            pass
        assert bars._open[-1].bar.n == 2
        with counting(2, parts=2):
            for _ in range(3):  # one more than there should be
                list(shown(range(2), "losses", 2, "rows"))
        assert bars._open[-1].bar.n == 4
    assert not bars._open


def test_a_bar_that_fails_is_closed(capsys):
    with pytest.raises(ValueError), progress("tracing", 4, "queries"):
        raise ValueError
    assert not bars._open


def test_the_number_of_units_may_be_unknown(capsys):
    with progress("tracing", None, "rows", done=100) as advance:
        advance(1000)
    assert last_lines(capsys)[-1].startswith("tracing: 1,100 rows [")


def test_nothing_is_shown_where_bars_are_disabled(capsys, monkeypatch):
    monkeypatch.undo()
    with progress_bars(False), progress("tracing", 4, "queries") as advance, counting(4):
        advance(4)
    assert capsys.readouterr().err == ""


def test_a_trace_has_one_bar_that_counts_queries_to_the_end(line, capsys, monkeypatch):
    parts = []
    monkeypatch.setattr(bars._Bar, "name", lambda self, part: parts.append(part))
    rows = points(((3, 1), 0), ((1, -3), 7.5), ((2, 2), 1))
    ForwardInf(adapter=line, strategy="full").trace(rows, rows)
    lines = last_lines(capsys)
    assert all(line.startswith("tracing") for line in lines)
    assert "losses, 3/3 rows" in parts and "base losses, 3/3 rows" in parts
    assert "3/3 queries" in lines[-1] and "100%" in lines[-1]
