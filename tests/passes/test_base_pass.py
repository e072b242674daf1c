import numpy as np
import pytest
import torch

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.baselines import RepresentationSimilarity
from hf_forward_inf.passes.base_pass import BasePass
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.passes.shared_states import SharedStates
from tests.helpers.causal import questions, train_tokens, untrained


@pytest.fixture
def runs(model):
    """Counts the rows that the decoder reads."""
    rows = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_losses_and_hidden_states_are_those_of_one_run_of_the_model(model, tokenizer, candidates, runs):
    base = BasePass(LossPass(Seq2SeqAdapter(model, tokenizer), candidates, max_batch_length=500))
    runs.clear()
    losses, hidden = base.losses, base.hidden
    assert sum(runs) == len(candidates) + 1  # the first row says how long a state is
    for row, loss, state in zip(candidates, losses, hidden.T, strict=True):
        inputs = tokenizer(row["inputs_pretokenized"], return_tensors="pt")
        labels = tokenizer(row["targets_pretokenized"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(**inputs, labels=labels, output_hidden_states=True)
        assert loss == pytest.approx(out.loss.item() * labels.shape[1], rel=1e-4)
        np.testing.assert_allclose(state, out.decoder_hidden_states[-1][0].mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_from_stored_states_a_causal_model_gives_the_same_losses_and_states(layout, tmp_path):
    tokenizer = train_tokens()
    adapter = CausalLMAdapter(untrained(layout, len(tokenizer)), tokenizer)
    run = LossPass(adapter, questions(), cache_dir=tmp_path)
    names = set(dict(adapter.model.named_parameters())) - adapter.shared_parameters()
    states = SharedStates(run, names, 1e6)
    assert states.store is not None
    plain = BasePass(LossPass(adapter, questions(), cache_dir=tmp_path / "other"))
    stored = BasePass(run, states)
    np.testing.assert_allclose(stored.losses, plain.losses, rtol=1e-4)
    np.testing.assert_allclose(stored.hidden, plain.hidden, atol=1e-5)
    assert all(states.store.read(place) is not None for place in range(len(questions())))
    with torch.no_grad():
        again = states.batch(run.features(np.array([3, 0])))
        expected = adapter.run_shared(run.collated(run.features(np.array([3, 0]))))["states"]
    valid = again["attention_mask"].bool()
    torch.testing.assert_close(again["states"][valid], expected[valid], atol=1e-5, rtol=0)


def test_whitened_similarity_is_the_cosine_by_the_candidates_covariance(model, tokenizer, queries, candidates):
    adapter = Seq2SeqAdapter(model, tokenizer)
    one, other = (torch.tensor(BasePass(LossPass(adapter, rows)).hidden.T).double() for rows in (queries, candidates))
    one, other = one - other.mean(0), other - other.mean(0)
    covariance = other.T @ other / len(other)
    metric = torch.linalg.inv(covariance + covariance.trace() / len(covariance) * torch.eye(len(covariance)))
    norms = [(states @ metric * states).sum(1).sqrt() for states in (one, other)]
    expected = one @ metric @ other.T / norms[0][:, None] / norms[1]
    found = RepresentationSimilarity(adapter=adapter, whitened=True).trace(queries, candidates).scores
    np.testing.assert_allclose(found, expected, atol=1e-4)
