import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.baselines import BM25


@pytest.mark.parametrize(("mode", "falls"), [("ascent", 1), ("descent", 1), ("symmetric", 1), ("ascent", 0.5)])
def test_token_scores_sum_to_the_candidates_scores(mode, falls, model, tokenizer, queries, candidates):
    ascent = AscentConfig(direction="gradient", mode=mode, radius=0.3)
    tracer = ForwardInf(model, tokenizer, ascent=ascent, falls=falls)
    found = tracer.explain(tracer.trace(queries, candidates), k=4)
    assert len(found.details) == 4 * len(queries)
    for row in found.details:
        assert len(row["terms"]) == len(row["term_scores"])
        assert sum(row["term_scores"]) == pytest.approx(found.scores[row["query"], row["candidate"]], abs=2e-4)
    first = found.details[0]
    target = candidates[first["candidate"]]["targets_pretokenized"]
    assert "".join(first["terms"]).startswith(target)


def test_they_are_saved_and_shown_in_the_report(model, tokenizer, queries, candidates, tmp_path):
    tracer = ForwardInf(model, tokenizer)
    found = tracer.explain(tracer.trace(queries, candidates, top_k=3), k=3)
    found.save_to_disk(tmp_path / "found")
    again = Attribution.load_from_disk(tmp_path / "found")
    assert again.details.to_list() == found.details.to_list()
    assert again.keep(2).details is not None
    again.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="h4"') >= len(queries)


def test_a_query_that_moves_nothing_has_no_details(line):
    points = Dataset.from_dict({"x": [[0.0, 0.0], [1.0, 1.0]], "y": [0.0, 1.0]})
    tracer = ForwardInf(adapter=line)
    with pytest.warns(UserWarning, match="the gradient is zero or not finite"):
        found = tracer.trace(points.select([0]), points)
    assert len(tracer.explain(found).details) == 0


def test_what_the_terms_stand_for_must_be_known(line):
    points = Dataset.from_dict({"x": [[1.0, 0.0], [1.0, 1.0]], "y": [5.0, 1.0]})
    tracer = ForwardInf(adapter=line)
    with pytest.raises(NotImplementedError, match="does not say what the terms"):
        tracer.explain(tracer.trace(points, points))


def test_other_attributors_results_can_be_looked_into_too(model, tokenizer, queries, candidates):
    found = BM25().trace(queries, candidates)
    details = ForwardInf(model, tokenizer).explain(found, k=1).details
    assert [row["candidate"] for row in details] == [int(found.ranking(i)[0]) for i in range(len(queries))]
    assert np.isfinite([score for row in details for score in row["term_scores"]]).all()
