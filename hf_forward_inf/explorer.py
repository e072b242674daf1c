"""An explorer of results in the browser, by gradio: pick a query or type one, compare attributors, filter rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report import as_card
from hf_forward_inf.report.lines import classes_of, lines
from hf_forward_inf.report.texts import shortened
from hf_forward_inf.scores.levels import Level

LEVELS = get_args(Level)
SHOWN, MOST = 10, 100
"""Rows shown at first, and at most."""
LABEL = 90
"""Characters of a query in the list."""
NO_ROW = "<p>No training row fits.</p>"
APP = '''"""An explorer of which training examples made a model say what it said."""

from hf_forward_inf.explorer import explorer

explorer(".").launch()
'''


def load_results(folder: str | Path) -> dict[str, Attribution]:
    """Return the results of a run by attributor, Forward-INF's first.

    Args:
        folder (`Path`): The output folder of a run, or one that [`Attribution.save_to_disk`] has written.

    Raises:
        FileNotFoundError: If it holds no result.
    """
    folder = Path(folder)
    first = folder if (folder / "attribution.json").exists() else folder / "attribution"
    if not (first / "attribution.json").exists():
        raise FileNotFoundError(f"{folder} holds no result: give the --output of a run.")
    found = [Attribution.load_from_disk(first)]
    found += [Attribution.load_from_disk(path) for path in sorted((folder / "compared").glob("*"))]
    return {one.method: one for one in found}


def candidates_of(folder: str | Path) -> str | None:
    """Return the candidates that a run has traced over, by its `metrics.json`."""
    file = Path(folder) / "metrics.json"
    return json.loads(file.read_text()).get("option/candidates") if file.exists() else None


def narrowed(found: Attribution, query: int, words: str = "", levels: Sequence[str] = LEVELS) -> Attribution:
    """Return the result of one query, with those of its best rows that fit.

    Args:
        found (`Attribution`): The result.
        query (`int`): Row number of the query.
        words (`str`, defaults to `""`): Words that a row's text must hold, all of them, in capitals or not.
        levels (`list[str]`, *optional*): Levels that a row may have; rows without one fit any.
    """
    one = found.select([query]).keep(min(MOST, found.scores.shape[1]))
    assert one.indices is not None
    top = one.top(0, MOST)
    texts = [line.text.lower() for line in lines(top)]
    ranked = top["level"][:] if "level" in top.column_names else [None] * len(top)
    fits = [
        all(word in text for word in words.lower().split()) and (level is None or level in levels)
        for text, level in zip(texts, ranked, strict=True)
    ]
    kept = np.flatnonzero(fits)
    stage = None if one.stage is None else one.stage[:, kept]
    return replace(one, scores=one.scores[:, kept], indices=one.indices[:, kept], stage=stage)


def card(found: Attribution, query: int, words: str = "", levels: Sequence[str] = LEVELS, k: int = SHOWN) -> str:
    """Return one query with its best rows that fit as HTML; arguments as in [`narrowed`]."""
    one = narrowed(found, query, words, levels)
    assert one.indices is not None
    return as_card(one, 1, k) if one.indices.shape[1] else f"<p>{escape(found.verdict(query))}</p>{NO_ROW}"


def labels_of(found: Attribution) -> list[str]:
    """Return a line for each query: its number and its text."""
    queries = lines(found.queries, classes_of(found.candidates))
    return [f"{i + 1}. {shortened(line.text, LABEL)}" for i, line in enumerate(queries)]


def explorer(folder: str | Path, tracer: ForwardInf | None = None, candidates: Any = None) -> Any:
    """Return the explorer of a run's results; `launch()` shows it.

    Args:
        folder (`Path`): As in [`load_results`].
        tracer (`ForwardInf`, *optional*): Traces what is typed; without it, only saved results are shown.
        candidates (*optional*): What is traced over ([`data.as_dataset`]), by default the tracer's training rows.

    Returns:
        `gradio.Blocks`: The app.

    Raises:
        FileNotFoundError: If the folder holds no result.
        ImportError: If gradio is not installed.
    """
    results = load_results(folder)
    import gradio as gr

    first = next(iter(results.values()))
    labels, methods = labels_of(first), list(results)

    def show(label: str, method: str, words: str, levels: list[str], k: float) -> str:
        return card(results[method], labels.index(label), words, levels, int(k))

    def ask(text: str, k: float) -> str:
        assert tracer is not None
        if not text.strip():
            return ""
        try:
            return as_card(tracer.trace_generation(text, candidates, top_k=int(k)), 1, int(k))
        except (ValueError, TypeError, NotImplementedError) as error:
            return f"<p>{escape(str(error))}</p>"

    with gr.Blocks(title="Which training examples made the model say this?") as app:
        gr.Markdown("# Which training examples made the model say this?")
        with gr.Row():
            query = gr.Dropdown(labels, value=labels[0], label="Query", filterable=True, scale=3)
            method = gr.Dropdown(methods, value=methods[0], label="Attributor", visible=len(methods) > 1)
        with gr.Row():
            words = gr.Textbox("", label="Only rows with these words")
            levels = gr.CheckboxGroup(list(LEVELS), value=list(LEVELS), label="Levels")
            count = gr.Slider(1, MOST, value=SHOWN, step=1, label="Rows")
        page = gr.HTML(card(first, 0))
        inputs: list[Any] = [query, method, words, levels, count]
        gr.on([one.change for one in inputs], show, inputs, page, api_name="show")
        if tracer is not None:
            gr.Markdown("## Ask the model")
            with gr.Row():
                text = gr.Textbox("", label="Question or prompt", scale=4)
                button = gr.Button("Trace its answer", variant="primary")
            answer = gr.HTML("")
            gr.on([button.click, text.submit], ask, [text, count], answer, api_name="ask")
    return app


def export_space(folder: str | Path, target: str | Path) -> None:
    """Write a Space that shows a run's results: `app.py`, `requirements.txt`, `README.md`, and the results.

    Args:
        folder (`Path`): As in [`load_results`].
        target (`Path`): A folder that does not exist, or is empty.

    Raises:
        FileExistsError: If the target holds something.
        FileNotFoundError: If the folder holds no result.
    """
    from huggingface_hub import SpaceCard, SpaceCardData

    results, target = load_results(folder), Path(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name another folder for the Space.")
    target.mkdir(parents=True, exist_ok=True)
    first, *others = results.values()
    first.save_to_disk(target / "attribution")
    for other in others:
        other.save_to_disk(target / "compared" / other.method)
    (target / "app.py").write_text(APP)
    (target / "requirements.txt").write_text(f"hf-forward-inf[explore]>={version('hf-forward-inf')}\n")
    about = SpaceCardData(
        title="Which training examples made the model say this?", sdk="gradio", app_file="app.py",
        tags=["data-attribution", "hf-forward-inf"],
    )  # fmt: skip
    text = f"{len(first)} queries traced over {first.total:,} training examples by hf_forward_inf (`{first.method}`)."
    SpaceCard(f"---\n{about.to_yaml()}\n---\n\n# {about.title}\n\n{text}\n").save(target / "README.md")
