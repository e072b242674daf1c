"""Plots for reports, as SVG text."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

PANELS = {"alone": "A single query", "together": "All queries together"}


def budget_plot(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the MRR of each attributor after a given time, in plain forward passes over the candidates, as SVG text.

    Args:
        curves (`dict`): As in [`comparison.Comparison`].

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure_kind = figure_class()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_forward_inf", "font.family": "sans-serif"}):
        figure = figure_kind(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axis, (kind, panel) in zip(axes, curves.items(), strict=True):
            names = [name for name in panel if name != "moments"]
            for i, name in enumerate(names):
                ours = name == "forward_inf"
                style = {"color": "black", "linewidth": 2.5} if ours else {"color": f"C{i - 1}", "linewidth": 1.3}
                axis.plot(panel["moments"], panel[name], label=name, zorder=3 if ours else 2, **style)
            axis.set_title(PANELS[kind], fontsize=11)
            axis.set_xlabel("time, in plain forward passes over the candidates")
            axis.set_xlim(0, np.max(panel["moments"]))
            axis.set_ylim(0, 1.02)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("MRR after this time")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
        return as_svg(figure)


def interval_plot(figure: str, table: Mapping[str, Mapping[str, float]]) -> str:
    """Plot one figure of every attributor with its interval, best first, as SVG text.

    Args:
        figure (`str`): Name of the figure; the ends of its interval are `{figure}_low` and `{figure}_high`.
        table (`dict`): Figures by attributor.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    order = sorted(table, key=lambda name: table[name][figure])
    drawing = figure_class()(figsize=(7, 0.6 + 0.22 * len(order)), layout="constrained")
    axis = drawing.subplots()
    for height, name in enumerate(order):
        low, middle, high = (table[name][f"{figure}{end}"] for end in ("_low", "", "_high"))
        colour = "black" if name == "forward_inf" else "C0"
        axis.plot([low, high], [height, height], color=colour, linewidth=1.5)
        axis.plot(middle, height, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xlabel(figure.replace("_", " "))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    return as_svg(drawing)


def as_svg(figure: Any) -> str:
    """Return a figure as SVG text, without the XML header of a separate file."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def figure_class() -> Any:
    """Return matplotlib's figure class, which needs no display.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need the extra `plots`: pip install 'hf-forward-inf[plots]'.") from error
    return Figure
