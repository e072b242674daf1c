"""Pipelines saved as folders and loaded again, as users have them, traced end to end."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_inputs import denoiser_of
from tests.helpers.drawing import (
    classes,
    counted,
    rows,
    square,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unconditional,
)
from tests.helpers.line import assert_same_state, state

WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def with_clip_tokenizer(folder):
    pipe = stable_diffusion()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return type(pipe)(
        **{**pipe.components, "tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)},
        requires_safety_checker=False,
    )


def loaded(pipe, folder, **options):
    pipe.save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_traced(pipe, candidates, told, **ascent):
    """Its own copy first; nothing but the denoiser runs again; pictures it draws are traced; nothing is changed."""
    # An untrained model knows a picture by its noise alone, all of which it has with as many timesteps.
    adapter = DiffusionAdapter(pipe, query_timesteps=8)
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(radius=0.05, **ascent))
    drawn = tracer.trace_generation(told, candidates, num_images=2, num_inference_steps=2)
    assert [image.size for image in drawn.queries[0]["image"]] == [tracer.adapter.size[::-1]] * 2
    assert np.isfinite(drawn.scores).all()
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "parameters")}
    # (Not before it has drawn: then transformers leaves hooks of its own in some text encoders.)
    before = {name: state(module) for name, module in modules.items()}
    found = tracer.with_options(units="loss").trace(candidates.select([2, 4]), candidates)
    assert np.isfinite(found.scores).all()
    assert [found.ranking(i)[0] for i in range(2)] == [2, 4]
    encoders = [counted(module) for name, module in modules.items() if name.startswith("text_encoder")]
    encoders += [counted(pipe.vae, "encode")] if "vae" in modules else []
    tracer = tracer.with_options(ascent=AscentConfig(direction="gradient", radius=0.05))
    denoised = counted(denoiser_of(pipe))
    tracer.trace(candidates.select([3]), candidates)
    assert [sum(calls) for calls in encoders] == [1] * len(encoders)  # the new query, no candidate
    # The query runs again where weights are found that the model reads outside of their layers.
    assert sum(denoised) in (8 * (1 + len(candidates)), 8 * (2 + len(candidates)))
    for name, kept in before.items():
        assert_same_state(kept, state(modules[name]))


def test_stable_diffusion_with_clips_own_tokenizer(shared, tmp_path):
    if not (shared / "tokenizers" / "clip").exists():
        pytest.skip("no tokenizers/clip in the shared data")
    pipe = loaded(with_clip_tokenizer(shared / "tokenizers" / "clip"), tmp_path)
    assert pipe.tokenizer.model_max_length == 77
    assert_traced(pipe, rows(6), "a red square")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion(prediction, tmp_path):
    assert_traced(loaded(stable_diffusion(prediction), tmp_path), rows(6), "a red square")


def test_stable_diffusion_xl(tmp_path):
    assert_traced(loaded(stable_diffusion_xl(), tmp_path), rows(6), "a red square")


def test_stable_diffusion_3(tmp_path):
    assert_traced(loaded(stable_diffusion_3(), tmp_path, **WITHOUT_T5), rows(6), "a red square", direction="cg")


def test_a_transformer_that_is_told_a_class(tmp_path):
    labels = [0, 1, None, 2, 0, 1]
    candidates = rows(6).remove_columns("caption").add_column("label", labels)
    assert_traced(loaded(classes(), tmp_path), candidates, 1, direction="cg")


def test_an_unconditional_model_draws_without_being_told(tmp_path):
    assert_traced(loaded(unconditional(), tmp_path), rows(6).remove_columns("caption"), None)


def test_a_class_that_the_model_does_not_have_is_named():
    tracer = ForwardInf.from_pipe(classes(3))
    candidates = rows(4).remove_columns("caption").add_column("label", [0, 3, 1, 2])
    with pytest.raises(ValueError, match=r"`label` holds 3 in row 1; the model's classes .* from 0 to 2"):
        tracer.trace(candidates.select([0]), candidates)


def test_pictures_may_be_paths(tmp_path):
    for i in range(4):
        square(i).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    captions = rows(4)["caption"][:]
    tracer = ForwardInf.from_pipe(stable_diffusion(), ascent=AscentConfig(direction="gradient", radius=0.05))
    as_paths = Dataset.from_dict({"image": paths, "caption": captions})
    as_images = as_paths.cast(Features({"image": Image(), "caption": Value("string")}))
    expected = tracer.trace(rows(1, 2), rows(4)).scores
    for candidates in (as_paths, as_images):
        np.testing.assert_allclose(tracer.trace(candidates.select([2]), candidates).scores, expected, rtol=1e-5)
