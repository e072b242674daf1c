import numpy as np
import pytest
from scipy import stats

from hf_forward_inf.scores.intervals import bootstrap_interval, standard_error, with_interval


def test_a_mean_has_the_interval_of_its_resamples():
    values = np.random.default_rng(0).normal(size=400)
    found = with_interval("lds", values)
    assert found == {"lds": values.mean(), "lds_low": found["lds_low"], "lds_high": found["lds_high"]}
    half = stats.norm.ppf(0.975) * values.std(ddof=1) / 20  # where the mean is normal
    assert found["lds_high"] - found["lds"] == pytest.approx(half, rel=0.15)
    assert found["lds"] - found["lds_low"] == pytest.approx(half, rel=0.15)
    assert standard_error(values) == pytest.approx(stats.sem(values))


def test_differences_that_are_equal_have_no_interval():
    other = np.array([0.1, 0.9, 0.4])
    assert with_interval("lead", other + 0.2 - other) == pytest.approx(
        {"lead": 0.2, "lead_low": 0.2, "lead_high": 0.2}
    )
    mixed = with_interval("lead", np.array([1.0, -1.0, 1.0]))
    assert mixed["lead"] == pytest.approx(1 / 3) and mixed["lead_low"] < 0 < mixed["lead_high"]


def test_a_single_query_has_an_interval_of_its_value():
    assert bootstrap_interval(np.array([0.3])) == (0.3, 0.3) and standard_error(np.array([0.3])) == 0
