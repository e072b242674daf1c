import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent import steps
from hf_forward_inf.curvature.perturber import Perturber
from tests.helpers.drawing import rows, stable_diffusion
from tests.helpers.line import points


def line_points(count):
    draw = np.random.default_rng(0)
    return points(*((draw.normal(size=2), y) for y in draw.normal(size=count)))


QUERIES = line_points(3)


@pytest.fixture
def tracer(line):
    return ForwardInf(adapter=line)


def stream_of(dataset, shards=3):
    return dataset.to_iterable_dataset(num_shards=shards)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_the_best_of_a_stream_are_the_best_of_all_candidates(tracer, chunk_size):
    candidates = line_points(50)
    found = tracer.trace_stream(QUERIES, stream_of(candidates), top_k=5, chunk_size=chunk_size)
    expected = tracer.trace(QUERIES, candidates, top_k=5)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    places = np.array(found.candidates["stream_row"][:])
    assert (places[found.indices] == expected.indices).all()
    assert found.candidates.remove_columns("stream_row")[:] == candidates.select(places)[:]
    assert len(places) <= 15 and (np.diff(places) > 0).all()
    assert found.config["streamed"] == 50


def test_scores_can_be_standardised_before_the_best_are_chosen(tracer):
    candidates = line_points(50)
    found = tracer.trace_stream(QUERIES, stream_of(candidates), top_k=4, chunk_size=20, standardise=True)
    expected = tracer.trace(QUERIES, candidates).standardised().keep(4)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    places = np.array(found.candidates["stream_row"][:])
    assert (places[found.indices] == expected.indices).all()
    with pytest.raises(ValueError, match="at least 3 of them, not 1: trace more"):
        tracer.trace_stream(QUERIES.select([0]), stream_of(candidates), standardise=True)


def test_nothing_of_a_stream_stays_on_disk(tracer, cache):
    seen = []

    def generate():
        for row in line_points(40):
            seen.append(len(files(cache)))
            yield row

    tracer.trace_stream(QUERIES, IterableDataset.from_generator(generate), top_k=2, chunk_size=10)
    assert len(files(cache)) == len(files(cache / "encoded")) == 1  # the queries
    assert max(seen) == 1


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("shards", "chunk_size"), [(1, 8), (3, 8), (7, 3), (2, 9)])
def test_a_run_resumes_where_it_was_interrupted(tracer, tmp_path, monkeypatch, shards, chunk_size):
    candidates, folder = line_points(50), tmp_path / "best"
    score, sizes, stop = ForwardInf.score, [], [0]

    def fragile(self, queries, rows, *place):
        if len(sizes) == stop[0]:
            raise Interrupted
        sizes.append(len(rows))
        return score(self, queries, rows, *place)

    def run(after):
        stop[0] = after
        stream = stream_of(candidates, shards)
        return tracer.trace_stream(QUERIES, stream, top_k=5, chunk_size=chunk_size, folder=folder)

    monkeypatch.setattr(ForwardInf, "score", fragile)
    for after in (1, 2):
        with pytest.raises(Interrupted):
            run(after)
        (saved,) = folder.iterdir()  # the last chunk's alone
        assert json.loads((saved / "progress.json").read_text())["streamed"] == sum(sizes)
    found = run(100)
    assert tracer.config.items() <= found.config.items()
    assert found.config.items() >= {"standardised": False, "streamed": 50, "unscored": 0}.items()
    assert sizes == [chunk_size] * (50 // chunk_size) + [50 % chunk_size] * (50 % chunk_size > 0)  # each row once
    assert run(len(sizes)).config == found.config  # nothing is left to do
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(ValueError, match="holds the progress of another run"):
        tracer.trace_stream(QUERIES, stream_of(candidates, shards), top_k=4, chunk_size=chunk_size, folder=folder)
    monkeypatch.undo()
    expected = tracer.trace(QUERIES, candidates, top_k=5)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    assert (np.array(found.candidates["stream_row"][:])[found.indices] == expected.indices).all()


def test_curvature_comes_from_the_first_chunk():
    ascent = AscentConfig(direction="cg", sample=3, radius=0.05, iterations=2)
    tracer = ForwardInf(adapter=DiffusionAdapter(stable_diffusion(), timesteps=1), ascent=ascent)
    candidates = rows(10)
    found = tracer.trace_stream(rows(2, 5), stream_of(candidates), top_k=3, chunk_size=4)
    expected = tracer.with_options(training=candidates.select(range(4))).trace(rows(2, 5), candidates, top_k=3)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3)


def test_rows_without_a_loss_are_named_by_their_place_and_left_out(tracer):
    candidates = Dataset.from_list([*line_points(14), {"x": [float("nan"), 0.0], "y": 0.0}, *line_points(3)])
    with pytest.warns(UserWarning, match="Candidates row 14: the loss is NaN"):
        found = tracer.trace_stream(QUERIES, stream_of(candidates, 1), top_k=50, chunk_size=10)
    assert found.config["unscored"] == 1 and len(found.candidates) == 17
    assert 14 not in found.candidates["stream_row"][:]
    assert np.isfinite(found.scores).all()


def test_a_saved_attribution_of_a_stream_is_whole(tracer, tmp_path):
    found = tracer.trace_stream(QUERIES, stream_of(line_points(20)), top_k=3, chunk_size=6)
    found.save_to_disk(tmp_path / "saved")
    loaded = type(found).load_from_disk(tmp_path / "saved")
    assert loaded.top(1, 3)[:] == found.top(1, 3)[:]


def test_what_cannot_be_traced_as_a_stream_is_refused(tracer):
    candidates = line_points(5)
    with pytest.raises(TypeError, match=r"not Dataset: give that to trace\(\)"):
        tracer.trace_stream(QUERIES, candidates)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        tracer.trace_stream(QUERIES, stream_of(candidates), top_k=0)
    with pytest.raises(ValueError, match="the stream is empty"):
        tracer.trace_stream(QUERIES, IterableDataset.from_generator(lambda: iter(())))
    broken = IterableDataset.from_generator(lambda: (1 / (4 - i) and row for i, row in enumerate(candidates)))
    with pytest.raises(ValueError, match=r"can't be read beyond row 3, .* of 2 rows: division by zero \(ZeroDivision"):
        tracer.trace_stream(QUERIES, broken, chunk_size=2, top_k=1)
    with pytest.raises(ValueError, match="Rows 0 to 3 of the stream: The candidates have no column `y`"):
        tracer.trace_stream(QUERIES, stream_of(candidates.remove_columns("y")), chunk_size=4)


def test_progress_of_one_stream_is_not_resumed_with_another(tracer, tmp_path):
    first, second = line_points(20), line_points(40).select(range(20, 40))
    tracer.trace_stream(QUERIES, stream_of(first), top_k=3, chunk_size=8, folder=tmp_path)
    again = tracer.trace_stream(QUERIES, stream_of(first), top_k=3, chunk_size=8, folder=tmp_path)
    np.testing.assert_array_equal(again.scores, tracer.trace_stream(QUERIES, stream_of(first), top_k=3).scores)
    with pytest.raises(ValueError, match=r"holds the progress of another run.*another stream"):
        tracer.trace_stream(QUERIES, stream_of(second), top_k=3, chunk_size=8, folder=tmp_path)


def test_queries_of_a_stream_are_rows_as_people_have_them(tracer):
    candidates = line_points(20)
    of_rows = tracer.trace_stream(QUERIES.to_list(), stream_of(candidates), top_k=3)
    np.testing.assert_allclose(of_rows.scores, tracer.trace(QUERIES, candidates, top_k=3).scores, rtol=1e-6)


def test_queries_are_perturbed_once_whatever_the_number_of_chunks(line, monkeypatch):
    ascents = []
    own = steps.ascend
    monkeypatch.setattr(steps, "ascend", lambda *args: ascents.append(1) or own(*args))
    candidates = line_points(50)
    for block_size in (32, 2):  # in memory, on the disk
        ascents.clear()
        monkeypatch.setattr(Perturber, "_block_size", lambda self, tokens, size=block_size: size)
        found = ForwardInf(adapter=line).trace_stream(QUERIES, stream_of(candidates), top_k=5, chunk_size=7)
        assert len(ascents) == 3
        expected = ForwardInf(adapter=line).trace(QUERIES, candidates, top_k=5)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


def test_progress_of_a_file_is_not_resumed_after_its_later_rows_have_changed(tracer, tmp_path):
    file = tmp_path / "rows.parquet"

    def found(changed):
        rows = [*line_points(20), *line_points(40).select(range(changed, changed + 20))]  # FIRST_ROWS are the same
        Dataset.from_list(rows).to_parquet(file)
        stream = load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        return tracer.trace_stream(QUERIES, stream, top_k=3, chunk_size=8, folder=tmp_path / "best")

    found(0)
    with pytest.raises(ValueError, match=r"holds the progress of another run.*another stream"):
        found(20)
