import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import PreferenceAdapter
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.curvature.gauss_newton import GaussNewton
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils.models import evaluating
from tests.helpers.causal import FACTS, train_tokens, untrained
from tests.helpers.line import assert_same_state, state

BETA = 0.7
PLAIN = AscentConfig(direction="gradient", radius=0.3)


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


def moved(network, seed=1, size=0.05):
    """Another model near the first: as if it had been trained."""
    other = copy.deepcopy(network)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=draw)
    return other


@pytest.fixture(params=["llama", "gpt2"])
def reference(request, tokens):
    return untrained(request.param, len(tokens))


@pytest.fixture
def network(reference):
    return moved(reference)


@pytest.fixture
def adapter(network, reference, tokens):
    return PreferenceAdapter(network, tokens, reference_model=reference, beta=BETA)


@pytest.fixture(scope="module")
def pairs():
    wrong = [" I say it is Rome.", " Lima", " It is the city of Havana, which is in Cuba.", " No.", " It is Peru."]
    return Dataset.from_dict({
        "prompt": [f"What is the capital of {place}?" for place, _ in FACTS],
        "chosen": [f" It is {city}." for _, city in FACTS],
        "rejected": wrong,
    })  # fmt: skip


@pytest.fixture(scope="module")
def talks(pairs):
    def turn(role, content):
        return [{"role": role, "content": content.strip()}]

    return Dataset.from_list([
        {"prompt": turn("user", row["prompt"]), "chosen": turn("assistant", row["chosen"]),
         "rejected": turn("assistant", row["rejected"])}
        for row in pairs
    ])  # fmt: skip


def log_likelihood(model, tokens, prompt, completion):
    before, ids = (torch.tensor([tokens(text)["input_ids"]]) for text in (prompt, prompt + completion + "<end>"))
    logits = model(ids).logits[0, before.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, before.shape[1] :, None]).sum()


def pair_loss(network, reference, tokens, row):
    def margin(model):
        chosen, rejected = (log_likelihood(model, tokens, row["prompt"], row[half]) for half in ("chosen", "rejected"))
        return chosen - rejected

    return -F.logsigmoid(BETA * (margin(network) - margin(reference).detach()))


def scores_after_a_step(network, names, loss, losses, radius=0.3):
    own = dict(network.named_parameters())
    for name in names:
        own[name].requires_grad_()
    slopes = torch.autograd.grad(loss(), [own[name] for name in names], materialize_grads=True)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    with torch.no_grad():
        before, theta = losses(), {name: own[name].clone() for name in names}
        for name, slope in zip(names, slopes, strict=True):
            own[name] += radius * slope / length
        after = losses()
        for name in names:
            own[name].copy_(theta[name])
    return [a - b for a, b in zip(after, before, strict=True)]


def trl_losses(model, reference, tokens, rows):
    """The loss that TRL's trainer computes of each row, alone."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    tokens = copy.deepcopy(tokens)
    tokens.pad_token = tokens.eos_token
    config = trl.DPOConfig(
        output_dir="unused", beta=BETA, use_cpu=True, report_to=[], max_length=None, disable_dropout=True, bf16=False
    )
    trainer = trl.DPOTrainer(
        copy.deepcopy(model), copy.deepcopy(reference), args=config, train_dataset=rows, processing_class=tokens
    )
    found = []
    with evaluating(trainer.model), torch.no_grad():
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            found.append(trainer.compute_loss(trainer.model, batch).item())
    return found


def test_the_loss_is_that_of_plain_torch_row_by_row(adapter, network, reference, tokens, pairs):
    losses = adapter.loss(network, adapter.collate(adapter.encode(pairs[:])))
    for row, loss in zip(pairs, losses, strict=True):
        torch.testing.assert_close(pair_loss(network, reference, tokens, row), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["texts", "messages", "without a prompt", "messages without a prompt"])
def test_the_loss_is_trls(tokens, pairs, talks, form):
    reference = untrained("llama", len(tokens))
    network = moved(reference)
    adapter = PreferenceAdapter(network, tokens, reference_model=reference, beta=BETA)
    # One answer grows over the end of its prompt, the other does not.
    grown = {"prompt": "What is the capital of Italy? It is Rom", "chosen": "e.", "rejected": "ania."}
    assert tokens(grown["prompt"])["input_ids"][-1] not in tokens(grown["prompt"] + "e.")["input_ids"]
    rows = talks if "messages" in form else Dataset.from_list([*pairs, grown])
    if "without" in form:
        rows = rows.map(
            lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}, remove_columns=["prompt"]
        )
    losses = adapter.loss(network, adapter.collate(adapter.encode(rows[:])))
    np.testing.assert_allclose(losses.detach(), trl_losses(network, reference, tokens, rows), rtol=1e-4, atol=1e-5)


def with_lora(base):
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))


def test_the_reference_of_a_peft_model_is_its_base(tokens, pairs):
    base = untrained("llama", len(tokens))
    model = with_lora(copy.deepcopy(base)).eval()
    model.base_model.model.lm_head.weight.requires_grad_()
    before = state(model)
    adapter = PreferenceAdapter(model, tokens, beta=BETA)
    losses = adapter.loss(model, adapter.collate(adapter.encode(pairs[:])))
    assert_same_state(before, state(model))
    for row, loss in zip(pairs, losses, strict=True):
        torch.testing.assert_close(pair_loss(model, base, tokens, row), loss, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses.detach(), trl_losses(model, base, tokens, pairs), rtol=1e-4, atol=1e-5)


def test_an_adapter_that_training_started_from_is_the_reference(tokens, pairs):
    model = with_lora(untrained("llama", len(tokens))).eval()
    start = copy.deepcopy(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name in [name for name, _ in model.named_parameters() if ".default." in name]:
        trained = model.get_parameter(name).data
        model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(trained)
        trained.mul_(1.5)
    adapter = PreferenceAdapter(model, tokens, beta=BETA)
    losses = adapter.loss(model, adapter.collate(adapter.encode(pairs[:])))
    assert model.active_adapter == "default"
    for row, loss in zip(pairs, losses, strict=True):
        torch.testing.assert_close(pair_loss(model, start, tokens, row), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modules", [["all"], None])
def test_scores_are_those_of_a_step_along_the_pairs_loss(adapter, network, reference, tokens, pairs, modules):
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.3, modules=modules))
    found = tracer.trace(pairs.select([1]), pairs).scores[0]
    wanted = scores_after_a_step(
        network, names_for(adapter, tracer.ascent),
        lambda: pair_loss(network, reference, tokens, pairs[1]),
        lambda: [pair_loss(network, reference, tokens, row).item() for row in pairs],
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("contrast", [None, " It is Havana."])
def test_an_output_is_explained_by_pairs(adapter, network, reference, tokens, pairs, contrast):
    query = {"prompt": "What is the capital of Peru?", "completion": " It is Lima."}
    tracer = ForwardInf(adapter=adapter, ascent=PLAIN)
    asked = Dataset.from_list([query if contrast is None else {**query, "contrast": contrast}])

    def loss():
        said = -log_likelihood(network, tokens, query["prompt"], query["completion"])
        return said if contrast is None else said + log_likelihood(network, tokens, query["prompt"], contrast)

    wanted = scores_after_a_step(
        network, names_for(adapter, tracer.ascent), loss,
        lambda: [pair_loss(network, reference, tokens, row).item() for row in pairs],
    )  # fmt: skip
    np.testing.assert_allclose(tracer.trace(asked, pairs).scores[0], wanted, rtol=2e-3, atol=2e-4)


def test_the_reference_is_never_perturbed(tokens, pairs):
    model = with_lora(untrained("llama", len(tokens))).eval()
    base = copy.deepcopy(model).unload()
    ascent = AscentConfig(direction="gradient", radius=0.3, modules=["*layers.1.mlp*"])
    adapter = PreferenceAdapter(model, tokens, beta=BETA)
    found = ForwardInf(adapter=adapter, ascent=ascent).trace(pairs.select([0]), pairs).scores[0]
    wanted = scores_after_a_step(
        model, names_for(adapter, ascent),
        lambda: pair_loss(model, base, tokens, pairs[0]),
        lambda: [pair_loss(model, base, tokens, row).item() for row in pairs],
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


def test_products_with_the_curvature_are_those_of_logistic_regression(adapter, network, reference, tokens, pairs):
    names = [name for name, _ in network.named_parameters() if ".1." in name]
    own = dict(network.named_parameters())
    draw = torch.Generator().manual_seed(0)
    vector = [torch.randn(own[name].shape, generator=draw) for name in names]
    found = GaussNewton(adapter, [adapter.collate(adapter.encode(pairs[:]))], names)(vector)
    wanted = [torch.zeros_like(part) for part in vector]
    for row in pairs:
        loss = pair_loss(network, reference, tokens, row)
        margin = -torch.log(torch.expm1(loss))  # the inverse of the loss
        slopes = torch.autograd.grad(margin, [own[name] for name in names])
        chance = margin.sigmoid().item()
        along = sum((slope * part).sum() for slope, part in zip(slopes, vector, strict=True))
        for sum_, slope in zip(wanted, slopes, strict=True):
            sum_ += chance * (1 - chance) * along * slope / len(pairs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def test_drawn_gradients_have_mean_zero_and_the_losss_curvature(adapter):
    margins = torch.tensor([[-1.0], [0.3], [2.0]]).expand(3, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([adapter.sampled_output_gradients(margins, generator) for _ in range(20_000)])
    chances = margins.sigmoid()
    torch.testing.assert_close(drawn.mean(0), torch.zeros_like(margins), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.square().mean(0), chances * (1 - chances), rtol=0.05, atol=0)


def test_preferences_diverge_as_bernoulli_variables(adapter):
    before, after = torch.tensor([[0.5], [-1.0]]), torch.tensor([[0.1], [2.0]])
    p, q = (torch.distributions.Bernoulli(logits=margins[:, 0]) for margins in (before, after))
    wanted = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(adapter.divergence(before, after), wanted)


@pytest.mark.filterwarnings("ignore:.*are too few for the factors")
@pytest.mark.parametrize("direction", ["kfac", "ekfac", "cg"])
def test_every_direction_finds_the_pair_itself(adapter, pairs, direction):
    ascent = AscentConfig(direction=direction, radius=0.1, sample=8)
    found = ForwardInf(adapter=adapter, ascent=ascent).trace(pairs, pairs)
    assert (found.scores.diagonal() > 0).all()
    assert [found.ranking(i)[0] for i in range(len(pairs))] == list(range(len(pairs)))


def test_first_order_scores_are_products_of_the_pairs_gradients(adapter, network, reference, tokens, pairs):
    names = [name for name, _ in network.named_parameters() if ".1." in name]
    found = TracIn(adapter=adapter, similarity="dot", modules=names).trace(pairs.select([2]), pairs).scores[0]
    parameters = [network.get_parameter(name) for name in names]
    slopes = [torch.autograd.grad(pair_loss(network, reference, tokens, row), parameters) for row in pairs]
    wanted = [sum((a * b).sum().item() for a, b in zip(slopes[2], other, strict=True)) for other in slopes]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_margins_under_the_reference_are_cached_until_its_weights_change(adapter, network, reference, tokens, pairs):
    before = LossPass(adapter, pairs).base()
    with torch.no_grad():
        next(iter(reference.parameters())).mul_(2)
    after = LossPass(adapter, pairs).base()
    wanted = [pair_loss(network, reference, tokens, row).item() for row in pairs]
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, wanted, rtol=1e-4, atol=1e-5)


def test_prompts_are_answered_by_the_model_and_pairs_are_not(adapter, tokens, pairs):
    tracer = ForwardInf(adapter=adapter, ascent=PLAIN)
    asked = tracer.trace(pairs.select_columns(["prompt"]), pairs)
    assert asked.queries["completion"][:] == adapter.language.answer(pairs.select_columns(["prompt"])[:])
    assert tracer.trace(pairs, pairs).queries.column_names == pairs.column_names


def test_what_is_no_pair_is_refused(adapter, network, tokens, pairs):
    with pytest.raises(ValueError, match="Pairs need columns `chosen` and `rejected`"):
        ForwardInf(adapter=adapter).trace(pairs, pairs.remove_columns("rejected"))
    empty = Dataset.from_list([*pairs.select([0]), {**pairs[1], "rejected": " "}])
    with pytest.raises(ValueError, match="row 1: its `rejected` is empty"):
        ForwardInf(adapter=adapter).trace(pairs, empty)
    with pytest.raises(TypeError, match="is no PEFT model, so its reference is not known"):
        PreferenceAdapter(network, tokens)
    with pytest.raises(ValueError, match="reference_model is the model itself"):
        PreferenceAdapter(network, tokens, reference_model=network)
