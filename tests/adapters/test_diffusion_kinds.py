import numpy as np
import pytest
import torch

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.candidate_pass import encode
from tests.drawing import rows, stable_diffusion_3, stable_diffusion_xl


@pytest.mark.parametrize("make", [stable_diffusion_xl, stable_diffusion_3])
def test_a_picture_is_traced_to_itself_by_other_architectures(make):
    candidates = rows(5)
    ascent = AscentConfig(radius=0.05, direction="cg", iterations=2)
    found = ForwardInf.from_pipe(make(), ascent=ascent).trace(candidates.select([2]), candidates)
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
