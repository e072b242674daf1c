"""Every attributor on human-written sentences: a tiny mT5 is trained on facts of WebNLG, and asked for others.

    python benchmarks/webnlg.py --data DIR

DIR holds `abstracts.parquet` and `queries.parquet` in FTRACE's format. Of some facts, up to four sentences each are
the training set and the candidates; 60% of the facts are told in the query's wording too (the model would not
understand it otherwise), and the others are asked for. Training takes about a quarter of an hour, once.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_forward_inf import AscentConfig
from hf_forward_inf.datasets import load_rows, proponents, sample_rows
from hf_forward_inf.run import trace_run
from hf_forward_inf.task import TraceOptions

FACTS, SENTENCES, TAUGHT = 1000, 4, 0.6


def split(data: Path, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draw the training set and the queries."""
    abstracts = load_rows(str(data / "abstracts.parquet"), "abstracts")
    asked = sample_rows(load_rows(str(data / "queries.parquet"), "queries"), FACTS, seed)
    draw = np.random.default_rng(seed)
    stating = proponents(asked, abstracts)
    told = sorted({int(row) for rows in stating for row in draw.permutation(rows)[:SENTENCES]})
    taught = draw.permutation(len(asked))[: round(TAUGHT * len(asked))]
    columns = ["inputs_pretokenized", "targets_pretokenized", "facts", "masked_uri"]
    wordings = asked.select(np.sort(taught)).rename_column("obj_uri", "masked_uri").select_columns(columns)
    train = concatenate_datasets([abstracts.select(told).select_columns(columns), wordings])
    return train, asked.select(np.setdiff1d(np.arange(len(asked)), taught))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/webnlg"))
    parser.add_argument("--num_queries", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    folder = options.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in zip(("candidates", "queries"), split(options.data), strict=True):
        files[name] = str(folder / f"{name}.parquet")
        rows.to_parquet(files[name])
    trace = TraceOptions(
        **files,
        output=str(options.output),
        overwrite=True,
        train=True,
        epochs=options.epochs,
        num_queries=options.num_queries,
        compare=True,
    )
    trace_run(trace, AscentConfig())


if __name__ == "__main__":
    main()
