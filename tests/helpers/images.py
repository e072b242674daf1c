"""Pictures of random pixels, and small untrained classifiers of them."""

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


def picture(i, mode="RGB", size=8):
    pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Pillow.fromarray(pixels).convert(mode)


def rows(count, first=0, mode="RGB"):
    numbers = range(first, first + count)
    return Dataset.from_dict(
        {"image": [picture(i, mode) for i in numbers], "label": [i % 3 for i in numbers]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )


def network(channels=3, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


def tensors(data):
    pixels = np.stack([np.asarray(image) for image in data["image"]])
    return torch.tensor(pixels).permute(0, 3, 1, 2) / 255, torch.tensor(data["label"][:])


def vision_transformer(labels=3):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=labels,
    )  # fmt: skip
    return ViTForImageClassification(config)


def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8})
