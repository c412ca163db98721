"""Pictures of histograms for TensorBoard, drawn with Pillow alone: one row per layer, darker where more entries are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from clt.evaluation.evaluator import LayerHistograms

_BIN_WIDTH, _ROW_HEIGHTS = 22, (10, 34)
_PLOT_HEIGHT = 420
#: Left of the bins stand the layer and its share of features that never fire.
_LEFT, _RIGHT, _TOP, _BOTTOM = 140, 104, 68, 56
_LAYER, _OUTSIDE = 74, 126
_KEY_WIDTH = 16
#: Least distance of two lines of text.
_LINE = 18
#: From no entries to the most, light to dark.
_COLOURS = ((247, 250, 252), (158, 202, 225), (33, 113, 181), (8, 38, 86))
_INK, _FRAME = (40, 40, 40), (150, 150, 150)


def density_plot(histograms: LayerHistograms, title: str) -> NDArray[np.uint8]:
    """A heat map: layers down, bins across, colour the share of a layer's entries.

    Args:
        histograms: of at least one layer.
        title: above the plot.

    Returns:
        [height,width,3] pixels.
    """
    layers = sorted(histograms.counts)
    counts = np.array([histograms.counts[layer] for layer in layers], dtype=np.float64)
    outside = np.array([histograms.outside[layer] for layer in layers], dtype=np.float64)
    entries = np.maximum(counts.sum(axis=1) + outside, 1)
    share = counts / entries[:, None]
    most = float(share.max())
    height = int(np.clip(_PLOT_HEIGHT // len(layers), *_ROW_HEIGHTS))
    right, bottom = _LEFT + counts.shape[1] * _BIN_WIDTH, _TOP + height * len(layers)
    image = Image.new("RGB", (right + _RIGHT, bottom + _BOTTOM), "white")
    draw = ImageDraw.Draw(image)
    for row, values in enumerate(share):
        y = _TOP + row * height
        for column, value in enumerate(values):
            x = _LEFT + column * _BIN_WIDTH
            draw.rectangle((x, y, x + _BIN_WIDTH - 1, y + height - 1), fill=_colour(value / most if most else 0.0))
    draw.rectangle((_LEFT - 1, _TOP - 1, right, bottom), outline=_FRAME)
    draw.text((16, 12), title, fill=_INK, font=_font(18))
    _label_rows(draw, layers, outside / entries, height)
    _label_bins(draw, histograms, right, bottom)
    _colour_key(draw, right + 24, bottom, most)
    return np.asarray(image)


def _label_rows(draw: ImageDraw.ImageDraw, layers: list[int], outside: NDArray[np.float64], height: int) -> None:
    draw.text((_OUTSIDE, _TOP - 8), "never", _INK, _font(13), anchor="rb")
    for row in range(0, len(layers), -(-_LINE // height)):
        y = _TOP + (row + 0.5) * height
        draw.text((_LAYER, y), f"layer {layers[row]}", _INK, _font(13), anchor="rm")
        draw.text((_OUTSIDE, y), f"{outside[row]:.1%}", _INK, _font(13), anchor="rm")


def _label_bins(draw: ImageDraw.ImageDraw, histograms: LayerHistograms, right: int, bottom: int) -> None:
    for number, edge in enumerate(histograms.edges):
        if edge == round(edge):
            x = _LEFT + number * _BIN_WIDTH
            draw.line((x, bottom, x, bottom + 5), fill=_INK)
            draw.text((x, bottom + 8), f"{edge:g}", fill=_INK, font=_font(13), anchor="mt")
    draw.text(((_LEFT + right) / 2, bottom + 30), histograms.quantity, fill=_INK, font=_font(14), anchor="mt")


def _colour_key(draw: ImageDraw.ImageDraw, x: int, bottom: int, most: float) -> None:
    for y in range(_TOP, bottom):
        colour = _colour((bottom - 1 - y) / max(1, bottom - 1 - _TOP))
        draw.line((x, y, x + _KEY_WIDTH - 1, y), fill=colour)
    draw.rectangle((x - 1, _TOP - 1, x + _KEY_WIDTH, bottom), outline=_FRAME)
    for share, y in ((most, _TOP), (0.0, bottom)):
        draw.text((x + _KEY_WIDTH + 6, y), f"{share:.0%}", fill=_INK, font=_font(13), anchor="lm")
    draw.text((x + _KEY_WIDTH, _TOP - 12), "of a layer", fill=_INK, font=_font(13), anchor="mb")


def _colour(level: float) -> tuple[int, ...]:
    place = level * (len(_COLOURS) - 1)
    below = min(int(place), len(_COLOURS) - 2)
    pairs = zip(_COLOURS[below], _COLOURS[below + 1], strict=True)
    return tuple(round(low + (place - below) * (high - low)) for low, high in pairs)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
