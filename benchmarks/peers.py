"""This library and its peers on the same model, candidates and queries, one process per method.

    python benchmarks/peers.py

Two settings: a seq2seq model (the built-in facts with their tiny mT5, or `--data DIR` with `model/`,
`candidates.parquet` and `queries.parquet`) and a small Llama trained on the built-in facts, for peers that support
causal models only. Each peer has a virtual environment of its own, made at the first run. A method that fails or runs
out of time has a row with its error. Results are written to `--output`, as `table.md` and `figures.json`; a run that
was stopped resumes with the missing rows.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from peer_tasks import causal_task, seq2seq_task

from hf_forward_inf.scores.metrics import evaluate
from hf_forward_inf.utils.processes import say

HERE = Path(__file__).resolve().parent

REQUIREMENTS = {
    "bergson": ["bergson==2.5.1"],
    "captum": ["captum==0.9.0"],
    "dattri": ["dattri==0.3.0"],
    "kronfluence": ["kronfluence==1.0.1"],
}
SHARED = ["torch==2.13.0", "transformers==5.24.0"]
UNWANTED = ["torchvision", "torchaudio"]
"""Dependencies of peers that no method here needs, and whose wheels may not match the CPU build of torch."""

METHODS = {
    ("ours", "forward_inf"): "Forward-INF",
    ("ours", "forward_inf_one"): "Forward-INF, one query",
    ("ours", "tuned"): "Forward-INF, radius tuned",
    ("ours", "gradient"): "Forward-INF, plain gradient",
    ("ours", "tracin_cosine"): "TracIn, cosine",
    ("ours", "trackstar"): "TrackStar",
    ("ours", "influence_functions"): "influence functions (cg)",
    ("ours", "bm25"): "BM25, no model",
    ("bergson", "cosine"): "gradients, cosine",
    ("bergson", "trackstar"): "TrackStar",
    ("bergson", "output"): "gradients, forward mode",
    ("bergson", "ekfac"): "EK-FAC",
    ("bergson", "ekfac_output"): "EK-FAC, forward mode",
    ("captum", "last_layer"): "TracInCPFast, last layer",
    ("captum", "all_parameters"): "TracInCP, all parameters",
    ("dattri", "tracin"): "gradients, cosine, projected",
    ("dattri", "trak"): "TRAK",
    ("kronfluence", "ekfac"): "EK-FAC",
}
"""Titles of the methods that are run, by library and name."""


def environment(peer: str, folder: Path) -> Path:
    """Return the Python of a peer's virtual environment, which is made if it does not exist."""
    python = folder / peer / "bin" / "python"
    ready = folder / peer / "installed.txt"
    wanted = "\n".join(SHARED + REQUIREMENTS[peer])
    if not ready.exists() or ready.read_text() != wanted:
        say(f"Installing {wanted.split()[-1]} ...")
        if not python.exists():
            venv.create(folder / peer, with_pip=True, symlinks=os.name != "nt")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *SHARED, *REQUIREMENTS[peer]], check=True)
        subprocess.run([*pip, "uninstall", "-y", *UNWANTED], check=True, stderr=subprocess.DEVNULL)
        ready.write_text(wanted)
    return python


def run(python: Path, task: Path, library: str, method: str, limit: float) -> tuple[dict[str, Any], np.ndarray | None]:
    """Run a method in its own process and folder, and return its figures and scores, or its `error`."""
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as result:
        command = [str(python), "-m", f"peer_runs.{library}", str(task.resolve()), method, result]
        private = {
            "PYTHONPATH": str(HERE),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            # All files that a library writes are counted, and no later run reads them.
            "HF_HOME": f"{scratch}/home",
            "HF_FORWARD_INF_CACHE": f"{scratch}/cache",
            "TMPDIR": f"{scratch}/tmp",
        }
        Path(private["TMPDIR"]).mkdir()
        try:
            ended = subprocess.run(
                command, cwd=scratch, env={**os.environ, **private}, timeout=limit, text=True, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {limit:.0f} s"}, None
        if ended.returncode:
            # The first line of a message names the error.
            lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
            named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            return {"error": (named or lines)[-1], "stderr": ended.stderr[-4000:]}, None
        figures = json.loads((Path(result) / "figures.json").read_text())
        return figures, np.load(Path(result) / "scores.npy")


def measure(
    library: str, method: str, task: Path, proponents: list[list[int]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of a row, or its `error`."""
    try:
        python = Path(sys.executable) if library == "ours" else environment(library, options.envs)
        figures, scores = run(python, task, library, method, options.limit)
    except (OSError, subprocess.CalledProcessError) as error:
        return {"error": str(error)}
    if scores is not None and np.isfinite(scores).any(axis=1).all():  # unless only one query was traced
        found = evaluate(scores, proponents)
        figures |= {name: found[name] for name in ("mrr", "mrr_se", "recall@10") if name in found}
    return figures


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rows, by `library/method`, as a Markdown table, with errors where there are no figures."""
    lines = ["| library | method | MRR (s.e.) | recall@10 | passes | memory | disk, MB |", "| --- " * 7 + "|"]
    for library, method in METHODS:
        if (row := rows.get(f"{library}/{method}")) is None:
            continue
        title = f"| {library} | {METHODS[library, method]} | "
        if "error" in row:
            lines.append(f"{title}{_shortened(row['error'])} | | | | |")
            continue
        quality = f"{row['mrr']:.3f} ({row['mrr_se']:.3f}) | {row['recall@10']:.3f}" if "mrr" in row else " | "
        lines.append(f"{title}{quality} | {row['passes']:.1f} | {row['memory']:.2f} | {row['disk'] / 1e6:.1f} |")
    return "\n".join(lines)


def _shortened(error: str, length: int = 100) -> str:
    error = error.replace("|", "/").strip()
    return error if len(error) <= length else f"{error[: length - 3]}..."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Folder with the seq2seq setting's model, candidates and queries.")
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--envs", type=Path, default=Path("outputs/peers/envs"), help="The peers' environments.")
    parser.add_argument("--limit", type=float, default=600, help="Maximum seconds for a method.")
    parser.add_argument("--overwrite", action="store_true", help="Measure again, and ignore earlier results.")
    parser.add_argument("--settings", nargs="*", default=["seq2seq", "causal"], choices=["seq2seq", "causal"])
    parser.add_argument("--only", nargs="*", help="Libraries to run: ours, bergson, captum, dattri, kronfluence.")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    options.envs = options.envs.resolve()
    titles = {"seq2seq": "mT5, " + ("built-in facts" if options.data is None else options.data.name)}
    titles["causal"] = "Llama, built-in facts"
    kept = options.output / "figures.json"
    figures = json.loads(kept.read_text()) if kept.exists() and not options.overwrite else {}
    if figures.get("versions") != REQUIREMENTS:
        figures = {"versions": REQUIREMENTS}
    tables = []
    for setting in options.settings:
        task = options.output / "tasks" / titles[setting].replace(", ", "-").replace(" ", "-")
        if not (task / "task.json").exists():
            seq2seq_task(task, options.data) if setting == "seq2seq" else causal_task(task)
        proponents = json.loads((task / "task.json").read_text())["proponents"]
        rows = figures.setdefault(titles[setting], {})
        for library, method in METHODS:
            name = f"{library}/{method}"
            if name in rows or (options.only and library not in options.only):
                continue
            say(f"{titles[setting]}: {name} ...")
            rows[name] = measure(library, method, task, proponents, options)
            kept.write_text(json.dumps(figures, indent=2))
        tables.append(f"{titles[setting]}:\n\n{as_markdown(rows)}\n")
    (options.output / "table.md").write_text("\n".join(tables))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
