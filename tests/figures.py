"""Plain pictures and runs to draw, and what to ask of a drawn figure."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

RUNS: list[dict[str, Any]] = [
    {
        "run": "plain",
        "i2t_recall@1": 0.239,
        "t2i_recall@1": 0.184,
        "i2t_recall@5": 0.501,
        "t2i_recall@5": 0.458,
    },
    {"run": "bn", "i2t_recall@1": 0.25, "t2i_recall@1": 0.19, "i2t_recall@5": 0.52, "t2i_recall@5": 0.47},
]


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    """Plain pictures of different colours."""
    return [Image.new("RGB", size, (20 * number % 256, 90, 200 - 10 * number)) for number in range(count)]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def picture_axes(figure: Figure) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def overlaps(boxes: list[matplotlib.transforms.Bbox]) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a hundredth of a pixel."""
    pairs = [(a, b) for a in range(len(boxes)) for b in range(a)]
    shared = [matplotlib.transforms.Bbox.intersection(boxes[a], boxes[b]) for a, b in pairs]
    return [
        pair
        for pair, box in zip(pairs, shared, strict=True)
        if box and box.width > 0.01 and box.height > 0.01
    ]
