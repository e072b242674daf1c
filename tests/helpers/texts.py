"""A tokenizer with segments, sentences, and scores computed independently: one unpadded row at a time."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "a cat sat on the mat",
    "what is the capital of Spain ?",
    "yes",
    "the capital of Peru is Lima .",
    "maybe the dog looked at the cat",
    "Lima is not the capital of Spain",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = SPECIAL + sorted({word for sentence in SENTENCES for word in sentence.split()})


def tokenizer(**options):
    """Words; pairs are two segments."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **options,
    )  # fmt: skip


def randomised(model):
    """The model with weights large enough that its predictions differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def plain_scores(model, loss_of, query, candidates, radius, names=None):
    """Algorithm 1 in plain torch: one step of this length along the gradient of the query's loss."""
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    gradients = torch.autograd.grad(loss_of(query), parameters, allow_unused=True)
    for p in frozen:
        p.requires_grad_(False)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    with torch.no_grad():
        before = torch.stack([loss_of(row) for row in candidates])
        own = [p.clone() for p in parameters]
        for p, g in zip(parameters, gradients, strict=True):
            p += 0 if g is None else radius / norm * g
        risen = torch.stack([loss_of(row) for row in candidates]) - before
        for p, value in zip(parameters, own, strict=True):
            p.copy_(value)
    return risen.numpy()


def assert_close(found, expected, tolerance=1e-4):
    """Equal up to a share of the largest value."""
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-4  # something moves
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
