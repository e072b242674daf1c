import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.baselines import BM25, attributors_for
from hf_forward_inf.cli import main
from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.commands.outputs import OUTPUTS
from hf_forward_inf.commands.trace import trace_run
from hf_forward_inf.data import proponents
from hf_forward_inf.evaluation.fact_tracing import draw_candidates, with_proponents
from hf_forward_inf.utils.rows import sample_rows

pytestmark = pytest.mark.usefixtures("measured_once")

COMMAND = ("-m", "hf_forward_inf", "trace")
GRADIENT = AscentConfig(direction="gradient")
"""For tests of what holds along any direction: no curvature is fitted."""


@pytest.fixture
def options(model, tokenizer, corpus, tmp_path):
    """A model's folder, four queries, and candidates with their proponents, as options."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), **rows_in(tmp_path, corpus, 120), "output": str(tmp_path / "out")}


def rows_in(folder, corpus, count):
    """Queries and candidates in files, as options."""
    sentences = corpus["abstracts"].select(range(600))
    queries = sample_rows(with_proponents(corpus["queries"], sentences), 4)
    files = {name: folder / f"{name} of {count}.parquet" for name in ("queries", "candidates")}
    queries.to_parquet(files["queries"])
    draw_candidates(queries, sentences, count, seed=0).to_parquet(files["candidates"])
    return {name: str(file) for name, file in files.items()}


def as_arguments(options):
    given = [(f"--{name}", value) for name, value in options.items() if value is not False]
    return [str(part) for name, value in given for part in ((name,) if value is True else (name, value))]


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def test_a_run_writes_metrics_attribution_and_report(options, capsys):
    trace_run(TraceOptions(**options, cost=True), AscentConfig())
    folder = Path(options["output"])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*OUTPUTS, "compared", "figures.json"])
    metrics = json.loads((folder / "metrics.json").read_text())
    for method in ("", "bm25/", "fixed_learning_rate/", "random/"):
        assert 0 <= metrics[f"{method}mrr"] <= 1
    assert metrics["queries"] == 4
    assert metrics["candidates"] == 120
    assert metrics["forward_passes_per_query"] > 0
    assert metrics["ascent/radius"] == 1.5
    assert metrics["version/torch"]
    found = Attribution.load_from_disk(folder / "attribution")
    assert found.scores.shape == (metrics["queries"], 100)
    assert "known proponent" in (folder / "report.html").read_text()
    printed = capsys.readouterr().out
    assert all(method in printed for method in ("forward_inf", "fixed_learning_rate", "bm25", "random"))


def test_a_comparison_reports_what_each_attributor_finds_alone(options, corpus, model, tokenizer, tmp_path, capsys):
    options |= rows_in(tmp_path, corpus, 48)
    step = {"direction": "gradient", "radius": 2.0}
    assert main(["compare", *as_arguments({**options, **step, "num_queries": 2, "no_baselines": True})]) == 0
    metrics = json.loads(Path(options["output"], "metrics.json").read_text())
    printed = capsys.readouterr().out
    candidates = Dataset.from_parquet(options["candidates"])
    queries = sample_rows(Dataset.from_parquet(options["queries"]), 2)
    truth = proponents(queries, candidates)
    plain = metrics["forward_inf/seconds_alone"] / metrics["forward_inf/forward_passes_alone"]
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(**step))
    for method, attributor in attributors_for(tracer).items():
        name = "" if method == "forward_inf" else f"{method}/"
        mrr = attributor.trace(queries, candidates).evaluate(truth)["mrr"]
        assert metrics[f"{name}mrr"] == pytest.approx(mrr, abs=1e-6)
        if name:
            assert metrics[f"{name}mrr_behind"] == pytest.approx(metrics["mrr"] - mrr, abs=1e-6)
        for kind in ("alone", "together"):  # costs are counted in one plain pass, the same for all
            seconds, passes = (metrics[f"{method}/{what}_{kind}"] for what in ("seconds", "forward_passes"))
            assert seconds / passes == pytest.approx(plain)
        assert method in printed
    assert "<svg" in Path(options["output"], "report.html").read_text()


def test_the_command_gives_the_same_scores_as_python(options, tmp_path):
    assert main(["trace", *as_arguments({**options, "no_baselines": True})]) == 0
    trace_run(TraceOptions(**{**options, "output": str(tmp_path / "two"), "baselines": False}), AscentConfig())
    first, second = (Attribution.load_from_disk(tmp_path / name / "attribution") for name in ("out", "two"))
    np.testing.assert_array_equal(first.scores, second.scores)


def test_the_scores_of_a_baseline_model_are_subtracted(options, model, tokenizer, tmp_path):
    base = copy.deepcopy(model)
    with torch.no_grad():
        base.lm_head.weight.add_(0.1 * base.lm_head.weight.sign())
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options |= {"baseline_model": str(tmp_path / "base"), "baselines": False, "strategy": "full", "top_k": 120}
    trace_run(TraceOptions(**options), GRADIENT)
    found = Attribution.load_from_disk(Path(options["output"]) / "attribution")
    queries, candidates = (Dataset.from_parquet(options[name]) for name in ("queries", "candidates"))
    one, other = (
        ForwardInf(each, tokenizer, ascent=GRADIENT, strategy="full").trace(queries, candidates).scores
        for each in (model, base)
    )
    expected = np.take_along_axis(one - other, found.indices, axis=1)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert found.method == "forward_inf_less_baseline" and found.details is None


RUNS = """
import json, sys
from hf_forward_inf.cli import main

sys.exit(any(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def test_a_screened_run_says_what_the_screen_finds(options, capsys):
    options |= {"strategy": "screen", "screen": "bm25", "keep": 20, "audit": 10, "baselines": False, "top_k": 3}
    metrics = trace_run(TraceOptions(**options), GRADIENT)
    said = capsys.readouterr().out
    assert "bm25 finds 0." in said and "of 40 random others" in said
    assert 0 < metrics["screen/recall"] <= 1
    found = Attribution.load_from_disk(Path(options["output"]) / "attribution")
    assert (found.plan.strategy, found.plan.keep, found.plan.audits[0].drawn) == ("screen", 20, 40)
    assert found.stage.all() and found.config["screen"] == "bm25"


def test_two_processes_give_the_scores_of_one(options, corpus, tmp_path):
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
                **rows_in(tmp_path, corpus, count),
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
    passes = set(cache.glob("passes/*/*/*.safetensors"))
    options |= {"overwrite": True, "direction": "gradient", "radius": 2.0}
    again = [sys.executable, *COMMAND, *as_arguments({**options, "no_baselines": True})]
    process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and set(cache.glob("passes/*/*/*.safetensors")) == passes:
        time.sleep(0.01)  # until it has finished a first pass of its own
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    finished = set(cache.glob("passes/*/*/*.safetensors")) - passes
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


def test_a_time_budget_leaves_candidates_unscored(options):
    options = {**options, "time_budget": 1e-3, "top_k": 120}
    with pytest.warns(UserWarning, match="time_budget=0.001 s was over"):
        trace_run(TraceOptions(**options, baselines=False), AscentConfig())
    found = Attribution.load_from_disk(Path(options["output"]) / "attribution")
    assert (np.isnan(found.scores).sum(axis=1) == 120 - 64).all()


def test_a_step_that_is_given_is_taken(options):
    assert main(["trace", *as_arguments({**options, "no_baselines": True, "radius": 0.5})]) == 0
    assert json.loads(Path(options["output"], "metrics.json").read_text())["ascent/radius"] == 0.5


def test_rows_without_known_facts_are_traced_without_figures(options, corpus, tmp_path):
    corpus["abstracts"].select(range(50)).remove_columns("facts").to_parquet(options["candidates"])
    corpus["queries"].select_columns(["inputs_pretokenized"]).select(range(3)).to_parquet(options["queries"])
    metrics = trace_run(TraceOptions(**options), GRADIENT)
    assert "mrr" not in metrics
    assert metrics["queries"] == 3
    assert Path(options["output"], "report.html").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m"}, "the following arguments are required: --candidates, --queries"),
        ({"model": "m", "candidates": "c", "queries": "q", "num_queries": 0}, "--num_queries must be at least 1"),
        ({"model": "m", "candidates": "c", "queries": "q", "radius": 0}, "radius must be above 0, not 0.0"),
        (
            {"model": "m", "candidates": "c", "queries": "q", "baseline_model": "b", "time_budget": 1},
            "--time_budget is of one model: leave it out with --baseline_model",
        ),
    ],
)
def test_impossible_options_are_told_in_a_line(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trace", *as_arguments(given)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_baseline_that_fails_does_not_cost_the_result(options, monkeypatch, capsys):
    def fails(self, queries, candidates):
        raise KeyError("no such column")

    monkeypatch.setattr(BM25, "score", fails)
    metrics = trace_run(TraceOptions(**options), AscentConfig(direction="gradient"))
    assert "bm25 failed and is left out: 'no such column' (KeyError)." in capsys.readouterr().out
    assert metrics["mrr"] > 0 and "bm25/mrr" not in metrics and "forward_passes_per_query" not in metrics
