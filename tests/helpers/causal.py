"""Small random causal models of every layout, a tokenizer, and rows."""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FACTS = [("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Cuba", "Havana"), ("Kenya", "Nairobi")]
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}),
}
SIZE = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "num_key_value_heads": 1,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


def train_tokens() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [f"What is the capital of {place}? It is {city}." for place, city in FACTS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<|user|>", "<|assistant|>"]
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", chat_template=CHAT)


def untrained(layout: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    kind, own = LAYOUTS[layout]
    given = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    sizes = {} if kind == "gpt2" else SIZE
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given, **sizes, **own)).eval()


def questions() -> Dataset:
    asked = [f"What is the capital of {place}?" for place, _ in FACTS]
    return Dataset.from_dict({"prompt": asked, "completion": [f" It is {city}." for _, city in FACTS]})
