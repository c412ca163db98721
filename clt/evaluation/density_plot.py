"""Heat maps of per-layer histograms for TensorBoard."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from clt.evaluation.evaluator import LayerHistograms


def density_figure(histograms: LayerHistograms, title: str) -> Figure:
    """A heat map of firing rates, one row per layer, and beside it the share of features that never fire.

    Args:
        histograms: features by firing rate, of at least one layer.
        title: above the plot.
    """
    layers = sorted(histograms.counts)
    counts = np.array([histograms.counts[layer] for layer in layers], dtype=np.float64)
    never = np.array([histograms.outside[layer] for layer in layers], dtype=np.float64)
    features = np.maximum(counts.sum(axis=1) + never, 1)
    # Layers need not be consecutive: row r of the plot is the r-th of them.
    rows = np.arange(len(layers))

    figure = Figure(figsize=(9, float(np.clip(2 + 0.17 * len(layers), 3, 9))), dpi=100, layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    mesh = heat.pcolormesh(histograms.edges, np.arange(len(layers) + 1) - 0.5, counts / features[:, None], cmap="Blues")
    mesh.set_clim(vmin=0)
    labelled = rows[:: -(-len(layers) // 24)]
    heat.set_yticks(labelled, [str(layers[row]) for row in labelled])
    heat.set(title=title, xlabel=histograms.quantity, ylabel="layer", ylim=(len(layers) - 0.5, -0.5))
    bars.barh(rows, never / features, color="tab:gray")
    bars.set(title="never fires", xlim=(0, 1), xticks=(0, 0.5, 1))
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    colours = figure.colorbar(mesh, ax=(heat, bars), format=PercentFormatter(1))
    colours.set_label("share of the layer's features")
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """[height,width,3] pixels of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
