"""Data to trace: built-in facts, and loaders for files, folders and the hub in the formats of FTRACE and LAION."""

from hf_forward_inf.data.captions import load_captioned
from hf_forward_inf.data.facts import builtin_facts
from hf_forward_inf.data.ftrace import proponents
from hf_forward_inf.data.images import load_images
from hf_forward_inf.data.inputs import as_dataset
from hf_forward_inf.data.rows import load_rows
from hf_forward_inf.data.templates import template_facts

__all__ = [
    "as_dataset",
    "builtin_facts",
    "load_captioned",
    "load_images",
    "load_rows",
    "proponents",
    "template_facts",
]
