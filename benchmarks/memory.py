"""Peak memory of a whole trace, and time of the curvature's fit, relative to plain inference: large layouts.

    python benchmarks/memory.py --layout gpt2
    python benchmarks/memory.py --layout 1b --lora

Weights are random: memory and time don't depend on them. Candidates are the built-in facts, some sentences a row. In
one process, without results of an earlier run: a plain forward pass over the candidates, the fit, and a trace of all
queries with the fit included. Peaks are those of the whole process.
"""

import argparse
import json
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.curvature import kronecker
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.evaluation.cost import plain_pass, timed
from hf_forward_inf.toys.tiny_models import train_tokenizer
from hf_forward_inf.utils.models import bytes_of_model, evaluating
from hf_forward_inf.utils.sizes import GB

LAYOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "1b": {  # that of Llama 3.2
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        "dtype": torch.bfloat16,
    },
}  # fmt: skip
TARGETS = ["c_attn", "c_proj", "c_fc", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="gpt2")
    parser.add_argument("--lora", action="store_true", help="A LoRA of rank 16 on a frozen base.")
    parser.add_argument("--num_candidates", type=int, default=64)
    parser.add_argument("--num_queries", type=int, default=2)
    parser.add_argument("--sentences", type=int, default=2, help="Sentences in a row.")
    parser.add_argument("--sample", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--trust", type=float, help="A length in nats; by default a radius.")
    parser.add_argument("--memory", type=float, help="As in AscentConfig.")
    parser.add_argument("--targets", type=int, help="Targets drawn for the fit: memory does not depend on them.")
    options = parser.parse_args()
    kronecker.TARGETS = options.targets or kronecker.TARGETS
    warnings.simplefilter("ignore")  # of a tokenizer that is not the model's
    torch.manual_seed(0)
    texts = [a.replace("<extra_id_0>", b) for a, b in sentences()]
    tokenizer = train_tokenizer(texts, 4096)
    layout = dict(LAYOUTS[options.layout])
    dtype = layout.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**layout, eos_token_id=1, bos_token_id=None), dtype=dtype
    )
    if options.lora:
        model = with_lora(model)
    rows = [" ".join(texts[i : i + options.sentences]) for i in range(0, len(texts), options.sentences)]
    candidates = Dataset.from_dict({"text": rows[: options.num_candidates]})
    queries = Dataset.from_dict({"text": rows[-options.num_queries :]})
    ascent = AscentConfig(
        direction="kfac", sample=options.sample, trust=options.trust, steps=options.steps, memory=options.memory
    )
    with tempfile.TemporaryDirectory() as folder:
        tracer = ForwardInf(model.eval(), tokenizer, ascent=ascent, cache_dir=folder)
        print(json.dumps(measured(tracer, queries, candidates), indent=2))


def sentences() -> list[tuple[str, str]]:
    rows = builtin_facts()["abstracts"]
    targets = [text.replace("<extra_id_0>", "").strip() for text in rows["targets_pretokenized"]]
    return list(zip(rows["inputs_pretokenized"], targets, strict=True))


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    own = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=16, target_modules=[t for t in TARGETS if t in own], init_lora_weights=False
    )
    return get_peft_model(model, config)


def measured(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, Any]:
    """Return seconds, and peaks in GB and as multiples of a plain pass's."""
    plain, peak = plain_pass(tracer, candidates)
    with evaluating(tracer.adapter.model):
        fit, fitted = timed(lambda: tracer.perturber(candidates))
    trace, traced = timed(lambda: tracer.score(queries, candidates))
    size = bytes_of_model(tracer.adapter.model)
    return {
        "model_gb": round(size / GB, 3), "plain_gb": round(peak / GB, 3),
        "fit_ratio": round(fitted / peak, 3), "trace_ratio": round(traced / peak, 3),
        "plain_seconds": round(plain, 1), "fit_in_passes": round(fit / plain, 2),
        "trace_in_passes": round(trace / plain, 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
