"""What Forward-INF is compared with: each an attributor, used by the same three lines."""

from hf_forward_inf.baselines.bm25 import BM25

__all__ = ["BM25"]
