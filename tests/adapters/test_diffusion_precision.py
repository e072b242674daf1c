"""Half precisions: what keeps, and what overflows."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from tests.helpers.drawing import rows, stable_diffusion


def test_what_overflows_in_float16_is_named_and_ranked_last():
    pipe, candidates = stable_diffusion(), rows(6)  # red, green, blue, red, green, blue
    attention = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        words, _ = pipe.encode_prompt(["a red square", "a green square", "a blue square"], "cpu", 1, False)
        red, green, blue = attention.to_k(words).abs().amax((1, 2)).tolist()
        assert red > green > blue
        attention.to_k.weight *= 2 * 65504 / (red + green)  # red alone is beyond float16
        attention.to_q.weight.zero_()
    ascent = AscentConfig(direction="gradient", radius=0.5, modules=["conv_out"])
    exact = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([1]), candidates)
    assert np.isfinite(exact.scores).all()
    pipe.unet.half()
    with pytest.warns(UserWarning, match=r"Candidates rows 0, 3 \(2 rows\): the loss is NaN or infinite"):
        found = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([1]), candidates)
    assert np.isnan(found.scores[0]).tolist() == [True, False, False, True, False, False]
    assert sorted(found.ranking(0)[-2:]) == [0, 3]
    with pytest.warns(UserWarning, match="Queries row 0: the gradient is zero or not finite"):
        found = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([0]), candidates)
    assert np.isnan(found.scores).all() and len(found.top(0)) == 0
    with pytest.raises(FloatingPointError, match="load the model in float32 or bfloat16"):
        ForwardInf.from_pipe(pipe).trace(candidates.select([1]), candidates)


@pytest.mark.parametrize("direction", ["gradient", "cg"])
def test_scores_in_bfloat16_are_close_to_those_in_float32(direction):
    pipe, candidates = stable_diffusion(), rows(24)
    half = DiffusionAdapter(stable_diffusion().to(torch.bfloat16)).default_ascent()
    assert half == DiffusionAdapter(pipe).default_ascent() | {"radius": 1e-2}
    ascent = (
        AscentConfig(**half)
        if direction == "cg"
        else AscentConfig(direction="gradient", radius=half["radius"], relative=True)
    )
    queries = candidates.select([2, 5, 10])
    exact = ForwardInf.from_pipe(pipe, ascent=ascent).trace(queries, candidates).scores
    pipe.to(torch.bfloat16)
    found = ForwardInf.from_pipe(pipe, ascent=ascent).trace(queries, candidates).scores
    assert found.dtype == np.float32
    # Weights are random: how near the two come depends on the machine.
    assert min(spearmanr(*pair).statistic for pair in zip(exact, found, strict=True)) > 0.9
    np.testing.assert_array_equal(exact.argmax(axis=1), found.argmax(axis=1))
