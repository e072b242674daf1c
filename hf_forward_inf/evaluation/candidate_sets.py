"""Sets of candidates with distractors, as FTRACE makes them."""

from collections import defaultdict

import numpy as np
from datasets import Dataset

from hf_forward_inf.data.ftrace import proponents

BM25_NEIGHBOURS = 250
"""Distractors that look most like a query, by word overlap, as FTRACE takes them."""


SHARES = {"bm25": BM25_NEIGHBOURS, "same_target": 100, "random": 100}
"""Distractors of each kind that FTRACE takes for a query."""


def candidate_pool(
    queries: Dataset, abstracts: Dataset, num_candidates: int, seed: int = 0
) -> tuple[Dataset, dict[str, int]]:
    """Draw one set of candidates for all queries, as FTRACE does: proponents, then distractors.

    Every proponent; for each query in turn the rows that look most like it (BM25, the best 250); rows with the same
    target; rows drawn at random. The room that the proponents leave is shared out as FTRACE does it, 250 : 100 : 100;
    what a kind can't fill, the next ones do.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences.
        num_candidates (`int`): Size of the set; all rows if there are no more.
        seed (`int`, defaults to 0): Draws the random rows.

    Returns:
        `tuple`: The candidates in the order of their rows, and how many came as `proponents`, `bm25`,
        `same_target`, `random`.

    Raises:
        ValueError: If not even the proponents fit.
    """
    from hf_forward_inf.baselines.bm25 import BM25

    truth = sorted({row for rows in proponents(queries, abstracts) for row in rows})
    if len(truth) > num_candidates:
        raise ValueError(
            f"The {len(queries)} queries have {len(truth)} proponents: num_candidates={num_candidates} can't hold "
            "them. Raise it, or trace fewer queries."
        )
    kinds = {"proponents": truth}
    if len(abstracts) > num_candidates:
        nearest = BM25().trace(queries, abstracts, top_k=BM25_NEIGHBOURS).indices
        assert nearest is not None
        targets = set(queries["targets_pretokenized"])
        kinds["bm25"] = nearest.T.ravel().tolist()  # every query's best, then every query's second best, ...
        kinds["same_target"] = [r for r, target in enumerate(abstracts["targets_pretokenized"]) if target in targets]
    kinds["random"] = np.random.default_rng(seed).permutation(len(abstracts)).tolist()
    room, whole = num_candidates - len(truth), sum(SHARES[kind] for kind in kinds if kind in SHARES)
    ends = np.cumsum([len(truth) if kind == "proponents" else room * SHARES[kind] / whole for kind in kinds])
    taken: dict[int, str] = {}
    for (kind, rows), end in zip(kinds.items(), ends, strict=True):
        for row in rows:
            if len(taken) < round(end):
                taken.setdefault(row, kind)
    counts = {kind: list(taken.values()).count(kind) for kind in kinds}
    return abstracts.select(sorted(taken)), counts


def own_candidates(
    queries: Dataset, abstracts: Dataset, size: int = 100, seed: int = 0
) -> tuple[Dataset, list[list[int]]]:
    """Give every query a set of candidates of its own, as FTRACE does, and the union of all sets.

    A query's set: every proponent, the rows that look most like it (BM25), rows with the same target, rows drawn at
    random, up to `size` of each kind but the first. Of rows with equal texts only the first is in it.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences.
        size (`int`, defaults to 100): Distractors of each kind.
        seed (`int`, defaults to 0): Draws the rows with the same target, and the random ones.

    Returns:
        `tuple`: The union in the order of its rows, and each query's set as row numbers of the union, ascending.
    """
    from hf_forward_inf.baselines.bm25 import BM25

    draw = np.random.default_rng(seed)
    nearest = BM25().trace(queries, abstracts, top_k=size).indices
    assert nearest is not None
    texts = list(zip(abstracts["inputs_pretokenized"], abstracts["targets_pretokenized"], strict=True))
    with_target: dict[str, list[int]] = defaultdict(list)
    for row, (_, target) in enumerate(texts):
        with_target[target].append(row)
    sets = []
    truth = proponents(queries, abstracts)
    for i, target in enumerate(queries["targets_pretokenized"]):
        same = draw.permutation(np.array(with_target[target], dtype=int))[:size]
        random = draw.permutation(len(abstracts))[:size]
        rows = [*truth[i], *nearest[i], *same, *random]
        sets.append({texts[row]: int(row) for row in reversed(rows)}.values())  # the first of equal texts stays
    union = sorted(set().union(*sets))
    place = {row: n for n, row in enumerate(union)}
    return abstracts.select(union), [sorted(place[row] for row in rows) for rows in sets]
