"""A small chat model that is trained once, and tuned by LoRA on other rows in minutes."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.toys.tiny_models import fit, train_tokenizer
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import default_cache_dir, write_folder

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
"""A Llama of a million parameters, embeddings included."""
VOCABULARY = 1500
"""Maximum number of tokens in the vocabulary."""
TEMPLATE = (
    "{% for one in messages %}{% if one.role == 'user' %}<extra_id_0>{{ one.content }}<extra_id_1>{% else %}"
    "{% generation %}{{ one.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)
"""The user's turn between two marks, then the assistant's."""
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class LoraOptions(RunOptions):
    """How a chat model is tuned, on what, and where the results go.

    Args:
        model (`str`, *optional*): Chat model to tune: hub name or local folder. With neither this nor `data`, a tiny
            one is tuned on built-in data.
        data (`str`, *optional*): Rows that it learns: hub name, folder or file.
        seeds (`int`, defaults to 1): Number of models; each has its own rows and queries.
        epochs (`int`, defaults to 6): Epochs of LoRA.
        training_rate (`float`, defaults to 3e-3): Peak learning rate of LoRA.
        base_epochs (`int`, defaults to 10): Epochs of the tiny chat model, before LoRA.
    """

    model: str | None = None
    data: str | None = None
    seeds: int = field(default=1, metadata={"min": 1})
    epochs: int = field(default=6, metadata={"min": 1})
    training_rate: float = field(default=3e-3, metadata={"above": 0})
    base_epochs: int = field(default=10, metadata={"min": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.data is None):
            raise ValueError("Give --model and --data together: what is tuned, and the rows that it learns.")


def base_model(rows: Dataset, epochs: int = 10, rate: float = 3e-3, seed: int = 0) -> CausalLMAdapter:
    """Train a chat model on conversations from random weights, or load it from the cache."""
    texts = [message["content"] for messages in rows["messages"] for message in messages]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **SIZES))
    return trained(CausalLMAdapter(model, tokenizer), rows, epochs, rate, seed=seed)


def given_model(name: str) -> CausalLMAdapter:
    """Load a chat model by its hub name or folder."""
    return CausalLMAdapter(*load_model(name))


def tuned(base: CausalLMAdapter, rows: Dataset, seed: int, *, epochs: int, rate: float) -> CausalLMAdapter:
    """Tune a model on rows by LoRA, or load the LoRA from the cache."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs the extra `peft`: pip install 'hf-forward-inf[peft]'.") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base.model), LoraConfig(**LORA))
    return trained(base.with_model(model), rows, epochs, rate, seed=seed)


def trained(
    adapter: CausalLMAdapter, rows: Dataset, epochs: int, rate: float, *, seed: int = 0, batch_length: int = 1024
) -> CausalLMAdapter:
    """Train an adapter's model in place, in bfloat16 products, or load the weights of an earlier training."""
    state, model = process_state(), adapter.model
    recipe = (epochs, rate, seed, batch_length)
    key = fingerprint(fingerprint_of_model(model), adapter.cache_key, adapter.encode(rows[:]), recipe)
    folder = default_cache_dir() / "models" / key
    model.to(state.device)
    if state.is_main_process and not folder.exists():
        # Without its cache: it holds weights as they were before the first step.
        precision = torch.autocast(state.device.type, torch.bfloat16, cache_enabled=False)
        with torch.random.fork_rng(), precision:
            torch.manual_seed(seed)
            fit(adapter, rows, epochs, rate, batch_length=batch_length)
        weights = {name: weight.detach().cpu() for name, weight in _trained_weights(model).items()}
        write_folder(folder, lambda part: torch.save(weights, part / "weights.pt"))
    state.wait_for_everyone()
    model.load_state_dict(torch.load(folder / "weights.pt", map_location=state.device), strict=False)
    model.eval()
    return adapter


def _trained_weights(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Return the parameters that are trained: of a PEFT model the LoRA, of others all."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
