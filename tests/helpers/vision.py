"""Tiny vision-language models of two layouts with their processors, and rows with pictures."""

import numpy as np
import torch
from datasets import Dataset, Image, List
from PIL import Image as Pillow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ["<pad>", "<end>", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
TEMPLATE = (
    "{%% for m in messages %%}<{{ m.role }}>{%% for part in m.content %%}{%% if part.type == 'image' %%}%s"
    "{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}<end>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<assistant>{%% endif %%}"
)
PLACES = {"llava": "<image>", "qwen2-vl": "<|vision_start|><|image_pad|><|vision_end|>"}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class WithoutVideos(Qwen2VLProcessor):
    """Its processor of videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return None


def train_tokens():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["What is it? It is a cat. It is a dog. Compare them."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


def seeing(layout):
    """A random model that sees, in eval mode, and its processor."""
    torch.manual_seed(0)
    tokens, template = train_tokens(), TEMPLATE % PLACES[layout]
    text = {"vocab_size": len(tokens), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, **SIZE}
    if layout == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_id=2, image_seq_length=4
        )
        model = LlavaForConditionalGeneration(config)
        pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = LlavaProcessor(
            pictures, tokens, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        vision = {
            "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        config = Qwen2VLConfig(
            text_config={**text, "num_key_value_heads": 4, "rope_parameters": rope}, vision_config=vision,
            image_token_id=3, vision_start_token_id=4, vision_end_token_id=5, video_token_id=6,
        )  # fmt: skip
        model = Qwen2VLForConditionalGeneration(config)
        pictures = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        )
        processor = WithoutVideos(pictures, tokens, None, chat_template=template)
    for parameter in model.parameters():  # so that pictures matter
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval(), processor


def pictures(count=4):
    draw = np.random.default_rng(0)
    sizes = [(16, 16), (30, 20), (24, 40), (17, 17)][:count]
    return [Pillow.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def talk(asked, answer, places=0):
    """A conversation, with places for pictures."""
    content = [{"type": "image", "text": None}] * places + [{"type": "text", "text": asked}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def rows_with_pictures():
    """Rows with one picture, with another size, with two, and with none."""
    one, two, three, four = pictures()
    return Dataset.from_dict(
        {
            "messages": [
                talk("What is it?", "It is a cat.", 1),
                talk("What is it?", "A dog.", 1),
                talk("Compare them.", "It is a dog. It is a cat.", 2),
                talk("What is a dog?", "It is.", 0),
            ],
            "images": [[one], [two], [three, four], []],
        }
    ).cast_column("images", List(Image()))
