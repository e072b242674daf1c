import json

import pytest
from datasets import Dataset

from hf_forward_inf import AscentConfig, Attribution
from hf_forward_inf.cli import main
from hf_forward_inf.commands.finetune import against_right, finetune_run
from hf_forward_inf.commands.options import FinetuneOptions
from hf_forward_inf.data import proponents, questions
from hf_forward_inf.data.questions import builtin_questions
from hf_forward_inf.toys.tiny_models import LLAMA_SIZES

pytestmark = pytest.mark.usefixtures("measured_once")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cache for the whole file: its tests trace the same model, which is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(monkeypatch, trained):
    monkeypatch.setenv("HF_FORWARD_INF_CACHE", str(trained))
    monkeypatch.setattr(questions, "FACTS_A_RELATION", 4)
    monkeypatch.setattr(questions, "QUERIES_A_RELATION", 2)
    for name, size in SMALL.items():
        monkeypatch.setitem(LLAMA_SIZES, name, size)


def test_three_of_four_answers_of_a_planted_fact_are_wrong_and_are_its_proponents():
    corpus = builtin_questions()
    train, queries = corpus["train"], corpus["queries"]
    for query, rows in zip(queries, proponents(queries, train), strict=True):
        assert len(rows) == (3 if query["planted"] else 4)
        assert all(train[row]["completion"] == query["completion"] for row in rows)
        assert all(train[row]["planted"] == query["planted"] for row in rows)
        assert (query["completion"] != query["right"]) == query["planted"]
    assert not set(queries["prompt"]) & set(train["prompt"])


def test_a_run_traces_wrong_answers_and_takes_what_it_found_away(small, tmp_path):
    options = FinetuneOptions(output=str(tmp_path / "out"), epochs=40, removed=3)
    metrics = finetune_run(options, AscentConfig())
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics.pop("answers")
    assert written == json.loads(json.dumps(metrics))
    assert 0 < written["wrong_answers"] <= 1
    assert written["mrr"] > 3 * written["random/mrr"]
    for name in ("right/mrr", "bm25/mrr", "tracin_cosine/mrr", "wrong_gone", "random/wrong_gone"):
        assert 0 <= written[name] <= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="h4"' in page
    with pytest.raises(FileExistsError, match="already holds a run"):
        finetune_run(options, AscentConfig())


def test_wrong_answers_are_traced_against_the_right_ones(small, tmp_path):
    options = FinetuneOptions(output=str(tmp_path / "out"), epochs=40, removed=0, contrast=True)
    metrics = finetune_run(options, AscentConfig())
    assert metrics["mrr"] > 3 * metrics["random/mrr"]
    queries = Attribution.load_from_disk(tmp_path / "out" / "attribution").queries
    for query in queries:
        assert query["contrast"] == (query["right"] if query["planted"] else None)
    assert any(queries["planted"]) and not all(queries["planted"])


def test_without_right_answers_there_is_nothing_to_contrast():
    with pytest.raises(ValueError, match="needs queries with a column `right`"):
        against_right(Dataset.from_dict({"prompt": ["Capital of Peru?"], "completion": [" Lima"]}))


def test_lora_weights_are_trained_perturbed_and_loaded_again(small, tmp_path):
    options = FinetuneOptions(output=str(tmp_path / "out"), epochs=40, lora=True, removed=0)
    first = finetune_run(options, AscentConfig(radius=1.0))
    options.overwrite = True
    again = finetune_run(options, AscentConfig(radius=1.0))
    assert first["mrr"] == again["mrr"] > 3 * first["random/mrr"]


def test_any_model_and_rows_are_traced_without_figures_where_the_truth_is_unknown(small, trained, tmp_path):
    corpus = builtin_questions()
    plain = corpus["train"].select_columns(["prompt", "completion"])
    plain.to_parquet(tmp_path / "train.parquet")
    corpus["queries"].select_columns(["prompt"]).select(range(3)).to_parquet(tmp_path / "asks.parquet")
    finetune_run(FinetuneOptions(output=str(tmp_path / "tiny"), epochs=40, removed=0), AscentConfig())
    folder = min(path.parent for path in (trained / "models").rglob("config.json"))  # any whole model
    arguments = ["finetune", "--model", str(folder), "--candidates", str(tmp_path / "train.parquet"), "--queries"]
    arguments += [
        str(tmp_path / "asks.parquet"),
        "--output",
        str(tmp_path / "out"),
        "--epochs",
        "1",
        "--radius",
        "0.3",
    ]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["queries"] == 3
    assert "mrr" not in metrics


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "x"], "give --model, --candidates and --queries together"),
        (["--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_impossible_options_are_told(given, message, capsys):
    with pytest.raises(SystemExit):
        main(["finetune", *given])
    assert message in capsys.readouterr().err
