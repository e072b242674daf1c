"""Small real models, trained in minutes, for recipes and tests that are given no model."""

from hf_forward_inf.toys.tiny_models import tiny_mt5

__all__ = ["tiny_mt5"]
