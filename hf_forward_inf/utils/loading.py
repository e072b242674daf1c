"""Loading models of every kind, with the head that they were saved with, and what prepares their inputs."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.validation import looks_like_path

HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "AutoTokenizer"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "AutoTokenizer"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "AutoTokenizer"),
    "ForImageClassification": ("AutoModelForImageClassification", "AutoImageProcessor"),
}
"""Classes that load a model that was saved with a head, and its processor."""
PIPELINE = "model_index.json"
"""File in the folder of a diffusers pipeline."""


def classes_for(config: Any) -> tuple[Any, Any]:
    """Return the classes that load a model and its processor: another head would be new, and know nothing.

    Args:
        config (`transformers.PreTrainedConfig`): The model's.
    """
    import transformers

    saved = " ".join(config.architectures or [])
    names = next((names for head, names in HEADS.items() if head in saved), None)
    if names is None and hasattr(config, "vision_config"):
        names = ("AutoModelForImageTextToText", "AutoProcessor")
    if names is None:
        names = ("AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM", "AutoTokenizer")
    model, processor = (getattr(transformers, name) for name in names)
    return model, processor


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer or processor.

    Of a PEFT adapter's folder, the base model is loaded with it; the tokenizer is the adapter's, if it has one.

    Args:
        name (`str`): A hub name or local folder.

    Returns:
        `tuple`: The model, in evaluation mode on the device of this process, and its processor.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
        ImportError: If it is a PEFT adapter, and peft is not installed.
        OSError: If it is neither a folder nor a name on the hub.
        ValueError: If a file of weights is damaged, or the model has no head that is known.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    _check_exists(name)
    try:
        return _load_adapter(name) if find_adapter_config_file(name) is not None else _load(name)
    except OSError as error:
        if Path(name).expanduser().exists():
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(f"There is no folder {name}, and no such model can be loaded from the hub: {reason}") from error


def _load(name: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    loader, processor = classes_for(config)
    try:
        model = loader.from_pretrained(name)
    except SafetensorError as error:
        raise ValueError(f"The weights of {name} can't be read ({error}): a file is damaged or cut off.") from error
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):  # which lists all that there are
            raise
        kind = " or ".join(config.architectures or [config.model_type])
        raise ValueError(f"{name} is a {kind}, which predicts neither texts nor labels.") from error
    return model.to(process_state().device).eval(), processor.from_pretrained(name)


def _load_adapter(name: str) -> tuple[Any, Any]:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"{name} is a PEFT adapter: pip install 'hf-forward-inf[peft]'.") from error
    base, processor = load_model(str(PeftConfig.from_pretrained(name).base_model_name_or_path))
    with suppress(OSError, ValueError):  # an adapter's folder need not have a tokenizer
        processor = classes_for(base.config)[1].from_pretrained(name)
    return PeftModel.from_pretrained(base, name).eval(), processor


def is_diffusion_folder(name: str) -> bool:
    """Whether a hub name or local folder holds a diffusers pipeline.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
    """
    from transformers.utils.hub import cached_file

    _check_exists(name)
    if Path(name).expanduser().is_dir():
        return (Path(name).expanduser() / PIPELINE).exists()
    found = cached_file(
        name, PIPELINE, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return found is not None


def load_diffusion(name: str) -> Any:
    """Load a diffusers pipeline onto the device of this process, on a GPU in bfloat16.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    _check_exists(name)
    disable_progress_bar()  # of loading weights
    device = process_state().device
    precision = {"torch_dtype": torch.bfloat16} if device.type == "cuda" else {}
    return DiffusionPipeline.from_pretrained(name, **precision).to(device)


def _check_exists(name: str) -> None:
    if not Path(name).expanduser().exists() and looks_like_path(name):
        raise FileNotFoundError(f"There is no file or folder {name}, and a model on the hub can't have this name.")
