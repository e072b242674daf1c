from hf_forward_inf.utils.text_tables import aligned, number, text_table


def test_columns_are_as_wide_as_their_widest_cell_and_figures_end_at_their_right():
    rows = [
        ["", "mrr", "passes"],
        ["forward_inf", number(0.5), number(12.25, ".1f")],
        ["bm25", number(1), number(None)],
    ]
    expected = """\
               mrr  passes
forward_inf  0.500    12.2
bm25         1.000"""
    assert text_table(rows) == expected


def test_a_cell_wider_than_its_column_is_not_cut():
    assert aligned(["influence", "0.1"], [4, 5]) == "influence    0.1"
