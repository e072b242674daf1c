"""Which training examples made my model say this? Data attribution by forward passes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_forward_inf.utils.imports import import_after

if TYPE_CHECKING:
    from hf_forward_inf.ascent.config import AscentConfig
    from hf_forward_inf.attribution import Attribution, Attributor
    from hf_forward_inf.forward_inf import ForwardInf
    from hf_forward_inf.pipelines import DataAttributionPipeline
    from hf_forward_inf.tracing.tuning import Tuning
    from hf_forward_inf.trainers import TraceFailures

__all__ = [
    "AscentConfig",
    "Attribution",
    "Attributor",
    "DataAttributionPipeline",
    "ForwardInf",
    "TraceFailures",
    "Tuning",
]
__version__ = "0.2.0"

_MODULES = {
    "AscentConfig": "ascent.config",
    "Attribution": "attribution",
    "Attributor": "attribution",
    "DataAttributionPipeline": "pipelines",
    "ForwardInf": "forward_inf",
    "TraceFailures": "trainers",
    "Tuning": "tracing.tuning",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `import hf_forward_inf` and the command start quickly."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_after("transformers.pipelines", f"{__name__}.pipelines")  # which registers "data-attribution"
