"""What Forward-INF is compared with: attributors with one constructor form and one `trace`, registered by name."""

from hf_forward_inf.baselines.base import Baseline, ModelBaseline
from hf_forward_inf.baselines.bm25 import BM25
from hf_forward_inf.baselines.denoiser_features import DenoiserFeatures
from hf_forward_inf.baselines.ensembles import Difference, Ensemble, Fusion
from hf_forward_inf.baselines.first_order import FirstOrder
from hf_forward_inf.baselines.influence_functions import InfluenceFunctions
from hf_forward_inf.baselines.pixels import PixelDistance
from hf_forward_inf.baselines.random import Random
from hf_forward_inf.baselines.registry import ATTRIBUTORS, Entry, attributors_for
from hf_forward_inf.baselines.representation import RepresentationSimilarity
from hf_forward_inf.baselines.tracin import TracIn
from hf_forward_inf.baselines.trackstar import TrackStar

__all__ = [
    "ATTRIBUTORS",
    "BM25",
    "Baseline",
    "DenoiserFeatures",
    "Difference",
    "Ensemble",
    "Entry",
    "FirstOrder",
    "Fusion",
    "InfluenceFunctions",
    "ModelBaseline",
    "PixelDistance",
    "Random",
    "RepresentationSimilarity",
    "TracIn",
    "TrackStar",
    "attributors_for",
]
