import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import SpaceCard

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.cli import main
from hf_forward_inf.explorer import card, explorer, labels_of, load_results, narrowed
from tests.helpers.causal import questions, train_tokens, untrained

ROWS = 150
STRONG = 7
NATS = {"units": "loss", "reduction": "sum", "measure": "rise"}


def result(method="forward_inf", best=STRONG):
    """A query whose row `best` stands far out, and one where none does."""
    scores = np.random.default_rng(0).normal(size=(2, ROWS)).astype(np.float32)
    scores[0, best] = 5000
    rows = Dataset.from_dict({"text": [f"Row {i} is {'odd' if i % 2 else 'even'}." for i in range(ROWS)]})
    queries = Dataset.from_dict({"prompt": ["Which row?", "None?"], "completion": [f" Row {best}.", " No."]})
    return Attribution(scores, queries, rows, method=method, config=NATS)


@pytest.fixture
def folder(tmp_path):
    result().keep(50).save_to_disk(tmp_path / "run" / "attribution")
    result("bm25", 8).keep(50).save_to_disk(tmp_path / "run" / "compared" / "bm25")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"option/candidates": "rows.jsonl"}))
    return tmp_path / "run"


def test_rows_are_narrowed_by_words_and_levels(folder):
    found = load_results(folder)["forward_inf"]
    everything = found.top(0, 50)
    odd = narrowed(found, 0, "ODD row")
    expected = [row for row in everything["candidate"] if row % 2]
    assert odd.top(0, 50)["candidate"][:] == expected and odd.verdict(0) == found.verdict(0)
    strong = narrowed(found, 0, levels=["strong"]).top(0)
    assert strong["candidate"][:] == [STRONG] and strong["level"][:] == ["strong"]
    assert "No training row fits" in card(found, 0, "nowhere")
    assert "Row 7 is odd" in plain(card(found, 0, k=1)) and "is even" not in plain(card(found, 0, "odd"))


def test_queries_are_listed_by_number_and_text(folder):
    assert labels_of(load_results(folder)["bm25"]) == ["1. Which row? → Row 8.", "2. None? → No."]


def test_a_folder_without_a_result_is_refused(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="holds no result: give the --output of a run"):
        load_results(tmp_path)
    assert main(["explore", str(tmp_path), "--export_space", str(tmp_path / "space")]) == 1


def test_an_exported_space_says_how_it_runs(folder, tmp_path):
    space = tmp_path / "space"
    assert main(["explore", str(folder), "--export-space", str(space)]) == 0
    about = SpaceCard.load(space / "README.md").data
    assert (about.sdk, about.app_file) == ("gradio", "app.py")
    assert (space / "requirements.txt").read_text().startswith("hf-forward-inf[explore]")
    assert list(load_results(space)) == ["forward_inf", "bm25"]
    assert main(["explore", str(folder), "--export-space", str(space)]) == 1  # it is not empty


def plain(page):
    """The text of a page."""
    return re.sub(r"<[^>]+>", "", page)


def served(app):
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True)
    return gradio_client.Client(url, verbose=False)


def test_the_explorer_shows_a_query_by_any_attributor_and_traces_what_is_typed(folder):
    pytest.importorskip("gradio", reason="gradio is not installed")
    tokens = train_tokens()
    tracer = ForwardInf(untrained("llama", len(tokens)), tokens, ascent=AscentConfig(direction="gradient"))
    app = explorer(folder, tracer, questions())
    client = served(app)
    try:
        levels = ["strong", "some", "none"]
        query = "1. Which row? → Row 7."
        own, other = (
            plain(client.predict(query, method, "", levels, 1, api_name="/show")) for method in ("forward_inf", "bm25")
        )
        assert "Row 7 is odd" in own and "Row 8 is even" in other
        asked = "What is the capital of Peru?"
        found = plain(client.predict(asked, 2, api_name="/ask"))
        best = tracer.trace_generation(asked, questions(), top_k=1).top(0, 1)["prompt"][0]
        assert asked in found and best in found
    finally:
        app.close()


def test_the_app_of_an_exported_space_serves_the_results(folder, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    space = tmp_path / "space"
    assert main(["explore", str(folder), "--export_space", str(space)]) == 0
    code = (space / "app.py").read_text().replace(".launch()", ".launch(prevent_thread_lock=True, quiet=True)")
    code += "\nimport gradio_client, sys\nfrom gradio.context import Context\n"
    code = code.replace('explorer(".")', 'app = explorer(".")\napp')
    code += "client = gradio_client.Client(app.local_url, verbose=False)\n"
    code += "print(client.predict('2. None? → No.', 'bm25', '', ['none'], 1, api_name='/show'))\napp.close()\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path) for path in sys.path if path])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=space, capture_output=True, text=True, timeout=200, env=environment
    )
    assert "None?" in done.stdout, done.stderr
