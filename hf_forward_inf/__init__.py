"""Which training examples made my model say this? Data attribution by forward passes."""

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import BM25
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.pipelines import DataAttributionPipeline

__all__ = ["BM25", "AscentConfig", "Attribution", "DataAttributionPipeline", "ForwardInf"]
__version__ = "0.1.0"
