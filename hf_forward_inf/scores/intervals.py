"""How sure a mean over queries is: its standard error, and its bootstrap interval."""

import numpy as np


def with_interval(name: str, values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Return the mean over queries with its 95% bootstrap interval: `{name}`, `{name}_low` and `{name}_high`.

    Args:
        name (`str`): Name of the figure.
        values (`np.ndarray`): One value for each query, `[queries]`; of two methods, their differences.
        resamples (`int`, defaults to 1000): Number of bootstrap resamples of the queries.
        seed (`int`, defaults to 0): Seed of the resamples.
    """
    low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def bootstrap_interval(values: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean over queries, given one value per query, `[queries]`."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float(np.mean(values)), float(np.mean(values))
    options = {"n_resamples": resamples, "method": "percentile", "rng": np.random.default_rng(seed)}
    interval = bootstrap((values,), np.mean, **options).confidence_interval
    return float(interval.low), float(interval.high)


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean over queries, given one value per query; 0 of a single one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
