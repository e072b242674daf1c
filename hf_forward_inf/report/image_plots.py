"""Plots of experiments on images: pairs side by side, and features under ascent."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_forward_inf.report.plots import as_svg, figure_class
from hf_forward_inf.utils.images import in_channels, read_image

KINDS = {"others": ("0.75", 8), "proponents": ("C0", 22), "query": ("C3", 60)}
"""Colour and size of each kind of point."""


def pair_grid(path: Path, pairs: Sequence[dict[str, Any]], columns: int = 8) -> None:
    """Write a PNG of test images, each above the training image with the most influence on it.

    Args:
        path (`Path`): The file to write.
        pairs (`list[dict]`): `query` and `candidate` (images), `query_label`, `candidate_label`, `score`.
        columns (`int`, defaults to 8): Pairs in a row.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(1.25 * columns, 3.0 * -(-len(pairs) // columns)), layout="constrained")
    axes = figure.subplots(2 * -(-len(pairs) // columns), columns, squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for i, pair in enumerate(pairs):
        line, column = 2 * (i // columns), i % columns
        for axis, side, title in (
            (axes[line, column], "query", f"test: {pair['query_label']}"),
            (axes[line + 1, column], "candidate", f"{pair['candidate_label']}, {pair['score']:.3g}"),
        ):
            image = in_channels(read_image(pair[side]))
            axis.imshow(image, cmap="gray" if image.mode == "L" else None, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    figure.savefig(path, format="png", dpi=150)


def dynamics_plot(points: np.ndarray, kinds: Sequence[str], radii: Sequence[float]) -> str:
    """Plot the features of examples under ascent on a query, one panel a radius, as SVG text.

    Args:
        points (`np.ndarray`): `[radii, examples, 2]`.
        kinds (`list[str]`): What each example is: `"query"`, `"proponents"` or `"others"`.
        radii (`list[float]`): Radius of each panel; 0 is the trained model.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(3.2 * len(radii), 3.4), layout="constrained")
    axes = figure.subplots(1, len(radii), sharex=True, sharey=True, squeeze=False)[0]
    of = np.array(kinds)
    for axis, places, radius in zip(axes, points, radii, strict=True):
        for kind, (colour, size) in KINDS.items():
            marker = "*" if kind == "query" else "o"
            axis.scatter(*places[of == kind].T, s=size, c=colour, marker=marker, linewidths=0, label=kind)
        axis.set_title("the trained model" if radius == 0 else f"radius {radius:g}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return as_svg(figure)


def scatter_plot(panels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Plot pairs of influences against each other, one panel a comparison, as SVG text.

    Args:
        panels (`dict`): By title, the values on both axes, `[points]` each.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, (across, up)) in zip(axes, panels.items(), strict=True):
        axis.scatter(across, up, s=14 if len(across) < 100 else 5, alpha=0.6, linewidths=0, rasterized=True)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set_title(f"{title}\nPearson {np.corrcoef(across, up)[0, 1]:.3f}", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return as_svg(figure)


def detection_plot(curves: Mapping[str, np.ndarray]) -> str:
    """Plot the share of wrong labels found against the share of examples examined, as SVG text.

    Args:
        curves (`dict`): By method, float `[examples]`: the share found after each example.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for i, (name, found) in enumerate(curves.items()):
        style = {"color": "black", "linewidth": 2.5} if name == "forward_inf" else {"color": f"C{i}", "linewidth": 1.3}
        axis.plot(np.arange(1, len(found) + 1) / len(found), found, label=name, **style)
    axis.set_xlabel("share of the examples examined")
    axis.set_ylabel("share of the wrong labels found")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return as_svg(figure)
