"""Half precisions: what keeps, and what overflows."""

import numpy as np
import pytest
import torch

from hf_forward_inf import AscentConfig, ForwardInf
from tests.drawing import rows, stable_diffusion


def test_what_overflows_in_float16_is_named_and_ranked_last():
    pipe, candidates = stable_diffusion(), rows(6)  # red, green, blue, red, green, blue
    attention = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        words, _ = pipe.encode_prompt(["a red square", "a green square", "a blue square"], "cpu", 1, False)
        red, green, blue = attention.to_k(words).abs().amax((1, 2)).tolist()
        assert red > green > blue
        attention.to_k.weight *= 2 * 65504 / (red + green)  # red alone is beyond float16
        attention.to_q.weight.zero_()
    ascent = AscentConfig(radius=0.5, modules=["conv_out"])
    exact = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([1]), candidates)
    assert np.isfinite(exact.scores).all()
    pipe.unet.half()
    with pytest.warns(UserWarning, match=r"loss of candidates rows 0, 3 \(2 rows\) is NaN or infinite"):
        found = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([1]), candidates)
    assert np.isnan(found.scores[0]).tolist() == [True, False, False, True, False, False]
    assert sorted(found.ranking(0)[-2:]) == [0, 3]
    with pytest.warns(UserWarning, match="gradient of queries row 0 is zero or not finite"):
        found = ForwardInf.from_pipe(pipe, ascent=ascent).trace(candidates.select([0]), candidates)
    assert np.isnan(found.scores).all() and len(found.top(0)) == 0
