from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image as Pillow
from transformers import pipeline

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, PreferenceAdapter, VisionLanguageAdapter, adapter_for
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.line import assert_same_state, state
from tests.helpers.vision import PLACES, pictures, rows_with_pictures, seeing, talk

RADIUS = 0.3


@pytest.fixture(params=PLACES)
def layout(request):
    return request.param


@pytest.fixture
def both(layout):
    return seeing(layout)


@pytest.fixture
def adapter(both):
    return VisionLanguageAdapter(*both)


@pytest.fixture(scope="module")
def rows():
    return rows_with_pictures()


def plain_loss(model, processor, row):
    """The loss of a row's last answer, of the row alone, unpadded, by the whole model."""
    asked, text = (
        processor.apply_chat_template(row["messages"][:stop], tokenize=False, add_generation_prompt=stop == 1)
        for stop in (1, 2)
    )
    images = row["images"] or None
    inputs, before = (processor(text=one, images=images, return_tensors="pt") for one in (text, asked))
    start = before["input_ids"].shape[1]
    logits = model(**inputs, use_cache=False).logits[0, start - 1 : -1]
    return F.cross_entropy(logits, inputs["input_ids"][0, start:], reduction="sum")


def scores_after_a_step(model, names, loss, losses):
    own = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss(), [own[name] for name in names], materialize_grads=True)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    with torch.no_grad():
        before, theta = losses(), {name: own[name].clone() for name in names}
        for name, slope in zip(names, slopes, strict=True):
            own[name] += RADIUS * slope / length
        after = losses()
        for name in names:
            own[name].copy_(theta[name])
    return [a - b for a, b in zip(after, before, strict=True)]


def test_losses_are_those_of_the_model_with_its_processor_row_by_row(both, adapter, rows):
    found = LossPass(adapter, rows).base()
    wanted = [plain_loss(*both, row).item() for row in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    blank = Pillow.new("RGB", (16, 16))
    others = [plain_loss(*both, {**row, "images": [blank] * len(row["images"])}).item() for row in rows]
    assert np.abs(np.array(wanted[:3]) - others[:3]).min() > 1e-3  # pictures matter


def test_tokens_of_pictures_never_count(adapter, rows):
    encoded = adapter.encode(adapter.prepare(rows)[:])
    for ids, labels, images in zip(encoded["input_ids"], encoded["labels"], rows["images"], strict=True):
        places = [place for place, token in enumerate(ids) if token == adapter.image_token_id]
        assert len(places) >= 4 * len(images)
        assert all(labels[place] == -100 for place in places)
        text = [token for token in labels if token != -100]
        assert adapter.tokenizer.decode(text).endswith(("cat.<end>", "dog.<end>", "is.<end>"))


@pytest.mark.parametrize("modules", [None, ["all"]])
def test_scores_are_those_of_a_step_of_the_whole_model(both, rows, modules):
    model, processor = both
    tracer = ForwardInf(model, processor, ascent=AscentConfig(direction="gradient", radius=RADIUS, modules=modules))
    plain_loss(model, processor, rows[0])  # at its first call the vision tower gets hooks of transformers' own
    before = state(model)
    names = names_for(tracer.adapter, tracer.ascent)
    found = tracer.trace(rows, rows).scores
    assert_same_state(before, state(model))
    for i in (0, 2):
        wanted = scores_after_a_step(
            model, names, lambda i=i: plain_loss(model, processor, rows[i]),
            lambda: [plain_loss(model, processor, row).item() for row in rows],
        )  # fmt: skip
        np.testing.assert_allclose(found[i], wanted, rtol=2e-3, atol=5e-4)


def test_the_language_model_is_perturbed_and_the_vision_tower_runs_once(both, adapter, rows):
    names = names_for(adapter, AscentConfig())
    assert names
    late = ("model.language_model.layers.1.", "model.language_model.norm", "lm_head")
    assert all(name.startswith(late) for name in names)
    assert {name for name, _ in both[0].named_parameters() if "vision" in name or "visual" in name} <= set(
        adapter.shared_parameters()
    )
    batch = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    shared = adapter.with_shared(batch, set(names))
    assert "states" in shared
    assert "pixel_values" not in shared


def test_the_default_direction_is_fitted_on_rows_with_pictures(both, rows):
    with pytest.warns(UserWarning, match="too few for the factors"):
        found = ForwardInf(*both).trace(rows, rows)
    assert np.isfinite(found.scores).all()
    assert (found.scores.diagonal() > 0).all()


def test_pictures_are_read_from_columns_and_from_messages(both, adapter, rows):
    picture = pictures(1)[0]
    inside = talk("What is it?", "It is a cat.")
    inside[0]["content"] = [{"type": "image", "image": picture}, *inside[0]["content"]]
    texts = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a cat."}]
    forms = [
        {"messages": talk("What is it?", "It is a cat.", 1), "image": picture},
        {"messages": inside},
        {"messages": texts, "images": [picture]},
        {"prompt": texts[:1], "completion": texts[1:], "images": [picture]},
        {
            "prompt": f"<user>{PLACES['llava' if adapter.image_token == '<image>' else 'qwen2-vl']}What is it?<end>"
            "<assistant>",
            "completion": "It is a cat.",
            "image": picture,
        },
    ]
    wanted = plain_loss(*both, rows[0]).item()
    for form in forms:
        encoded = adapter.encode({name: [value] for name, value in form.items()})
        assert encoded["unreadable"] == [""]
        loss = adapter.loss(adapter.model, adapter.collate(encoded)).item()
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_tokens_and_pictures_are_those_of_trls_collator(both, adapter, rows):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    wanted = DataCollatorForVisionLanguageModeling(both[1])([dict(row) for row in rows])
    found = adapter.collate(adapter.encode(adapter.prepare(rows)[:]))
    assert found.keys() >= wanted.keys()
    for name in wanted.keys() - {"labels"}:
        torch.testing.assert_close(found[name], wanted[name])


def test_a_picture_is_contrasted_and_preferred(both, adapter, rows):
    model, processor = both
    queries = rows.select([0]).add_column("contrast", ["A dog."])
    tracer = ForwardInf(model, processor, ascent=AscentConfig(direction="gradient", radius=RADIUS))
    other = {**rows[0], "messages": talk("What is it?", "A dog.", 1)}
    wanted = scores_after_a_step(
        model, names_for(adapter, tracer.ascent),
        lambda: plain_loss(model, processor, rows[0]) - plain_loss(model, processor, other),
        lambda: [plain_loss(model, processor, row).item() for row in rows],
    )  # fmt: skip
    np.testing.assert_allclose(tracer.trace(queries, rows).scores[0], wanted, rtol=2e-3, atol=5e-4)
    pair = {"chosen": rows[0]["messages"], "rejected": other["messages"], "images": rows[0]["images"]}
    reference, _ = seeing("llava" if adapter.image_token == "<image>" else "qwen2-vl")
    for parameter in reference.parameters():
        parameter.data.mul_(1.1)
    preferring = PreferenceAdapter(model, processor, reference_model=reference, beta=0.5)
    encoded = preferring.encode({name: [value] for name, value in pair.items()})
    margins = [plain_loss(one, processor, other) - plain_loss(one, processor, rows[0]) for one in (model, reference)]
    torch.testing.assert_close(
        preferring.loss(model, preferring.collate(encoded))[0], -F.logsigmoid(0.5 * (margins[0] - margins[1])),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_of_a_peft_model_what_it_has_trained_is_perturbed(both, rows):
    model, processor = both
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    trained = get_peft_model(model, lora).eval()
    tracer = ForwardInf(trained, processor, falls=1, ascent=AscentConfig(direction="gradient", radius=RADIUS))
    names = names_for(tracer.adapter, tracer.ascent)
    assert names
    assert all("lora_" in name for name in names)
    wanted = scores_after_a_step(
        trained, names, lambda: plain_loss(trained, processor, rows[0]),
        lambda: [plain_loss(trained, processor, row).item() for row in rows],
    )  # fmt: skip
    np.testing.assert_allclose(tracer.trace(rows.select([0]), rows).scores[0], wanted, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": talk("What is it?", "A cat.", 2), "images": 1}, "row 1: it has 1 pictures and 2 places"),
        ({"messages": talk("What is it?", "A cat.", 1), "images": 0}, "row 1: it has 0 pictures and 1 places"),
    ],
)
def test_pictures_without_a_place_are_refused_by_row(adapter, rows, row, reason):
    wrong = {**row, "images": pictures(row["images"])}
    both_rows = Dataset.from_list([rows[0], wrong], features=rows.features)
    with pytest.raises(ValueError, match=reason):
        ForwardInf(adapter=adapter).trace(rows, both_rows)


def test_a_row_that_is_too_long_for_its_pictures_is_refused(both, rows):
    adapter = VisionLanguageAdapter(*both, max_length=8)
    with pytest.raises(ValueError, match="a row with pictures is never cut"):
        ForwardInf(adapter=adapter).trace(rows, rows)


@pytest.mark.parametrize("form", ["column", "message"])
def test_a_text_only_adapter_refuses_pictures_by_row(both, rows, form):
    model, processor = both
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    given = rows if form == "column" else rows.remove_columns("images")
    with pytest.raises(ValueError, match=r"row(s)? 0.*pictures"):
        ForwardInf(model, tokenizer).trace(given, given)


@pytest.mark.parametrize("columns", ["input_ids", "inputs_pretokenized"])
def test_pictures_beside_tokens_or_a_seq2seq_models_texts_are_refused(model, tokenizer, queries, columns):
    picture = pictures(1)[0]
    if columns == "input_ids":
        network, processor = seeing("llava")
        given, reader = Dataset.from_list([{"input_ids": [9, 8, 7], "image": picture}]), processor.tokenizer
    else:
        network, reader = model, tokenizer
        given = Dataset.from_list([{**queries[0], "image": picture}])
    with pytest.raises(ValueError, match=r"row 0: it has pictures \(`image`\)"):
        ForwardInf(network, reader).trace(given, given)


def test_a_processor_chooses_the_adapter(both):
    model, processor = both
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    assert isinstance(ForwardInf.from_pipe(pipe).adapter, VisionLanguageAdapter)
    assert isinstance(adapter_for(model, processor), VisionLanguageAdapter)
    assert type(adapter_for(model, processor.tokenizer)) is CausalLMAdapter
    hearing = SimpleNamespace(tokenizer=processor.tokenizer, feature_extractor=object())
    with pytest.raises(TypeError, match="is no tokenizer, nor a processor of texts and images"):
        adapter_for(model, hearing)
