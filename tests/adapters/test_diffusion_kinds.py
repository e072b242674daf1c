import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_inputs import latents_of
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.drawing import (
    SMALL,
    classes,
    rows,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    unconditional,
)
from tests.helpers.line import assert_same_state, state


@pytest.mark.parametrize("make", [stable_diffusion_xl, stable_diffusion_3])
def test_a_picture_is_traced_to_itself_by_other_architectures(make):
    candidates = rows(5)
    ascent = AscentConfig(radius=0.05, direction="cg", iterations=2)
    adapter = DiffusionAdapter(make(), query_timesteps=8)
    found = ForwardInf(adapter=adapter, ascent=ascent).trace(candidates.select([2]), candidates)
    assert np.isfinite(found.scores).all()
    assert found.ranking(0)[0] == 2


def test_sdxl_is_told_the_size_and_both_embeddings():
    pipe = stable_diffusion_xl()
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.eval()
    adapter = DiffusionAdapter(pipe, timesteps=1)
    batch = adapter.collate(encode(adapter, rows(2), "candidates")[:])
    assert batch["added_cond_kwargs.time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    with torch.no_grad():
        words, _, pooled, _ = pipe.encode_prompt(
            rows(2)["caption"][:], device="cpu", do_classifier_free_guidance=False
        )
    torch.testing.assert_close(batch["encoder_hidden_states"], words)
    torch.testing.assert_close(batch["added_cond_kwargs.text_embeds"], pooled)


def test_flow_matching_loss_is_that_of_training_written_out_by_hand():
    pipe = stable_diffusion_3()
    adapter = DiffusionAdapter(pipe, timesteps=1)
    pipe.transformer.eval()
    batch = adapter.collate(encode(adapter, rows(1), "candidates")[:])
    latents, noise, part = batch["latents"][:, 0], batch["noise"][:, 0, 0], batch["parts"][0, 0, 0]
    with torch.no_grad():
        found = adapter.loss(pipe.transformer, batch)
        velocity = pipe.transformer(
            (1 - part) * latents + part * noise, batch["encoder_hidden_states"], batch["pooled_projections"],
            part[None] * 1000,
        ).sample  # fmt: skip
    torch.testing.assert_close(found, (velocity - (noise - latents)).square().mean()[None] * 64)


def test_the_loss_of_a_class_is_that_of_training_written_out_by_hand():
    pipe = classes()
    adapter = DiffusionAdapter(pipe, timesteps=1)
    pipe.transformer.eval()
    told = rows(2).remove_columns("caption").add_column("label", [7, None])
    batch = adapter.collate(encode(adapter, told, "candidates")[:])
    latents, noise, parts = batch["latents"][:, 0], batch["noise"][:, 0, 0], batch["parts"][:, 0, 0]
    times = (parts * 1000).long()
    a = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    with torch.no_grad():
        found = adapter.loss(pipe.transformer, batch)
        output = pipe.transformer(a**0.5 * latents + (1 - a) ** 0.5 * noise, times, torch.tensor([7, 1000])).sample
    assert output.shape[1] == 8  # the second half are variances
    torch.testing.assert_close(found, (output[:, :4] - noise).square().mean((1, 2, 3)) * 64)


def test_a_vae_that_overflows_in_float16_runs_in_float32():
    pipe = stable_diffusion()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight *= 2e5
    expected = encoded_latents(pipe)
    pipe.vae.half()
    before = state(pipe.vae)
    pipe.vae.register_to_config(force_upcast=False)
    assert encoded_latents(pipe).isnan().any()
    pipe.vae.register_to_config(force_upcast=True)
    torch.testing.assert_close(encoded_latents(pipe), expected, rtol=1e-2, atol=1e-2)
    assert_same_state(before, state(pipe.vae))


def encoded_latents(pipe):
    adapter = DiffusionAdapter(pipe, timesteps=1)
    return adapter.collate(adapter.encode(adapter.prepare(rows(2))[:]))["latents"]


def test_averaged_weights_of_a_checkpoint_can_be_put_into_the_pipeline(tmp_path):
    pipe = stable_diffusion()
    average = EMAModel(
        pipe.unet.parameters(), decay=0.5, model_cls=UNet2DConditionModel, model_config=pipe.unet.config
    )
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter += 0.1
    average.step(pipe.unet.parameters())
    average.save_pretrained(tmp_path / "unet_ema")  # as diffusers' trainers keep it beside `unet`
    averaged = copy.deepcopy(pipe.unet)
    average.copy_to(averaged.parameters())
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet_ema")
    for expected, found in zip(averaged.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(expected, found)
    expected = DiffusionAdapter(stable_diffusion()).with_model(averaged)
    losses = [LossPass(adapter, rows(3)).base() for adapter in (ForwardInf.from_pipe(pipe).adapter, expected)]
    np.testing.assert_array_equal(*losses)
    assert (losses[0] != LossPass(DiffusionAdapter(stable_diffusion()), rows(3)).base()).all()
    assert np.isfinite(ForwardInf.from_pipe(pipe).trace(rows(1), rows(3)).scores).all()


def test_denoisers_that_read_what_nobody_gives_them_are_refused():
    base = stable_diffusion()
    base.unet.register_to_config(in_channels=9)
    with pytest.raises(TypeError, match="reads 9 channels where the VAE returns 4: inpainting and"):
        DiffusionAdapter(base)
    pipe = unconditional(4)
    with pytest.raises(TypeError, match="LDMPipeline is not supported: it has vqvae"):
        DiffusionAdapter(LDMPipeline(stable_diffusion().vae, pipe.unet, pipe.scheduler))
    pipe = stable_diffusion_3()
    pipe.transformer = PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=4, num_layers=1, caption_channels=4, cross_attention_dim=4,
        sample_size=8, out_channels=4,
    )  # fmt: skip
    with pytest.raises(TypeError, match="PixArtTransformer2DModel is not supported: of transformers"):
        DiffusionAdapter(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_embed_type": "timestep"}, "it reads classes of class_embed_type='timestep'"),
        ({"num_class_embeds": 3}, "it reads a class besides the caption"),
        ({"time_cond_proj_dim": 8}, "it reads the scale of guidance"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 8}, "it reads conditions of addition_embed_type='image'"),
        ({"encoder_hid_dim_type": "text_proj"}, "it reads conditions of encoder_hid_dim_type='text_proj'"),
    ],
)
def test_denoisers_with_inputs_besides_captions_are_refused(options, message):
    pipe = stable_diffusion()
    pipe.unet.register_to_config(**options)
    with pytest.raises(TypeError, match=f"UNet2DConditionModel is not supported: {message}"):
        DiffusionAdapter(pipe)


def unet_of_classes():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, attention_head_dim=4, num_class_embeds=3, **SMALL, **blocks
    )
    return DDPMPipeline(unet, DDPMScheduler())


def test_a_unet_of_classes_reads_labels():
    adapter = DiffusionAdapter(unet_of_classes(), timesteps=2)
    data = rows(3).remove_columns("caption").add_column("label", [0, 2, 1])
    batch = adapter.collate(adapter.encode(data[:]))
    found = adapter.loss(adapter.model, batch)
    for i, label in enumerate([0, 2, 1]):
        noise, parts = batch["noise"][i, 0], batch["parts"][i, 0]
        times = (parts * 1000).long()
        noisy = DDPMScheduler().add_noise(batch["latents"][i].expand(2, -1, -1, -1), noise, times)
        predicted = adapter.model(noisy, times, class_labels=torch.tensor([label] * 2)).sample
        expected = (predicted - noise).square().mean(dim=(0, 1)).sum()
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(ForwardInf(adapter=adapter).trace(data.select([1]), data).scores).all()
    for label in (3, None):
        odd = rows(2).remove_columns("caption").add_column("label", [0, label])
        with pytest.raises(ValueError, match=f"holds {label} in row 1; the model's classes are the integers from 0"):
            ForwardInf(adapter=adapter).trace(data.select([0]), odd)
    with pytest.raises(NotImplementedError, match="DDPMPipeline does not draw by class: give queries their `image`"):
        adapter.answer({"label": [1]})


def test_latents_are_scaled_by_channel_where_the_vae_says_so():
    pipe, mean, deviation = stable_diffusion(), [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 4.0]
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = pipe.vae.encode(image).latent_dist.mode()
    pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation, shift_factor=7.0)
    found = latents_of(pipe.vae, image.numpy())
    by_channel = [(plain[0, c] - mean[c]) / deviation[c] * pipe.vae.config.scaling_factor for c in range(4)]
    torch.testing.assert_close(found[0], torch.stack(by_channel))
