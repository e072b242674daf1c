"""Corpora of any size from facts and sentence templates, as T-REx with LAMA's and ParaRel's templates has them."""

from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from hf_forward_inf.data.corpus import Fact, Relation, as_corpus, tell

FILES = ("facts.parquet", "templates.parquet")
"""What a folder of facts and templates holds."""


def template_facts(folder: str | Path, seed: int = 0) -> DatasetDict:
    """Build a corpus in FTRACE's format from a folder with `facts.parquet` and `templates.parquet`.

    Queries ask in LAMA's wording of each relation (the first template where it has none); sentences, and the
    queries' paraphrases, use the other templates. Relations with fewer than two templates are left out.

    Args:
        folder (`Path`): `facts.parquet` with `predicate_id`, `sub_surface`, `obj_surface`; `templates.parquet` with
            `predicate_id`, `template` (`[X]` the subject, `[Y]` the object), `source` (`lama` for LAMA's).
        seed (`int`, defaults to 0): Draws wordings, masked entities and queries.

    Returns:
        `datasets.DatasetDict`: `abstracts` and `queries`, with the columns of [`builtin_facts`].

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If no relation has both facts and two templates.
    """
    paths = [Path(folder) / name for name in FILES]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"There is no {path}: a folder of templates holds {' and '.join(FILES)}.")
    facts, templates = (load_dataset("parquet", data_files=str(path), split="train") for path in paths)
    wordings: dict[str, list[str]] = {}
    lamas = sorted(templates, key=lambda row: row["source"] != "lama")  # a stable sort: LAMA's first
    for row in lamas:
        form = row["template"].replace("{", "").replace("}", "").replace(" .", ".")
        forms = wordings.setdefault(row["predicate_id"], [])
        form = form.replace("[X]", "{sub}").replace("[Y]", "{obj}")
        if form not in forms:
            forms.append(form)
    relations = [Relation(name, forms[0], tuple(forms[1:])) for name, forms in wordings.items() if len(forms) > 1]
    # An answer that stands in its own question is no answer.
    told = [
        Fact(row["predicate_id"], row["obj_surface"], row["sub_surface"])
        for row in facts
        if row["obj_surface"] not in row["sub_surface"] and row["sub_surface"] not in row["obj_surface"]
    ]
    known = {fact.predicate_id for fact in told}
    relations = [relation for relation in relations if relation.predicate_id in known]
    if not relations:
        raise ValueError(f"No relation in {folder} has both facts and two templates.")
    draw = np.random.default_rng(seed)
    return as_corpus(*tell(relations, list(dict.fromkeys(told)), draw), draw)
