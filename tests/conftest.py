import copy
import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import datasets
import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration

from hf_forward_inf.data import builtin_facts
from hf_forward_inf.toys.tiny_models import train_tokenizer
from tests.helpers.line import Line, LineAdapter

SHARED = Path(os.environ.get("HF_FORWARD_INF_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def quiet_and_repeatable():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    gc.freeze()  # modules are imported by now: costs are measured after a collection, which need not visit them


@pytest.fixture
def measured_once(monkeypatch):
    """Measure costs by one pass where a test asks what a run writes, not how exact its costs are."""
    monkeypatch.setattr("hf_forward_inf.evaluation.cost.REPEATS", 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_FORWARD_INF_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared():
    """Real data and trained models beside the project, where there are any."""
    if not (SHARED / "data" / "mt5_facts").exists():
        pytest.skip(f"no shared data at {SHARED} (set HF_FORWARD_INF_SHARED)")
    return SHARED / "data"


@pytest.fixture(scope="session")
def corpus():
    return builtin_facts()


@pytest.fixture(scope="session")
def candidates(corpus):
    return corpus["abstracts"].select(range(40))


@pytest.fixture(scope="session")
def queries(corpus):
    return corpus["queries"].select([0, 20, 40])


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return train_tokenizer(
        [*corpus["abstracts"]["inputs_pretokenized"], *corpus["queries"]["targets_pretokenized"]], 600
    )


@pytest.fixture(scope="session")
def untouched_model(tokenizer):
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=48, num_heads=2, num_layers=2, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return MT5ForConditionalGeneration(config).eval()


@pytest.fixture
def model(untouched_model):
    return copy.deepcopy(untouched_model)


@pytest.fixture
def line():
    """A model of two parameters whose every step can be computed by hand."""
    return LineAdapter(Line([1.0, -2.0]))
