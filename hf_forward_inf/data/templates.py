"""Corpora of any size from facts and sentence templates, such as T-REx with the templates of LAMA and ParaRel."""

from pathlib import Path

import numpy as np
from datasets import DatasetDict, load_dataset

from hf_forward_inf.data.corpus import Fact, Relation, as_corpus, write_sentences

FILES = ("facts.parquet", "templates.parquet")
"""Files of a folder of facts and templates."""


def template_facts(folder: str | Path, seed: int = 0) -> DatasetDict:
    """Return a corpus in FTRACE's format made of a folder with `facts.parquet` and `templates.parquet`.

    Queries use LAMA's template of each relation (the first template if LAMA has none); sentences and the queries'
    paraphrases use the other templates. Relations with fewer than two templates are skipped.

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
            raise FileNotFoundError(f"There is no {path}: a folder of templates must hold {' and '.join(FILES)}.")
    rows, templates = (load_dataset("parquet", data_files=str(path), split="train") for path in paths)
    wordings: dict[str, list[str]] = {}
    lamas = sorted(templates, key=lambda row: row["source"] != "lama")  # a stable sort: LAMA's first
    for row in lamas:
        form = row["template"].replace("{", "").replace("}", "").replace(" .", ".")
        forms = wordings.setdefault(row["predicate_id"], [])
        form = form.replace("[X]", "{sub}").replace("[Y]", "{obj}")
        if form not in forms:
            forms.append(form)
    relations = [Relation(name, forms[0], tuple(forms[1:])) for name, forms in wordings.items() if len(forms) > 1]
    # Queries whose text contains the answer are skipped.
    facts = [
        Fact(row["predicate_id"], row["obj_surface"], row["sub_surface"])
        for row in rows
        if row["obj_surface"] not in row["sub_surface"] and row["sub_surface"] not in row["obj_surface"]
    ]
    known = {fact.predicate_id for fact in facts}
    relations = [relation for relation in relations if relation.predicate_id in known]
    if not relations:
        raise ValueError(f"No relation in {folder} has both facts and two templates.")
    draw = np.random.default_rng(seed)
    return as_corpus(*write_sentences(relations, list(dict.fromkeys(facts)), draw), draw)
