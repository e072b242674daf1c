import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.ascent.steps import Mirrored, Perturbation
from hf_forward_inf.baselines import FirstOrder
from hf_forward_inf.curvature import gauss_newton as curvature
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.curvature.solvers import conjugate_gradients
from tests.helpers import digits
from tests.helpers.line import assert_same_state, state

CORRECTED = ("kfac", "ekfac", "cg", "pcg")
CANDIDATES = digits.rows(0, 100)
QUERIES = digits.rows(100, 103)


def perturbation(network, rows=(0, 1, 2), **options):
    adapter = TensorAdapter(network)
    config = AscentConfig(**{"sample": 100, "radius": 0.3, "direction": "gradient", **options}).completed()
    names = [name for name, _ in network.named_parameters()]
    direction = direction_for(config, adapter, CANDIDATES, names)
    return Perturbation(adapter, adapter.encode(QUERIES[list(rows)]), names, config, direction)


def steps(network, rows=(0, 1, 2), **options):
    """Each query's step, flat: `[queries, parameters]`."""
    own = dict(network.named_parameters())
    thetas = perturbation(network, rows, **options).thetas
    return torch.stack([torch.cat([(theta[n] - own[n]).flatten() for n in own]) for theta in thetas]).detach()


def gauss_newton_and_gradients(network):
    """The Gauss-Newton matrix entry by entry, and the gradient of each query."""
    own = dict(network.named_parameters())
    data, queries = (rows.with_format("torch")[:] for rows in (CANDIDATES, QUERIES))

    def logits(flat, x):
        parts = flat.split([p.numel() for p in own.values()])
        theta = {name: part.view(p.shape) for (name, p), part in zip(own.items(), parts, strict=True)}
        return torch.func.functional_call(network, theta, (x,))

    theta = torch.cat([p.detach().flatten() for p in own.values()])
    jacobians = torch.func.jacrev(logits)(theta, data["x"])  # [rows, classes, parameters]
    p = logits(theta, data["x"]).softmax(-1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("nap,nab,nbq->pq", jacobians, hessians, jacobians) / len(data["x"])

    def loss(flat, x, label):
        return nn.functional.cross_entropy(logits(flat, x[None]), label[None])

    both = zip(queries["x"], queries["label"], strict=True)
    return matrix, torch.stack([torch.func.grad(loss)(theta, x, label) for x, label in both])


def written_out(network, damping):
    """C^-1 g of each query."""
    matrix, gradients = gauss_newton_and_gradients(network)
    for g in gradients:
        shift = damping * (g @ matrix @ g) / (g @ g)
        yield torch.linalg.solve(matrix + shift * torch.eye(len(g)), g)


def cosines(found, expected):
    return [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(found, expected, strict=True)]


def test_conjugate_gradients_step_along_the_inverse_of_the_gauss_newton_matrix():
    network = digits.perceptron()
    found = steps(network, direction="cg", damping=0.1, iterations=60, tolerance=1e-5)
    assert min(cosines(found, list(written_out(network, 0.1)))) > 0.9999
    torch.testing.assert_close(found.norm(dim=1), torch.full((3,), 0.3))


def shifts_of(matrix, gradients, found):
    """The lambda of each query, where (G + lambda I) x is a multiple of g: x solves the system for it."""
    shifts = []
    for x, g in zip(found, gradients, strict=True):
        sides = torch.stack([matrix @ x, x], dim=1).double()
        factors = torch.linalg.lstsq(sides, g.double()[:, None]).solution[:, 0]
        assert (sides @ factors - g).norm() < 0.01 * g.norm()
        shifts.append((factors[1] / factors[0]).item())
    return shifts


def test_preconditioned_gradients_solve_for_all_queries_with_one_damping():
    network = digits.perceptron()
    matrix, gradients = gauss_newton_and_gradients(network)
    shifts = shifts_of(matrix, gradients, steps(network, direction="pcg", damping=0.1, iterations=25))
    quotients = sorted(((g @ matrix @ g) / (g @ g)).item() for g in gradients)
    assert max(shifts) < 1.05 * min(shifts)
    assert 0.02 * quotients[0] < shifts[0] < 0.5 * quotients[-1]


def far_from_solved(matrix, gradients, found, shift):
    """The error of each step, in the norm of the matrix, and relative to that of the solution; steps of any length."""
    damped = (matrix + shift * torch.eye(len(matrix))).double()
    for g, x in zip(gradients.double(), found.double(), strict=True):
        gained = (g @ x) ** 2 / (x @ damped @ x)  # by the best multiple of x
        yield 1 - (gained / (g @ torch.linalg.solve(damped, g))).item()


def test_five_preconditioned_products_are_nearer_to_the_solution_than_five_plain_ones():
    network = digits.perceptron()
    matrix, gradients = gauss_newton_and_gradients(network)
    for i in range(3):
        one, options = gradients[i : i + 1], {"rows": [i], "damping": 0.03}
        errors = {}
        for direction, enough in (("cg", 60), ("pcg", 25)):
            solved = steps(network, direction=direction, iterations=enough, tolerance=1e-5, **options)
            (shift,) = shifts_of(matrix, one, solved)
            found = steps(network, direction=direction, iterations=5, **options)
            (errors[direction],) = far_from_solved(matrix, one, found, shift)
        assert errors["pcg"] < 0.2 * errors["cg"]


def test_queries_that_are_traced_together_share_their_products(monkeypatch):
    network, products = digits.perceptron(), []
    multiply = curvature.GaussNewton.__call__
    monkeypatch.setattr(curvature.GaussNewton, "__call__", lambda *a: products.append(1) or multiply(*a))
    matrix, gradients = gauss_newton_and_gradients(network)
    together = steps(network, direction="pcg", damping=0.03, iterations=2)
    assert len(products) == 6
    alone = torch.cat([steps(network, [i], direction="pcg", damping=0.03, iterations=2) for i in range(3)])
    assert len(products) == 12
    shift = 0.03 * torch.stack([g @ matrix @ g / (g @ g) for g in gradients]).median()
    near, far = (list(far_from_solved(matrix, gradients, found, shift)) for found in (together, alone))
    assert np.mean(near) < np.mean(far)


def test_later_steps_take_products_of_their_own(monkeypatch):
    network, products = digits.perceptron(), []
    multiply = curvature.GaussNewton.__call__
    monkeypatch.setattr(curvature.GaussNewton, "__call__", lambda *a: products.append(1) or multiply(*a))
    found = steps(network, direction="pcg", iterations=2, steps=2)
    assert len(products) == 6 + 6
    assert torch.isfinite(found).all()
    assert max(cosines(found, steps(network, direction="pcg", iterations=2))) < 0.9999


def test_what_memory_has_no_room_for_is_run_again_at_every_product(monkeypatch):
    network = digits.perceptron()
    adapter, names = TensorAdapter(network), [name for name, _ in network.named_parameters()]
    features = adapter.encode(CANDIDATES[:])
    parts = [{name: values[i : i + 25] for name, values in features.items()} for i in range(0, 100, 25)]
    batches = [adapter.collate(part) for part in parts]
    vector = [torch.randn_like(p) for p in network.parameters()]
    whole = curvature.GaussNewton(adapter, batches, names)
    assert [graph is not None for graph in whole.graphs] == [True] * 4
    held = whole.graph(batches[0])[1]
    assert held > 25 * 64 * 4  # at least what the first layer reads
    monkeypatch.setattr(curvature, "GRAPH_BYTES", 2.5 * held)
    scarce = curvature.GaussNewton(adapter, batches, names)
    assert [graph is not None for graph in scarce.graphs] == [True, True, False, False]
    for _ in range(2):
        torch.testing.assert_close(scarce(vector), whole(vector))


def test_kronecker_factors_come_nearer_to_the_inverse_than_the_gradient_does():
    network = digits.perceptron()
    exact = list(written_out(network, 0.1))
    plain = cosines(steps(network, sample=None), exact)
    for direction in ("kfac", "ekfac"):
        assert np.mean(cosines(steps(network, direction=direction, damping=0.1), exact)) > np.mean(plain) + 0.15


@pytest.mark.parametrize("direction", CORRECTED)
def test_infinite_damping_leaves_the_gradient(direction):
    network = digits.convolutional()
    assert min(cosines(steps(network, direction=direction, damping=1e6), steps(network, sample=None))) > 0.9999


@pytest.mark.parametrize("direction", CORRECTED)
def test_every_direction_scores_reads_the_model_only_and_is_repeatable(direction, tmp_path):
    network = digits.convolutional().train()
    before = state(network)
    ascent = AscentConfig(direction=direction, sample=100, radius=0.3)
    scores = []
    for cache in ("one", "two", "two"):  # the last with factors and passes from the cache
        tracer = ForwardInf(adapter=TensorAdapter(network), ascent=ascent, cache_dir=tmp_path / cache)
        scores.append(tracer.trace(QUERIES, CANDIDATES).scores)
    assert_same_state(before, state(network))
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[1], scores[2])
    assert np.isfinite(scores[0]).all()


@pytest.mark.parametrize("direction", CORRECTED)
def test_every_direction_traces_a_language_model(direction, model, tokenizer, queries, candidates):
    before = state(model)
    ascent = AscentConfig(direction=direction, sample=40)
    found = ForwardInf(model, tokenizer, ascent=ascent).trace(candidates.select([2, 7, 9]), candidates)
    assert_same_state(before, state(model))
    assert [found.ranking(i)[0] for i in range(3)] == [2, 7, 9]
    assert found.config["direction"] == direction


def test_bfloat16_and_frozen_models_have_directions_too(model, tokenizer, queries, candidates):
    ascent = AscentConfig(direction="cg", sample=40)
    full = ForwardInf(model, tokenizer, ascent=ascent).trace(queries, candidates).scores
    model.requires_grad_(False)
    np.testing.assert_array_equal(full, ForwardInf(model, tokenizer, ascent=ascent).trace(queries, candidates).scores)
    for direction in CORRECTED:
        ascent = AscentConfig(direction=direction, sample=40)
        half = ForwardInf(model.bfloat16(), tokenizer, ascent=ascent).trace(queries, candidates).scores
        assert np.isfinite(half).all()


def test_factors_are_fitted_once_for_all_queries_and_damping(monkeypatch, cache):
    network = digits.perceptron()
    perturbation(network, direction="kfac")
    files = set((cache / "curvature").iterdir())
    assert len(files) == 1
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.KroneckerFit.factors", None)  # not called again
    perturbation(network, direction="kfac", damping=0.7)
    perturbation(network, direction="ekfac")
    assert len(set((cache / "curvature").iterdir()) - files) == 1  # the corrected eigenvalues
    with pytest.raises(TypeError):
        perturbation(network, direction="kfac", seed=1)


@pytest.mark.parametrize("direction", ["kfac", "ekfac"])
def test_factors_that_are_fitted_otherwise_now_are_fitted_again(monkeypatch, tmp_path, direction):
    network = digits.perceptron()

    def scores(cache):
        ascent = AscentConfig(direction=direction, radius=0.3, sample=100)
        tracer = ForwardInf(adapter=TensorAdapter(network), ascent=ascent, cache_dir=tmp_path / cache)
        return tracer.trace(QUERIES, CANDIDATES).scores

    before = scores("one")
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x.sin())  # no key knows what replaces a method
    with pytest.warns(UserWarning, match="curvature is fitted again"):
        after = scores("one")
    assert not np.allclose(after, before, rtol=1e-3)
    np.testing.assert_array_equal(after, scores("two"))


def test_damaged_factors_are_fitted_again(tmp_path):
    def scores():
        ascent = AscentConfig(direction="kfac", radius=0.3, sample=100)
        tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()), ascent=ascent, cache_dir=tmp_path)
        return tracer.trace(QUERIES, CANDIDATES).scores

    before = scores()
    shutil.rmtree(tmp_path / "passes")
    (file,) = (tmp_path / "curvature").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="curvature is fitted again"):
        np.testing.assert_array_equal(scores(), before)
    assert file.read_bytes() == whole


def test_a_killed_fit_leaves_no_half_file(monkeypatch, cache):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_forward_inf.utils.storage.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        perturbation(digits.perceptron(), direction="kfac")
    assert not list((cache / "curvature").iterdir())


def test_a_perturbation_is_known_by_everything_that_its_direction_depends_on():
    network = digits.perceptron()
    options = [
        {"sample": None}, {"direction": "cg"}, {"direction": "cg", "sample": 50}, {"direction": "cg", "damping": 0.2},
        {"direction": "cg", "iterations": 3}, {"direction": "kfac"}, {"direction": "ekfac"},
        {"direction": "ekfac", "seed": 1}, {"direction": "ekfac", "sample": 90},
        {"direction": "pcg"}, {"direction": "pcg", "iterations": 2},
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert len({perturbation(network, **one).fingerprint for one in options}) == len(options)


@pytest.mark.parametrize("direction", ["gradient", "cg"])
def test_symmetric_scores_are_half_the_difference_of_ascent_and_descent(direction):
    network = digits.perceptron()
    found = {
        mode: ForwardInf(
            adapter=TensorAdapter(network),
            ascent=AscentConfig(mode=mode, radius=0.3, direction=direction),
        ).trace(QUERIES, CANDIDATES).scores
        for mode in ("ascent", "descent", "symmetric")
    }  # fmt: skip
    np.testing.assert_allclose(found["symmetric"], (found["ascent"] + found["descent"]) / 2, atol=1e-5)


def test_a_query_that_moves_nothing_has_no_mirror_image():
    network = digits.perceptron()
    up = perturbation(network, sample=None)
    up.thetas[1] = None
    down = Mirrored(up)
    assert down.thetas[1] is None
    assert len(down) == 3
    assert down.fingerprint != up.fingerprint
    torch.testing.assert_close(down.thetas[0]["2.bias"] + up.thetas[0]["2.bias"], 2 * network[2].bias.detach())


def test_an_adapter_without_predictions_is_told(line):
    from tests.helpers.line import points

    tracer = ForwardInf(adapter=line, ascent=AscentConfig(direction="cg"))
    with pytest.raises(NotImplementedError, match="LineAdapter does not say what its model predicts"):
        tracer.trace(points(((3, 1), 0)), points(((1, 0), 0)))


def test_a_seq2seq_adapters_predictions_leave_padding_out(model, tokenizer, candidates):
    adapter = Seq2SeqAdapter(model, tokenizer)
    features = adapter.encode(candidates[:5])
    outputs, loss = adapter.outputs_and_loss(model, adapter.collate(features))
    assert len(outputs) == sum(features["terms"])
    torch.testing.assert_close(loss(outputs), adapter.loss(model, adapter.collate(features)).sum())


def test_conjugate_gradients_that_do_not_converge_show_the_residual():
    with pytest.warns(
        UserWarning, match=r"after 1 products the residual is \d+% of the gradient. The best iterate"
    ) as caught:
        steps(digits.perceptron(), direction="cg", damping=1e-6, iterations=1)
    assert len(caught) == 1  # though there are three queries


def test_more_products_of_conjugate_gradients_never_give_a_worse_iterate():
    curvatures = torch.logspace(-6, 3, 60)  # far beyond what float32 can solve
    right = torch.randn(60, generator=torch.Generator().manual_seed(0))
    heights = []
    for iterations in (1, 5, 20, 100, 400):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = conjugate_gradients(
                lambda v: [curvatures * v[0]], [right], iterations=iterations, damping=1e-9, tolerance=1e-12
            )
        x = found[0].double()
        heights.append((x @ (curvatures * x) / 2 - right.double() @ x).item())
    assert np.all(np.diff(heights) <= 1e-3 * np.abs(heights[:-1]))


def test_inputs_that_are_always_zero_make_factors_singular_and_do_no_harm():
    network = digits.perceptron()  # corners of the digits are blank
    assert np.linalg.matrix_rank(np.array(CANDIDATES["x"])) < 64
    for direction in ("kfac", "ekfac"):
        assert torch.isfinite(steps(network, direction=direction, damping=1e-6)).all()


def test_layers_of_unknown_kind_are_named_once():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    network = nn.Sequential(nn.Linear(64, 6), Scaled(), nn.Linear(6, 10))
    with pytest.warns(UserWarning, match=r"get a diagonal, not Kronecker factors: 1 \(Scaled\)") as caught:
        assert torch.isfinite(steps(network, direction="ekfac")).all()
    assert sum("unknown kind" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("direction", ["gradient", *CORRECTED])
def test_first_order_is_the_limit_of_small_steps(direction):
    adapter = TensorAdapter(digits.perceptron().double())
    correction = {} if direction == "gradient" else {"sample": 100}
    ascent = AscentConfig(direction=direction, radius=1e-3, mode="symmetric", **correction)
    finite = ForwardInf(adapter=adapter, ascent=ascent).trace(QUERIES, CANDIDATES).scores
    first = FirstOrder(adapter=adapter, ascent=ascent).trace(QUERIES, CANDIDATES).scores
    for a, b in zip(finite, first, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 0.999
