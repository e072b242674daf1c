import pytest
import torch

from hf_forward_inf.curvature import outer_products as factors
from hf_forward_inf.curvature.outer_products import OuterProducts, QueryGradients, squared_norms

HEIGHT, WIDTH = 7, 5


def layer(examples, positions, height=HEIGHT):
    return OuterProducts(torch.randn(examples, positions, height), torch.randn(examples, positions, WIDTH), height)


def table(examples, positions):
    return OuterProducts(torch.randint(HEIGHT, (examples, positions)), torch.randn(examples, positions, WIDTH), HEIGHT)


KINDS = {
    "output layer": lambda examples, positions: [layer(examples, positions)],
    "embedding": lambda examples, positions: [table(examples, positions)],
    "tied": lambda examples, positions: [table(examples, positions), layer(examples, positions + 1)],
}


@pytest.fixture(params=KINDS)
def parts_of(request):
    torch.manual_seed(0)
    return KINDS[request.param]


def by_hand(parts):
    """Outer products, position by position."""
    total = 0
    for part in parts:
        ones = torch.nn.functional.one_hot(part.rows, HEIGHT).float() if part.is_embedding else part.rows
        total = total + torch.einsum("eph,epw->ehw", ones, part.columns).flatten(1)
    return total


def test_written_gradients_are_sums_of_outer_products(parts_of):
    parts = parts_of(3, 4)
    torch.testing.assert_close(sum(part.dense() for part in parts), by_hand(parts))


@pytest.mark.parametrize("positions", [2, 40])
@pytest.mark.parametrize("chunk_bytes", [2**20, 300])
def test_products_and_norms_need_no_written_gradients(parts_of, positions, chunk_bytes, monkeypatch):
    monkeypatch.setattr(factors, "CHUNK_BYTES", chunk_bytes)
    parts = parts_of(6, positions)
    directions = torch.randn(4, HEIGHT * WIDTH)
    torch.testing.assert_close(sum(part.products(directions) for part in parts), by_hand(parts) @ directions.T)
    torch.testing.assert_close(squared_norms(parts), by_hand(parts).square().sum(1))


def test_a_wide_matrix_too():
    torch.manual_seed(0)
    wide, directions = layer(3, 2, height=2), torch.randn(4, 2 * WIDTH)
    torch.testing.assert_close(wide.products(directions), wide.dense() @ directions.T)


def test_queries_of_any_length_lie_in_a_row(parts_of):
    queries = {0: parts_of(1, 3), 1: parts_of(1, 5), 3: parts_of(1, 1)}  # the third has no gradient
    laid, candidates = QueryGradients.of(queries, 4), parts_of(6, 4)
    dense = torch.zeros(4, HEIGHT * WIDTH)
    for i, parts in queries.items():
        dense[i] = by_hand(parts)
    torch.testing.assert_close(laid.dense(), dense)
    torch.testing.assert_close(laid.squares, dense.square().sum(1))
    torch.testing.assert_close(laid.products(candidates), by_hand(candidates) @ dense.T)


def test_factors_of_few_positions_in_a_large_matrix_pay_and_of_many_do_not():
    def laid(queries, positions, height):
        one = OuterProducts(torch.zeros(1, positions, height), torch.zeros(1, positions, 64), height)
        return QueryGradients.of({i: [one] for i in range(queries)}, queries)

    assert laid(10, 5, 4096).is_cheaper()
    assert laid(100, 5, 4096).is_cheaper()
    assert not laid(100, 60, 64).is_cheaper()
