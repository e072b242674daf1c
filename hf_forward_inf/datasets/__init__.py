"""Real data to trace: the built-in facts, and loaders for sets in FTRACE's and in LAION's formats."""

from hf_forward_inf.datasets.captions import load_captioned
from hf_forward_inf.datasets.facts import builtin_facts
from hf_forward_inf.datasets.ftrace import candidate_pool, load_rows, own_candidates, proponents, sample_rows
from hf_forward_inf.datasets.templates import template_facts

__all__ = [
    "builtin_facts",
    "candidate_pool",
    "load_captioned",
    "load_rows",
    "own_candidates",
    "proponents",
    "sample_rows",
    "template_facts",
]
