"""What Forward-INF is compared with: each an attributor, used by the same three lines."""

from hf_forward_inf.baselines.bm25 import BM25
from hf_forward_inf.baselines.ensembles import Cascade, Ensemble, Fusion
from hf_forward_inf.baselines.first_order import FirstOrder
from hf_forward_inf.baselines.influence_functions import InfluenceFunctions
from hf_forward_inf.baselines.random import Random
from hf_forward_inf.baselines.representation import RepresentationSimilarity
from hf_forward_inf.baselines.tracin import TracIn
from hf_forward_inf.baselines.trackstar import TrackStar

__all__ = [
    "BM25",
    "Cascade",
    "Ensemble",
    "FirstOrder",
    "Fusion",
    "InfluenceFunctions",
    "Random",
    "RepresentationSimilarity",
    "TracIn",
    "TrackStar",
]
