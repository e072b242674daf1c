import re
from datetime import date

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_forward_inf import Attribution
from hf_forward_inf.plan import Plan
from hf_forward_inf.report import write_report

ROWS = {
    "inputs_pretokenized": ["<script>alert(1)</script> in <extra_id_0>", "b", "c"],
    "targets_pretokenized": ["<extra_id_0> <b>Rome</b>", "", ""],
}


def page(tmp_path, scores=((2.0, 1.0, -1.0),), **options):
    queries = Dataset.from_dict(
        {"inputs_pretokenized": ["Q <extra_id_0>?"], "targets_pretokenized": ["<extra_id_0> A&B"]}
    )
    found = Attribution(np.array(scores, dtype=np.float32), queries, Dataset.from_dict(ROWS))
    found.to_html(tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text()


def test_what_comes_from_data_is_escaped(tmp_path):
    html = page(tmp_path, title="<i>t</i>")
    assert html.count("<script") == 1 and "<b>Rome" not in html and "<i>t" not in html  # one of our own
    assert "&lt;script&gt;" in html and "A&amp;B" in html


def test_the_answer_stands_in_its_place_and_rows_in_their_order(tmp_path):
    html = page(tmp_path)
    assert "<mark>&lt;b&gt;Rome&lt;/b&gt;</mark>" in html
    assert re.findall(r'class="score">([^<]+)<', html) == ["2", "1", "-1"]


def test_proponents_and_figures_are_shown_where_they_are_known(tmp_path):
    html = page(tmp_path, proponents=[[1]], metrics={"forward_inf": {"mrr": 0.5}, "bm25": {"recall@10": 0.25}})
    assert html.count(">proponent</span>") == 1
    assert "1 known proponent among" in html
    assert "0.500" in html and "0.250" in html
    assert "known proponent" not in page(tmp_path)


def test_it_is_one_file_that_fetches_nothing(tmp_path):
    assert not re.search(r"""src=|href="(?!#)|url\(|@import""", page(tmp_path))


def test_a_query_without_scores_says_why(tmp_path):
    assert "No scores" in page(tmp_path, scores=((np.nan, np.nan, np.nan),))


def test_it_tells_what_a_score_is(tmp_path):
    assert "loss (in nats) when" in page(tmp_path)
    rows = Dataset.from_dict({"inputs_pretokenized": ["Q"], "targets_pretokenized": ["A"]})
    found = Attribution(np.ones((1, 1), np.float32), rows, rows, config={"measure": "shift"})
    found.to_html(tmp_path / "shift.html")
    assert "prediction for an example when" in (tmp_path / "shift.html").read_text()


def test_only_the_best_are_shown(tmp_path):
    write_report(
        tmp_path / "x.html",
        Attribution(np.zeros((1, 3), np.float32), Dataset.from_dict({"q": [1]}), Dataset.from_dict(ROWS)),
        k=2,
    )
    assert (tmp_path / "x.html").read_text().count('class="rank"') == 2


def test_the_foot_says_what_was_traced_how_and_with_what(tmp_path):
    plan = Plan("full", "it is cheap", queries=1, candidates=3)
    found = Attribution(np.ones((1, 3), np.float32), Dataset.from_dict({"q": [1]}), Dataset.from_dict(ROWS), plan=plan)
    found.to_html(tmp_path / "page.html", about={"model": "me/<b>tiny</b>"}, remarks=["A & B"])
    html = (tmp_path / "page.html").read_text()
    assert "me/&lt;b&gt;tiny" in html and "the finite step on all 3 candidates (it is cheap)" in html
    assert "A &amp; B" in html and str(date.today()) in html


def test_results_for_other_queries_are_not_compared(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    one, two = (Attribution(np.ones((n, 2), np.float32), rows.select(range(n)), rows) for n in (1, 2))
    with pytest.raises(ValueError, match="forward_inf has 2 queries and forward_inf 1"):
        one.to_html(tmp_path / "page.html", compare=[two])


def test_pairs_contrasts_and_pictures_in_conversations_are_shown(tmp_path):
    picture = Image.new("RGB", (4, 4), "red")
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    query = {"messages": [{"role": "user", "content": asked}], "images": [picture], "contrast": "A dog."}
    query["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "A cat."}]})
    pair = {"prompt": "What is this?", "chosen": "It is a cat.", "rejected": "It is a dog."}
    found = Attribution(np.ones((1, 1), np.float32), Dataset.from_list([query]), Dataset.from_list([pair]))
    found.to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "[image] What is it?" in html
    assert "<mark>A cat. rather than A dog.</mark>" in html
    assert "It is a cat. rather than It is a dog." in re.sub("<[^>]+>", "", html)
    assert html.count("data:image/png") == 1
    assert html.count('<svg class="picture pixels"') == 1
    assert "model say this?" in html
