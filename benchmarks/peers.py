"""This library and its peers on the same model, candidates and queries, judged by retraining.

    python benchmarks/peers.py
    python benchmarks/peers.py --settings seq2seq causal    # retrieval of known facts, without a truth
    python benchmarks/peers.py --tasks DIR                  # a task of yours: see `peer_tasks.write_task`

The task is that of `recipes/lds.py --task sentences`: a small Llama, 600 sentences, what training on 60 random halves
of them did to 40 queries, and 40 others by which settings are chosen. Each peer has a virtual environment of its own,
made at the first run. A method that fails or takes too long has a row with its error. Results are written to
`--output`: `table.md`, and for each task its figures; a run that was stopped resumes with what is missing.
"""

import argparse
from pathlib import Path

from peer_environments import REQUIREMENTS
from peer_measures import Measured
from peer_methods import METHODS
from peer_tables import tables
from peer_tasks import causal_task, sentences_task, seq2seq_task

from hf_forward_inf.utils.processes import say

SETTINGS = ("sentences", "seq2seq", "causal")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=["sentences"], choices=SETTINGS, help="Built-in tasks.")
    parser.add_argument("--tasks", nargs="*", type=Path, default=[], help="Folders with other tasks.")
    parser.add_argument("--data", type=Path, help="Folder with the seq2seq setting's model, candidates and queries.")
    parser.add_argument("--output", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--envs", type=Path, default=Path("outputs/peers/envs"), help="The peers' environments.")
    parser.add_argument("--limit", type=int, default=600, help="Maximum processor seconds for a run of a method.")
    parser.add_argument("--only", nargs="*", default=["ours", *REQUIREMENTS], help="Libraries to run.")
    parser.add_argument("--no-costs", action="store_true", help="Measure scores only.")
    return parser.parse_args(arguments)


def made(setting: str, options: argparse.Namespace) -> Path:
    """Return the folder of a built-in task, which is made if it does not exist."""
    folder = options.output / "tasks" / (setting if options.data is None else f"{setting}-{options.data.name}")
    if not (folder / "task.json").exists():
        say(f"Making {folder} ...")
        {
            "sentences": sentences_task,
            "causal": causal_task,
            "seq2seq": lambda folder: seq2seq_task(folder, options.data),
        }[setting](folder)
    return folder


def main() -> None:
    options = parse()
    texts = []
    for task in [*(made(setting, options) for setting in options.settings), *options.tasks]:
        measured = Measured(task, options.output / task.name, options.envs.resolve(), options.limit)
        for library in options.only:
            say(f"{task.name}: {library} ...")
            own = [method for method in METHODS if method.library == library]
            measured.measure(library, own, not options.no_costs)
        texts.append(f"{task.name}:\n\n{tables(measured)}\n")
    (options.output / "table.md").write_text("\n".join(texts))
    print("\n".join(texts))


if __name__ == "__main__":
    main()
