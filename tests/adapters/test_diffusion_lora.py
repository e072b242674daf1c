"""Denoisers with LoRA from PEFT, and parts of a denoiser."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.drawing import rows, stable_diffusion
from tests.helpers.line import assert_same_state, state

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def pipe():
    """A pipeline whose LoRA is as training would have left it: no part of it is zero."""
    pipe = stable_diffusion()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=ATTENTION))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return pipe


@pytest.fixture
def downloaded(pipe, tmp_path):
    """The same, its LoRA loaded from a file beside the pipeline's own weights."""
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    other = stable_diffusion()
    other.load_lora_weights(tmp_path)
    return other


def perturbed(pipe, **options):
    tracer = ForwardInf.from_pipe(pipe, ascent=AscentConfig(radius=0.5, **options))
    return names_for(tracer.adapter, tracer.ascent)


@pytest.mark.parametrize("kind", ["pipe", "downloaded"])
def test_of_a_denoiser_with_lora_that_alone_is_perturbed(kind, request):
    pipe = request.getfixturevalue(kind)
    expected = [name for name, _ in pipe.unet.named_parameters() if "lora_" in name]
    assert len(expected) == 2 * len(ATTENTION) * 2 * 4  # A and B, self- and cross-attention, of 4 blocks
    assert perturbed(pipe) == expected
    before, candidates = state(pipe.unet), rows(6)
    adapter = DiffusionAdapter(pipe, query_timesteps=8)
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.5)).trace(
        candidates.select([2, 5]), candidates
    )
    assert [found.ranking(i)[0] for i in range(2)] == [2, 5]
    assert_same_state(before, state(pipe.unet))


def test_losses_follow_the_strength_of_a_lora_and_whether_it_is_on(downloaded):
    tracer, candidates = ForwardInf.from_pipe(downloaded), rows(3)

    def losses():
        downloaded.unet.eval()
        return LossPass(tracer.adapter, candidates).base()

    (name,) = downloaded.unet.peft_config
    whole = losses()
    downloaded.set_adapters([name], [0.5])
    half = losses()
    downloaded.disable_lora()
    off = losses()
    assert not np.allclose(whole, half, rtol=1e-4) and not np.allclose(half, off, rtol=1e-4)
    downloaded.unload_lora_weights()
    np.testing.assert_allclose(losses(), off, rtol=1e-6)
    assert perturbed(downloaded) == [name for name, _ in downloaded.unet.named_parameters()]


def test_a_deleted_lora_leaves_the_whole_denoiser_to_perturb(pipe):
    pipe.unet.delete_adapters("default")
    assert perturbed(pipe) == [name for name, _ in pipe.unet.named_parameters()]


@pytest.mark.parametrize(
    ("modules", "part"),
    [(["*attn2*"], ".attn2."), (["up_blocks"], "up_blocks."), (["*attn2.to_k", "*attn2.to_v"], ".attn2.to_")],
)
def test_parts_of_a_denoiser_are_perturbed_by_name(modules, part):
    pipe, candidates = stable_diffusion(), rows(6)
    names = perturbed(pipe, modules=modules)
    assert 0 < len(names) < len(list(pipe.unet.parameters())) and all(part in name for name in names)
    ascent = AscentConfig(direction="gradient", radius=0.05, modules=modules)
    adapter = DiffusionAdapter(pipe, query_timesteps=8)
    found = ForwardInf(adapter=adapter, ascent=ascent).trace(candidates.select([2, 5]), candidates)
    assert [found.ranking(i)[0] for i in range(2)] == [2, 5]


def test_cross_attention_of_a_lora_is_perturbed_by_name(pipe):
    names = perturbed(pipe, modules=["*attn2*lora_*"])
    assert names == [name for name in perturbed(pipe) if "attn2" in name]
