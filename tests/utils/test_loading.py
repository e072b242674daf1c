import pytest
import torch
from transformers import AutoConfig

from hf_forward_inf import ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter, ImageClassificationAdapter, SequenceClassificationAdapter
from hf_forward_inf.utils.loading import classes_for, is_diffusion_folder, load_model
from tests.adapters.test_sequence_classification import classifier, tokenizer
from tests.helpers.images import processor, vision_transformer


@pytest.mark.parametrize(
    ("saved", "kind", "model", "prepares"),
    [
        ("BertForSequenceClassification", "bert", "AutoModelForSequenceClassification", "AutoTokenizer"),
        ("BertForTokenClassification", "bert", "AutoModelForTokenClassification", "AutoTokenizer"),
        ("BertForMaskedLM", "bert", "AutoModelForMaskedLM", "AutoTokenizer"),
        ("ViTForImageClassification", "vit", "AutoModelForImageClassification", "AutoImageProcessor"),
        ("LlavaForConditionalGeneration", "llava", "AutoModelForImageTextToText", "AutoProcessor"),
        ("T5ForConditionalGeneration", "t5", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
        ("LlamaForCausalLM", "llama", "AutoModelForCausalLM", "AutoTokenizer"),
    ],
)
def test_a_model_is_loaded_with_the_head_that_it_was_saved_with(saved, kind, model, prepares):
    config = AutoConfig.for_model(kind)
    config.architectures = [saved]
    assert [one.__name__ for one in classes_for(config)] == [model, prepares]


@pytest.mark.parametrize(
    ("model", "prepares", "adapter"),
    [
        (vision_transformer, processor, ImageClassificationAdapter),
        (classifier, tokenizer, SequenceClassificationAdapter),
    ],
)
def test_a_saved_classifier_is_traced_by_its_adapter(model, prepares, adapter, tmp_path):
    saved = model()
    for one in (saved, prepares()):
        one.save_pretrained(tmp_path)
    tracer = ForwardInf.from_pretrained(tmp_path)
    assert type(tracer.adapter) is adapter and not tracer.adapter.model.training
    for own, loaded in zip(saved.parameters(), tracer.adapter.model.parameters(), strict=True):
        assert torch.equal(own, loaded)


def test_a_saved_diffusion_pipeline_is_traced_by_its_adapter(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from tests.helpers.drawing import stable_diffusion

    stable_diffusion().save_pretrained(tmp_path)
    assert is_diffusion_folder(str(tmp_path))
    assert isinstance(ForwardInf.from_pretrained(tmp_path, strategy="full").adapter, DiffusionAdapter)


@pytest.mark.parametrize("load", [load_model, ForwardInf.from_pretrained, is_diffusion_folder])
def test_a_path_where_nothing_is_is_named(load):
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder \./nowhere, and a model on the"):
        load("./nowhere")
