"""A folder with small models and data, under the names that the pages of the documentation use."""

import json
import os

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.toys.tiny_models import fit
from tests.helpers import causal, drawing, images

COUNTRIES = [*causal.FACTS, ("Australia", "Sydney"), ("Australia", "Sydney"), ("Ghana", "Accra"), ("Japan", "Tokyo")]
WORDINGS = ("What is the capital of {}?", "Which city is the capital of {}?")
PEFT = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def conversation(asked, said):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{said}."}]}


def chats():
    return [conversation(form.format(place), city) for place, city in COUNTRIES for form in WORDINGS]


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def chat_model(folder):
    """A Llama that has learned a few chats, its LoRA, its training rows, and questions."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    tokenizer = causal.train_tokens()
    torch.manual_seed(0)
    sizes = {**causal.SIZE, "max_position_embeddings": 128}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes)
    )
    fit(CausalLMAdapter(model, tokenizer), Dataset.from_list(chats()), 40, 1e-2, batch_length=400, quiet=True)
    for part in (model.eval(), tokenizer):
        part.save_pretrained(folder / "my-model")
    lora = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "my-model"), LoraConfig(**PEFT))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    lora.peft_config["default"].base_model_name_or_path = str(folder / "my-model")
    lora.save_pretrained(folder / "my-lora")
    tokenizer.save_pretrained(folder / "my-lora")
    write_rows(folder / "train.jsonl", chats())
    asked = [
        {"messages": conversation(WORDINGS[0].format(place), "")["messages"][:1]} for place in ("Australia", "Peru")
    ]
    write_rows(folder / "questions.jsonl", asked)


def pictures(folder):
    """A diffusion pipeline, and captioned pictures."""
    drawing.stable_diffusion().save_pretrained(folder / "my-pipeline")
    write_rows(folder / "captions.jsonl", [{"caption": "a red square"}])
    (folder / "pictures").mkdir()
    rows = drawing.rows(6)
    for i, row in enumerate(rows):
        row["image"].save(folder / "pictures" / f"{i}.png")
    write_rows(
        folder / "pictures" / "metadata.jsonl",
        [{"file_name": f"{i}.png", "caption": row["caption"]} for i, row in enumerate(rows)],
    )


def classifiers(folder):
    """Classifiers of images and texts, and labelled images."""
    from transformers import ViTImageProcessorPil

    images.vision_transformer().save_pretrained(folder / "my-classifier")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder / "my-classifier")
    for i, row in enumerate(images.rows(9)):
        place = folder / "photos" / "train" / ("cat", "dog", "owl")[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{i}.png")
    tokenizer = causal.train_tokens()
    tokenizer.pad_token = "<end>"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=2, **sizes)).save_pretrained(
        folder / "my-text-classifier"
    )
    tokenizer.save_pretrained(folder / "my-text-classifier")


def linked(playground, folder):
    """Make a folder in which a page may write, with all that is in the playground."""
    for path in playground.iterdir():
        os.symlink(path, folder / path.name)
