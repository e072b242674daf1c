"""This library and its peers on the same model, candidates and queries, judged by retraining.

    python benchmarks/peers.py
    python benchmarks/peers.py --settings texts loo --data abstracts.parquet    # sentences, of WebNLG for one
    python benchmarks/peers.py --settings seq2seq causal    # retrieval of known facts, without a truth
    python benchmarks/peers.py --tasks DIR                  # a task of yours: see `peer_tasks.write_task`

The task is that of `recipes/lds.py --task sentences`: a small Llama, 600 sentences, what training on 60 random halves
of them did to 40 queries, and 40 others by which settings are chosen. `texts` and `loo` are those of a larger Llama,
of `recipes/lds.py --task texts` and `recipes/loo.py`, whose cached trainings are read. Each peer has a virtual
environment of its own, made at the first run. A method that fails or takes too long has a row with its error. Results
are written to `--output`: `table.md`, and for each task its scores and figures; a run that was stopped resumes with
what is missing.
"""

import argparse
from pathlib import Path

from peer_environments import REQUIREMENTS
from peer_measures import Measured
from peer_methods import METHODS, Method
from peer_tables import tables
from peer_tasks import causal_task, seq2seq_task
from peer_truths import EPOCHS, loo_task, sentences_task, texts_task

from hf_forward_inf.utils.processes import say

SETTINGS = ("sentences", "texts", "loo", "seq2seq", "causal")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=["sentences"], choices=SETTINGS, help="Built-in tasks.")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[], help="Folders with other tasks.")
    parser.add_argument("--data", help="Sentences of texts and loo; of seq2seq a folder: model, candidates, queries.")
    parser.add_argument("--seeds", type=int, default=1, help="Trainings of each subset of texts and loo.")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="Passes of the texts' fine-tuning.")
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--envs", type=Path, default=Path("outputs/peers/envs"), help="The peers' environments.")
    parser.add_argument("--limit", type=int, default=600, help="Maximum processor seconds for a run of a method.")
    parser.add_argument("--only", nargs="*", default=["ours", *REQUIREMENTS], help="Libraries to run.")
    parser.add_argument("--methods", nargs="*", help="Methods to run, as `ekfac`. Default: all.")
    parser.add_argument("--tries", type=int, help="Maximum settings of a method that are tried. Default: all.")
    parser.add_argument("--no-costs", action="store_true", help="Measure scores only.")
    return parser.parse_args(arguments)


def made(setting: str, options: argparse.Namespace) -> Path:
    """Return the folder of a built-in task, which is made if it does not exist."""
    parts = [setting] if options.data is None else [setting, Path(options.data).stem]
    parts += [f"{options.epochs}-epochs"] if options.epochs != EPOCHS else []
    folder = options.output / "tasks" / "-".join(parts)
    if not (folder / "task.json").exists():
        say(f"Making {folder} ...")
        {
            "sentences": sentences_task,
            "texts": lambda folder: texts_task(folder, options.data, options.seeds, options.epochs),
            "loo": lambda folder: loo_task(folder, options.data, options.seeds),
            "causal": causal_task,
            "seq2seq": lambda folder: seq2seq_task(folder, options.data and Path(options.data)),
        }[setting](folder)
    return folder


def asked(method: Method, options: argparse.Namespace) -> bool:
    """Return whether a method is to be run."""
    return options.methods is None or method.name in options.methods


def command(setting: str, options: argparse.Namespace) -> str:
    """Return how a built-in task's figures are made."""
    wanted = "" if setting == "sentences" else f" --settings {setting}"
    data = "" if options.data is None else f" --data {Path(options.data).name}"
    seeds = "" if options.seeds == 1 else f" --seeds {options.seeds}"
    epochs = "" if options.epochs == EPOCHS else f" --epochs {options.epochs}"
    tries = "" if options.tries is None else f" --tries {options.tries}"
    return f"python benchmarks/peers.py{wanted}{data}{seeds}{epochs}{tries}"


def main() -> None:
    options = parse()
    texts = []
    tasks = {made(setting, options): command(setting, options) for setting in options.settings}
    for task, made_by in (
        tasks | {task: f"python benchmarks/peers.py --tasks {task}" for task in options.tasks}
    ).items():
        measured = Measured(task, options.output / task.name, options.envs.resolve(), options.limit, options.tries)
        for library in options.only:
            say(f"{task.name}: {library} ...")
            own = [method for method in METHODS if method.library == library and asked(method, options)]
            measured.measure(library, own, not options.no_costs)
        texts.append(f"{task.name}:\n\n{tables(measured, made_by)}\n")
    (options.output / "table.md").write_text("\n".join(texts))
    print("\n".join(texts))


if __name__ == "__main__":
    main()
