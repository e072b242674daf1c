import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_forward_inf import AscentConfig, Attribution
from hf_forward_inf.cli import main
from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.commands.outputs import OUTPUTS
from hf_forward_inf.commands.trace import trace_run

pytestmark = pytest.mark.usefixtures("measured_once")

RECIPE = Path(__file__).parents[2] / "recipes" / "ftrace.py"
GRADIENT = AscentConfig(direction="gradient")
"""For tests of what holds along any direction: no curvature is fitted."""


@pytest.fixture
def inputs(model, tokenizer, corpus, tmp_path):
    """A model's folder and parquet files, as options."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    corpus["abstracts"].select(range(600)).to_parquet(tmp_path / "candidates.parquet")
    corpus["queries"].to_parquet(tmp_path / "queries.parquet")
    names = {"model": "model", "candidates": "candidates.parquet", "queries": "queries.parquet"}
    return {name: str(tmp_path / file) for name, file in names.items()}


@pytest.fixture
def options(inputs, tmp_path):
    return {
        **inputs,
        "output": str(tmp_path / "out"),
        "num_queries": 4,
        "unanswered": True,
        "num_candidates": 120,
    }


def as_arguments(options):
    given = [(f"--{name}", value) for name, value in options.items() if value is not False]
    return [str(part) for name, value in given for part in ((name,) if value is True else (name, value))]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def test_a_run_writes_metrics_attribution_and_report(options, capsys):
    trace_run(TraceOptions(**options), AscentConfig())
    folder = Path(options["output"])
    assert sorted(p.name for p in folder.iterdir()) == sorted(OUTPUTS)
    metrics = json.loads((folder / "metrics.json").read_text())
    for method in ("", "bm25/", "fixed_learning_rate/", "random/"):
        assert 0 <= metrics[f"{method}mrr"] <= 1
    assert metrics["queries"] <= 4
    assert metrics["candidates"] == 120
    assert metrics["forward_passes_per_query"] > 0
    assert metrics["answered"] == 0  # the model is untrained
    assert metrics["ascent/radius"] == 2.0
    assert metrics["version/torch"]
    found = Attribution.load_from_disk(folder / "attribution")
    assert found.scores.shape == (metrics["queries"], 100)
    assert "known proponent" in (folder / "report.html").read_text()
    printed = capsys.readouterr().out
    assert all(method in printed for method in ("forward_inf", "fixed_learning_rate", "bm25", "random"))


def test_a_comparison_runs_every_attributor_on_the_same_candidates(options, capsys):
    assert (
        main(
            [
                "compare",
                *as_arguments(
                    {
                        **options,
                        "num_queries": 2,
                        "num_candidates": 48,
                        "direction": "gradient",
                        "radius": 2.0,
                        "no_baselines": True,
                    }
                ),
            ]
        )
        == 0
    )
    metrics = json.loads(Path(options["output"], "metrics.json").read_text())
    printed = capsys.readouterr().out
    for method in (
        "forward_inf_gradient",
        "tracin_cosine",
        "trackstar",
        "influence_functions_cosine",
        "bm25>forward_inf",
    ):
        assert 0 < metrics[f"{method}/mrr"] <= 1
        assert -1 <= metrics[f"{method}/mrr_behind"] <= 1
        assert metrics[f"{method}/peak_memory_ratio"] > 0
        for kind in ("alone", "together"):
            assert metrics[f"{method}/forward_passes_{kind}"] > 0
            assert 0 <= metrics[f"{method}/mrr_in_budget_{kind}"] <= 1
        assert method in printed
    assert metrics["tracin/forward_passes_alone"] > 1  # it passes over all candidates, forwards and backwards
    assert "<svg" in Path(options["output"], "report.html").read_text()


def test_kinds_of_queries_are_reported_apart(options, corpus, tmp_path, monkeypatch):
    # An untrained model answers nothing: let it be told that it answered every other query.
    right = [target if i % 2 else "" for i, target in enumerate(corpus["queries"]["targets_pretokenized"])]
    texts = dict(zip(corpus["queries"]["inputs_pretokenized"], right, strict=True))
    monkeypatch.setattr(
        "hf_forward_inf.adapters.Seq2SeqAdapter.answer",
        lambda self, rows: [texts[text] for text in rows["inputs_pretokenized"]],
    )
    metrics = trace_run(TraceOptions(**options, paraphrased=True), GRADIENT)
    assert metrics["queries"] == 16  # 4 answered, 4 not, and all of them in other words
    mean = np.mean([metrics["answered/mrr"], metrics["unanswered/mrr"]])
    assert metrics["mrr"] == pytest.approx(mean)  # the main group is both, paraphrases not among them
    for method in ("", "bm25/", "fixed_learning_rate/"):
        assert 0 <= metrics[f"{method}paraphrased/mrr"] <= 1


def test_repeats_give_means_and_their_standard_errors(options, tmp_path):
    runs = []
    for name, seed, repeats in (("one", 0, 1), ("two", 1, 1), ("both", 0, 2)):
        given = TraceOptions(
            **{**options, "output": str(tmp_path / name)}, repeats=repeats, baselines=False, seed=seed
        )
        runs.append(trace_run(given, AscentConfig(direction="gradient")))
    values = [run["mrr"] for run in runs]
    assert values[0] != values[1]
    assert values[2] == pytest.approx(np.mean(values[:2]))
    assert runs[2]["mrr_se"] == pytest.approx(np.std(values[:2], ddof=1) / 2**0.5)


def test_queries_can_be_ranked_among_candidates_of_their_own(options):
    options = {**options, "num_candidates": None, "own_candidates": True}
    metrics = trace_run(TraceOptions(**options, baselines=False), GRADIENT)
    assert metrics["mrr_random"] < metrics["random/mrr"]  # all candidates against a query's own


def test_the_command_gives_the_same_scores_as_python(options, inputs, tmp_path):
    assert main(["trace", *as_arguments({**options, "no_baselines": True})]) == 0
    trace_run(TraceOptions(**{**options, "output": str(tmp_path / "two"), "baselines": False}), AscentConfig())
    first, second = (Attribution.load_from_disk(tmp_path / name / "attribution") for name in ("out", "two"))
    np.testing.assert_array_equal(first.scores, second.scores)


RUNS = """
import json, sys
from hf_forward_inf.cli import main

sys.exit(any(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def test_two_processes_give_the_scores_of_one(options, tmp_path):
    (tmp_path / "runs.py").write_text(RUNS)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    counts = (500, 30)  # several batches for each process; a single one, so that one idles
    printed = {}
    for name, arguments in {"one": [], "two": launch}.items():
        environment["HF_FORWARD_INF_CACHE"] = str(tmp_path / f"cache of {name}")
        own = [
            {
                **options,
                "num_queries": 2,
                "num_candidates": count,
                "no_baselines": True,
                "output": tmp_path / name / str(count),
            }
            for count in counts
        ]
        runs = json.dumps([["trace", *as_arguments(one)] for one in own])
        done = run(sys.executable, *arguments, tmp_path / "runs.py", runs, env=environment)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    for count in counts:
        one, two = (Attribution.load_from_disk(tmp_path / name / str(count) / "attribution") for name in printed)
        np.testing.assert_array_equal(one.scores, two.scores)
        np.testing.assert_array_equal(one.indices, two.indices)
        assert json.loads((tmp_path / "two" / str(count) / "metrics.json").read_text())["processes"] == 2
    assert printed["two"].count("Tracing ") == printed["one"].count("Tracing ")  # one process prints for both


def test_a_killed_run_leaves_the_output_as_it_was_and_goes_on_when_started_again(options, tmp_path, cache):
    options["num_queries"] = 2
    trace_run(TraceOptions(**options, baselines=False), AscentConfig(direction="gradient", radius=0.5))
    folder = Path(options["output"])
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    passes = set(cache.glob("passes/*.arrow"))
    options |= {"overwrite": True, "direction": "gradient", "radius": 2.0}
    again = [sys.executable, RECIPE, *as_arguments({**options, "no_baselines": True})]
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and set(cache.glob("passes/*.arrow")) == passes:
        time.sleep(0.01)  # until it has finished a first pass of its own
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    finished = set(cache.glob("passes/*.arrow")) - passes
    assert finished
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    done = run(*again)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps  # not computed again
    assert json.loads((folder / "metrics.json").read_text())["ascent/radius"] == 2.0


def test_a_finished_run_is_not_overwritten_unless_asked(options, capsys):
    trace_run(TraceOptions(**options, baselines=False), GRADIENT)
    stamp = Path(options["output"], "metrics.json").stat().st_mtime_ns
    assert main(["trace", *as_arguments(options)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert Path(options["output"], "metrics.json").stat().st_mtime_ns == stamp
    assert (
        main(["trace", *as_arguments({**options, "direction": "gradient", "overwrite": True, "no_baselines": True})])
        == 0
    )


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["trace", *as_arguments({**options, "output": tmp_path / "file" / "out"})]) == 1
    assert "Can't write to the output folder" in capsys.readouterr().err


def test_the_run_can_train_a_model_of_its_own(options, capsys):
    options = {key: value for key, value in options.items() if key != "model"}
    trace_run(TraceOptions(**options, train=True, epochs=1, baselines=False), GRADIENT)
    assert "a tiny mT5 trained on the candidates" in capsys.readouterr().out


def test_a_time_budget_leaves_candidates_unscored(options):
    options = {**options, "time_budget": 1e-3, "top_k": 120}
    with pytest.warns(UserWarning, match="time_budget=0.001 s was over"):
        trace_run(TraceOptions(**options, baselines=False), AscentConfig())
    found = Attribution.load_from_disk(Path(options["output"]) / "attribution")
    assert (np.isnan(found.scores).sum(axis=1) == 120 - 64).all()


def test_tuning_shows_its_trials(options, capsys):
    trace_run(TraceOptions(**{**options, "tune": True}, baselines=False), AscentConfig())
    assert "self-retrieval MRR" in capsys.readouterr().out


def test_a_step_that_is_given_is_not_tuned(options, capsys):
    options = {**options, "tune": True, "no_baselines": True, "radius": 0.5}
    assert main(["trace", *(word for word in as_arguments(options) if word != "--tune")]) == 0
    assert "self-retrieval" not in capsys.readouterr().out
    assert json.loads(Path(options["output"], "metrics.json").read_text())["ascent/radius"] == 0.5


def test_rows_without_known_facts_are_traced_without_figures(options, corpus, tmp_path):
    corpus["abstracts"].select(range(50)).remove_columns("facts").to_parquet(tmp_path / "candidates.parquet")
    corpus["queries"].select_columns(["inputs_pretokenized"]).select(range(3)).to_parquet(tmp_path / "queries.parquet")
    metrics = trace_run(TraceOptions(**{**options, "num_candidates": None}), GRADIENT)
    assert "mrr" not in metrics
    assert metrics["queries"] == 3
    assert Path(options["output"], "report.html").exists()


def test_a_model_that_answers_nothing_is_told(options, capsys):
    assert main(["trace", *as_arguments({**options, "unanswered": False})]) == 1
    assert "answers none of the queries exactly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m"}, "give --candidates and --queries with it"),
        ({"candidates": "c", "queries": "q"}, "Which model?"),
        ({"model": "m", "candidates": "c", "queries": "q", "train": True}, "either --model or --train"),
        ({"num_queries": 0}, "--num_queries must be at least 1"),
        ({"num_candidates": 9, "own_candidates": True}, "either --own_candidates"),
        ({"radius": 0}, "radius=0.0 must be above 0"),
    ],
)
def test_impossible_options_are_told_in_a_line(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trace", *as_arguments(given)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
