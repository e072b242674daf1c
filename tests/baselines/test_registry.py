"""Every attributor is made in one way, has a name and a configuration, and is registered once."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf import baselines as package
from hf_forward_inf.adapters import DiffusionAdapter, Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.baselines import ATTRIBUTORS, BM25, PixelDistance, RepresentationSimilarity, attributors_for
from hf_forward_inf.baselines.registry import DEFAULT_SET
from tests.helpers import digits
from tests.helpers.drawing import rows as drawings
from tests.helpers.drawing import stable_diffusion

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
IMAGES_ONLY = {"denoiser_features", "pixel_distance"}
"""Attributors that can't trace a language model."""


@pytest.fixture
def tracer(model, tokenizer, tmp_path):
    ascent = AscentConfig(direction="gradient", radius=0.5, seed=3)
    return ForwardInf(model, tokenizer, ascent=ascent, cache_dir=tmp_path / "own")


def test_names_and_configurations_tell_all_attributors_apart(tracer):
    made = attributors_for(tracer, ATTRIBUTORS)
    assert set(made) == set(ATTRIBUTORS) - IMAGES_ONLY
    described = {(one.name, json.dumps(one.config, sort_keys=True)) for one in made.values()}
    assert len(described) == len(made)
    for name, one in made.items():
        assert one.name == name or name == "forward_inf_gradient"


def test_what_the_registry_makes_explains_the_tracers_model_with_its_seed(tracer):
    made = attributors_for(tracer, ATTRIBUTORS)
    assert made["forward_inf"] is tracer
    for name in ("tracin_cosine", "trackstar", "influence_functions", "representation", "first_order"):
        assert made[name].adapter is tracer.adapter and made[name].cache_dir == tracer.cache_dir
    for name in ("trackstar", "influence_functions", "influence_functions_lissa", "first_order", "random"):
        assert made[name].config["seed"] == 3
    assert made["forward_inf_gradient"].config["radius"] != 0.5  # a length of its own
    assert made["first_order"].config["modules"] == perturbed_names(tracer.adapter, tracer.ascent.modules)


@pytest.mark.parametrize("name", ["tracin_cosine", "representation", "bm25", "bm25_without_answer", "random"])
def test_every_attributor_is_made_from_model_and_processor(name, tracer, model, tokenizer, queries, candidates):
    registered = attributors_for(tracer.with_options(ascent=AscentConfig(seed=0)), [name])[name]
    options = {"tracin_cosine": {"similarity": "cosine"}, "bm25_without_answer": {"with_answer": False}}
    alone = type(registered)(model, tokenizer, cache_dir=tracer.cache_dir, **options.get(name, {}))
    found, expected = (one.trace(queries, candidates, top_k=3) for one in (registered, alone))
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert (found.method, found.config) == (name, alone.config)


def test_attributors_that_do_not_fit_the_model_are_left_out():
    classifier = attributors_for(ForwardInf(adapter=TensorAdapter(digits.perceptron())))
    assert set(classifier) == {name for name in DEFAULT_SET if "bm25" not in name} - IMAGES_ONLY
    drawer = attributors_for(ForwardInf(adapter=DiffusionAdapter(stable_diffusion())), ATTRIBUTORS)
    assert set(drawer) == set(ATTRIBUTORS)


def test_an_attributor_that_does_not_fit_says_why(model, tokenizer, line):
    with pytest.raises(TypeError, match=r"PixelDistance needs a DiffusionAdapter, .* not Seq2SeqAdapter"):
        PixelDistance(model, tokenizer)
    with pytest.raises(TypeError, match="LineAdapter defines no representation"):
        RepresentationSimilarity(adapter=line)


def test_an_unknown_name_is_refused_with_the_known_ones(tracer):
    with pytest.raises(ValueError, match=r"no attributor 'bm26'. Known are forward_inf, .*bm25"):
        attributors_for(tracer, ["bm26"])


def test_bm25_reads_the_columns_that_the_adapter_reads(model, tokenizer, queries, candidates):
    expected = BM25().trace(queries, candidates).scores
    names = {"inputs_pretokenized": "question", "targets_pretokenized": "answer"}
    # A text that the adapter does not read must not count, whatever its name.
    renamed = [
        rows.select_columns(list(names)).rename_columns(names).add_column("text", ["same"] * len(rows))
        for rows in (queries, candidates)
    ]
    adapter = Seq2SeqAdapter(model, tokenizer, input_column="question", target_column="answer")
    np.testing.assert_array_equal(BM25(adapter=adapter).trace(*renamed).scores, expected)
    captions = BM25(adapter=DiffusionAdapter(stable_diffusion())).trace(drawings(2), drawings(5))
    np.testing.assert_array_equal(captions.scores, BM25(input_column="caption").trace(drawings(2), drawings(5)).scores)


def test_the_example_of_an_attributor_in_the_documentation_runs(tracer, queries, candidates, monkeypatch):
    section = PAGE.read_text().partition("## A new attributor")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], flags=re.DOTALL)
    monkeypatch.setattr(package, "ATTRIBUTORS", dict(ATTRIBUTORS))
    monkeypatch.setattr("hf_forward_inf.baselines.registry.ATTRIBUTORS", package.ATTRIBUTORS)
    exec(code, {})
    found = attributors_for(tracer, ["shared_words"])["shared_words"].trace(queries, candidates, top_k=5)
    targets = [[set(text.split()) for text in rows["targets_pretokenized"]] for rows in (queries, candidates)]
    expected = [sorted((len(one & other) for other in targets[1]), reverse=True)[:5] for one in targets[0]]
    np.testing.assert_array_equal(found.scores, expected)
    assert found.config == {"column": "targets_pretokenized"}


def test_a_combination_names_its_parts_with_their_options():
    config = package.Fusion([BM25(k1=2.0), package.Random(seed=4)]).config
    assert config["attributors"][0]["k1"] == 2.0
    assert config["attributors"][1] == {"method": "random", "seed": 4}
