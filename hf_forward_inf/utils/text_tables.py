"""Tables of plain text, for logs too: rich, which prints results, would wrap them to a terminal's width."""

from collections.abc import Sequence


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table: the first cell aligned to the left, the others to the right.

    Args:
        cells (`Sequence[str]`): Texts; those wider than their column are not cut.
        widths (`Sequence[int]`): Widths of the columns.
    """
    first, *rest = (
        f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are as wide as their widest cell, the head among the rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(aligned(row, widths) for row in rows)


def number(value: float | None, form: str = ".3f") -> str:
    """Return a figure as text, empty where there is none."""
    return "" if value is None else format(value, form)
