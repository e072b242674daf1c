"""Sets of candidates with distractors, as in FTRACE."""

from collections import defaultdict

import numpy as np
from datasets import Dataset

from hf_forward_inf.baselines import BM25
from hf_forward_inf.data.ftrace import proponents

BM25_NEIGHBOURS = 250
"""Number of distractors per query that FTRACE takes by word overlap."""

SHARES = {"bm25": BM25_NEIGHBOURS, "same_target": 100, "random": 100}
"""Number of distractors of each kind per query in FTRACE."""


def candidate_pool(
    queries: Dataset, abstracts: Dataset, num_candidates: int, seed: int = 0
) -> tuple[Dataset, dict[str, int]]:
    """Draw one set of candidates for all queries, in FTRACE's proportions: proponents, then distractors.

    The set has every proponent; the rows most similar to the queries (BM25, at most 250 each); rows with a query's
    target; random rows. Distractors share the remaining places in the proportions 250 : 100 : 100; places that one
    kind can't fill go to the next.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences, in FTRACE's columns.
        num_candidates (`int`): Size of the set; all rows are taken if there are fewer.
        seed (`int`, defaults to 0): Seed of the random rows.

    Returns:
        `tuple`: The candidates in row order, and the number of each kind: `proponents`, `bm25`, `same_target`,
        `random`.

    Raises:
        ValueError: If there are more proponents than `num_candidates`.
    """
    truth = sorted({row for rows in proponents(queries, abstracts) for row in rows})
    if len(truth) > num_candidates:
        raise ValueError(
            f"The {len(queries)} queries have {len(truth)} proponents, more than num_candidates={num_candidates}: "
            "raise it, or trace fewer queries."
        )
    kinds = {"proponents": truth}
    if len(abstracts) > num_candidates:
        nearest = BM25().trace(queries, abstracts, top_k=BM25_NEIGHBOURS).indices
        assert nearest is not None
        targets = set(queries["targets_pretokenized"])
        kinds["bm25"] = nearest.T.ravel().tolist()  # the best of every query, then the second best of every query, ...
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
    """Draw a set of candidates for each query, as FTRACE does.

    A query's set has all its proponents, the most similar rows (BM25), rows with the same target and random rows, up
    to `size` of each kind of distractor. Of rows with equal texts only the first is in the set.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences, in FTRACE's columns.
        size (`int`, defaults to 100): Number of distractors of each kind.
        seed (`int`, defaults to 0): Seed of the rows with the same target, and of the random rows.

    Returns:
        `tuple`: The union of all sets in row order, and each query's set as ascending row numbers of the union.
    """
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
        own: dict[tuple[str, str], int] = {}
        for row in [*truth[i], *nearest[i], *same, *random]:
            own.setdefault(texts[row], int(row))
        sets.append(own.values())
    union = sorted(set().union(*sets))
    place = {row: n for n, row in enumerate(union)}
    return abstracts.select(union), [sorted(place[row] for row in rows) for rows in sets]
