import copy
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDPMScheduler, UNet2DConditionModel

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_noise import Flow, draw
from hf_forward_inf.ascent.parameters import call, names_for
from hf_forward_inf.ascent.steps import Perturbation
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.drawing import counted, rows, square, stable_diffusion, stable_diffusion_3, unconditional
from tests.helpers.line import assert_same_state, state


def losses(adapter, dataset):
    with torch.no_grad():
        return LossPass(adapter, dataset).base()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_training_written_out_by_hand(kind):
    pipe = stable_diffusion(kind)
    for module in (pipe.vae, pipe.unet, pipe.text_encoder):
        module.eval()
    adapter = DiffusionAdapter(pipe, timesteps=4)
    dataset = rows(2)
    found = losses(adapter, dataset)
    features = encode(adapter, dataset, "candidates")[:]
    batch = adapter.collate(features)
    alphas = DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
    for i in range(2):
        image = torch.tensor(np.array(square(i))).permute(2, 0, 1)[None] / 127.5 - 1
        ids = pipe.tokenizer(dataset[i]["caption"], padding="max_length", max_length=6, return_tensors="pt").input_ids
        expected = []
        with torch.no_grad():
            latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
            words = pipe.text_encoder(ids)[0]
            for part, noise in zip(batch["parts"][i, 0], batch["noise"][i, 0], strict=True):
                t = int(part * 1000)
                a, noise = alphas[t], noise[None]
                target = {
                    "epsilon": noise,
                    "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * latents,
                    "sample": latents,
                }
                out = pipe.unet(a**0.5 * latents + (1 - a) ** 0.5 * noise, t, words).sample
                expected.append((out - target[kind]).square().mean().item() * 64)
        np.testing.assert_allclose(found[i], np.mean(expected), rtol=1e-5)
    terms = adapter.term_losses(pipe.unet, batch)
    assert terms.shape == (2, 64) and len(adapter.term_texts(features)[0]) == 64
    np.testing.assert_allclose(terms.sum(1).detach(), found, rtol=1e-5)


def test_flow_matching_goes_straight_from_image_to_noise():
    class Scheduler:
        class config:
            num_train_timesteps = 1000

    flow, image, noise = Flow(Scheduler()), torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    times = flow.times(torch.tensor([0.25, 1.0]))
    assert times.tolist() == [250, 1000]
    assert flow.noisy(image, noise, times)[:, 0, 0, 0].tolist() == [0.25, 1.0]
    assert flow.target(image, noise, times).eq(1).all()


def test_times_are_stratified_and_repeatable():
    parts, noise = draw(7, 8, (1, 4, 4))
    assert (parts * 8).long().tolist() == list(range(8))
    again, same = draw(7, 8, (1, 4, 4))
    assert torch.equal(parts, again) and torch.equal(noise, same)
    assert not torch.equal(noise, draw(8, 8, (1, 4, 4))[1])


def test_order_company_and_sharding_change_nothing():
    adapter = DiffusionAdapter(stable_diffusion(), timesteps=2)
    dataset = rows(7)
    together = losses(adapter, dataset)
    shuffled = losses(adapter, dataset.select([6, 2, 0, 1, 5, 3, 4]))
    np.testing.assert_allclose(shuffled, together[[6, 2, 0, 1, 5, 3, 4]], rtol=1e-5)
    alone = LossPass(adapter, dataset, max_batch_length=1).base()
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    assert not np.allclose(losses(DiffusionAdapter(adapter.pipe, timesteps=2, seed=1), dataset), together, rtol=1e-3)


def test_the_encoders_run_once_and_the_model_is_restored_bit_for_bit():
    pipe = stable_diffusion()
    pipe.vae.train()
    vae, text = counted(pipe.vae, "encode"), counted(pipe.text_encoder)
    unet, before = counted(pipe.unet), {name: state(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")}
    tracer = ForwardInf.from_pipe(pipe, ascent=AscentConfig(direction="gradient", radius=0.1))
    candidates = rows(6)
    tracer.trace(candidates.select([1]), candidates)
    assert sum(vae) == sum(text) == 7
    passed = sum(unet)
    tracer.trace(candidates.select([4]), candidates)
    assert sum(vae) == sum(text) == 8  # the query's own picture, no candidate's
    assert sum(unet) - passed == 2 * 32 + 6 * 8  # ascent, in parts that run twice, and one pass over the candidates
    tracer.trace(candidates.select([4]), candidates)
    assert sum(vae) == 8
    for name, kept in before.items():
        assert_same_state(kept, state(getattr(pipe, name)))


@pytest.mark.parametrize("direction", ["gradient", "cg"])
def test_a_picture_is_traced_to_itself(direction):
    pipe = stable_diffusion("v_prediction")
    candidates = rows(8)
    # An untrained model knows a picture by its noise alone.
    adapter = DiffusionAdapter(pipe, query_timesteps=8)
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(radius=0.05, direction=direction))
    found = tracer.trace(candidates.select([2, 5]), candidates)
    assert [found.ranking(i)[0] for i in range(2)] == [2, 5]
    found = tracer.with_options(units="loss").trace(candidates.select([2, 5]), candidates)
    explained = tracer.explain(found.keep(3), 2)
    for row in explained.details:
        np.testing.assert_allclose(np.sum(row["term_scores"]), found.scores[row["query"], row["candidate"]], rtol=1e-3)


def test_by_default_the_step_is_corrected_by_curvature_and_as_long_as_the_weights_allow():
    pipe, candidates = stable_diffusion("v_prediction"), rows(8)
    tracer = ForwardInf.from_pipe(pipe)
    length = {"radius": 1e-3, "relative": True}
    assert tracer.ascent == AscentConfig(direction="cg", damping=0.01, sample=128, **length).completed()
    gradient = tracer.with_options(ascent=AscentConfig(direction="gradient")).ascent
    assert gradient == AscentConfig(direction="gradient", **length).completed()  # the length is the adapter's too
    weights = torch.cat([p.detach().flatten() for p in pipe.unet.parameters()]).norm().item()
    absolute = replace(tracer.ascent, radius=1e-3 * weights, relative=False)
    queries = candidates.select([2, 5, 6])
    found = tracer.trace(queries, candidates)
    np.testing.assert_allclose(
        found.scores, tracer.with_options(ascent=absolute).trace(queries, candidates).scores, rtol=1e-2, atol=1e-4
    )
    assert [found.ranking(i)[0] for i in range(3)] == [2, 5, 6]


@pytest.mark.parametrize(
    ("modules", "pattern"),
    [(["*.attn2"], r".*\.attn2\..*"), (["up_blocks"], r"up_blocks\..*"), (["up_blocks.*.attn2"], r"up_.*\.attn2\..*")],
)
def test_parts_of_the_denoiser_can_be_chosen(modules, pattern):
    pipe, candidates = stable_diffusion(), rows(6)
    own = dict(pipe.unet.named_parameters())
    ascent = AscentConfig(direction="gradient", radius=0.05, modules=modules)
    tracer = ForwardInf(adapter=DiffusionAdapter(pipe, query_timesteps=8), ascent=ascent)
    names = names_for(tracer.adapter, tracer.ascent)
    assert 0 < len(names) < len(own) and names == [name for name in own if re.fullmatch(pattern, name)]
    query = encode(tracer.adapter, candidates.select([2]), "queries")[:]
    (theta,) = Perturbation(tracer.adapter, query, names, tracer.ascent).thetas
    assert theta.keys() == set(names)
    moved = torch.stack([(theta[name] - own[name]).norm() for name in names]).norm()
    assert moved.item() == pytest.approx(0.05, rel=1e-3)
    assert tracer.trace(candidates.select([2]), candidates).ranking(0)[0] == 2


def test_predictions_split_the_loss_and_leave_out_what_cannot_be_read():
    adapter = DiffusionAdapter(stable_diffusion(), timesteps=1)
    broken = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}], "caption": ["a red square"]})
    features = [adapter.encode(adapter.prepare(part)[:]) for part in (rows(3), broken)]
    assert features[0]["unreadable"] == [""] * 3 and "Pillow does not know its format" in features[1]["unreadable"][0]
    batch = adapter.collate({key: features[0][key] + features[1][key] for key in features[0]})
    outputs, loss = adapter.outputs_and_loss(adapter.model.eval(), batch)
    assert outputs.shape == (3 * 64, 4)
    torch.testing.assert_close(loss(outputs), adapter.loss(adapter.model, batch)[:3].sum())
    slopes = adapter.sampled_output_gradients(torch.zeros(20000, 4), torch.Generator().manual_seed(0))
    assert slopes.square().mean().item() == pytest.approx(2 / 4, rel=0.02)


def test_a_query_steps_along_the_gradient_at_timesteps_of_its_own():
    pipe, candidates = stable_diffusion(), rows(5)
    query = candidates.select([3])
    found = {}
    for count in (3, 6):
        adapter = DiffusionAdapter(pipe, timesteps=2, query_timesteps=count)
        tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.05), units="loss")
        (theta,) = tracer.perturber(candidates).perturbation(encode(adapter, query, "queries")[:]).thetas
        as_query = DiffusionAdapter(pipe, timesteps=count)
        batch = as_query.collate(encode(as_query, query, "candidates")[:])
        if count == 6:  # a multiple: the query's noise contains that of its own picture as a candidate
            asked = adapter.for_queries(())
            batch = asked.collate(encode(asked, query, "candidates")[:])
            few = adapter.collate(encode(adapter, query, "candidates")[:])
            for name in ("noise", "parts"):
                torch.testing.assert_close(batch[name][:, :, :2], few[name], rtol=0, atol=0)
            assert sorted((batch["parts"].flatten() * 6).long().tolist()) == list(range(6))
        own = {name: pipe.unet.get_parameter(name) for name in theta}
        slopes = torch.autograd.grad(as_query.loss(pipe.unet.eval(), batch).sum(), list(own.values()))
        length = torch.cat([slope.flatten() for slope in slopes]).norm()
        for (name, before), slope in zip(own.items(), slopes, strict=True):
            torch.testing.assert_close(theta[name] - before, 0.05 * slope / length, atol=1e-6, rtol=1e-3)
        batch = adapter.collate(encode(adapter, candidates, "candidates")[:])
        after = adapter.loss(partial(call, pipe.unet, theta), batch).detach().numpy()
        found[count] = tracer.trace(query, candidates).scores[0]
        np.testing.assert_allclose(found[count], after - losses(adapter, candidates), atol=1e-3)
    assert not np.allclose(found[3], found[6], rtol=1e-2)  # though losses are cached
    assert DiffusionAdapter(pipe, timesteps=4).query_timesteps == 16
    own = DiffusionAdapter(pipe, timesteps=2, query_timesteps=4)
    keys = {one.cache_key for one in (own, own.for_queries(()), DiffusionAdapter(pipe, timesteps=4))}
    assert len(keys) == 3  # what is encoded differs


def test_several_pictures_of_one_prompt_are_one_query_with_their_mean_loss():
    adapter = DiffusionAdapter(stable_diffusion(), timesteps=2)
    caption = "a red square"
    many = Dataset.from_dict(
        {"image": [[square(0), square(3)], [square(6)]], "caption": [caption, caption]},
    )
    single = losses(adapter, Dataset.from_dict({"image": [square(i) for i in (0, 3, 6)], "caption": [caption] * 3}))
    np.testing.assert_allclose(losses(adapter, many), [single[:2].mean(), single[2]], rtol=1e-5)


def test_an_unconditional_model_in_pixels_needs_images_alone():
    adapter = DiffusionAdapter(unconditional(), query_timesteps=8)
    candidates = rows(5).remove_columns("caption")
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.05)).trace(
        candidates.select([3]), candidates
    )
    assert found.ranking(0)[0] == 3


def test_generated_pictures_are_traced():
    tracer = ForwardInf.from_pipe(stable_diffusion())
    tracer.adapter.pipe.set_progress_bar_config(disable=True)
    options = {"num_images": 2, "num_inference_steps": 2, "height": 16, "width": 16}
    found = tracer.trace_generation("a red square", rows(4), top_k=2, **options)
    assert found.scores.shape == (1, 2) and np.isfinite(found.scores).all()
    assert [image.size for image in found.queries[0]["image"]] == [(16, 16)] * 2


def test_one_bad_image_is_named_and_ranked_last_and_the_run_goes_on(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    square(0).save(tmp_path / "good.png")
    files = [str(tmp_path / name) for name in ("good.png", "bad.png", "missing.png")]
    candidates = Dataset.from_dict({"image": files, "caption": ["a red square", None, ""]})
    tracer = ForwardInf.from_pipe(stable_diffusion())
    with pytest.warns(UserWarning) as told:
        found = tracer.trace(candidates.select([0]), candidates)
    texts = " ".join(str(warning.message) for warning in told)
    assert "bad.png" in texts and "missing.png" in texts and "Candidates rows 1, 2 (2 rows)" in texts
    assert np.isnan(found.scores[0]).tolist() == [False, True, True]


@pytest.mark.parametrize(("make", "name"), [(stable_diffusion, "unet"), (stable_diffusion_3, "transformer")])
def test_another_model_of_the_same_kind_draws_by_itself(make, name):
    adapter = DiffusionAdapter(make())
    other = adapter.with_model(copy.deepcopy(adapter.model))
    assert getattr(other.pipe, name) is other.model is not getattr(adapter.pipe, name)
    assert other.cache_key == adapter.cache_key


def test_settings_tell_apart_what_losses_depend_on():
    pipe = stable_diffusion()
    adapters = [partial(DiffusionAdapter, pipe), partial(DiffusionAdapter, stable_diffusion("v_prediction"))]
    settings = {make(**options).cache_key for make in adapters for options in ({}, {"timesteps": 2}, {"seed": 1})}
    assert len(settings) == 6


def test_what_is_no_diffusion_pipeline_is_refused():
    with pytest.raises(TypeError, match="has no unet or transformer"):
        DiffusionAdapter(object())
    pipe = unconditional()
    pipe.unet = UNet2DConditionModel(block_out_channels=(4, 4), norm_num_groups=2, cross_attention_dim=4,
                                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                                     layers_per_block=1, mid_block_type=None)  # fmt: skip
    with pytest.raises(ValueError, match="states no sample_size"):
        DiffusionAdapter(pipe)
    with pytest.raises(ValueError, match="timesteps=0"):
        DiffusionAdapter(unconditional(), timesteps=0)
    with pytest.raises(ValueError, match="query_timesteps=0 must be at least 1"):
        DiffusionAdapter(unconditional(), query_timesteps=0)
