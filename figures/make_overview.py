"""Draws figures/overview.svg and .png, the method at a glance: python figures/make_overview.py"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foggen import show
from foggen.show import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

Boxes = dict[str, tuple[float, float, str, str]]  # name: x, y, text, colour
Arrows = list[tuple[str, str, str, str]]  # from, to, colour, text

ROUTING: Boxes = {
    "question": (1.2, 5, "question\nA. ...  B. ...", BLACK),
    "edge": (4.6, 5, "edge model\nsmall, local", BLUE),
    "text": (4.6, 3, "Confidence: 0.75\nFinal answer: B", BLUE),
    "test": (4.6, 1, "confidence\n$\\geq \\tau$ = 0.5?", BLACK),
    "keep": (1.2, 1, "keep the\nlocal answer", GREEN),
    "cloud": (8.2, 3, "cloud model\nlarge, remote", VERMILION),
    "answer": (8.2, 5, "cloud answer", VERMILION),
}
ROUTES: Arrows = [
    ("question", "edge", GREY, ""),
    ("edge", "text", GREY, ""),
    ("text", "test", GREY, ""),
    ("test", "keep", GREEN, "yes"),
    ("test", "cloud", VERMILION, "no, or not\nreadable"),
    ("cloud", "answer", VERMILION, ""),
]
LOOP: Boxes = {
    "model": (1.1, 5, "checkpoint\n$R_t$", BLUE),
    "sample": (4.6, 5, "8 answers to each\nquestion of one domain", BLUE),
    "count": (8.2, 5, "$k$ of 8 right\n(gold letter)", ORANGE),
    "label": (8.2, 3, "confidence =\n$k/8$ to the nearest\n0, ¼, ½, ¾, 1", ORANGE),
    "rows": (8.2, 1, "new rows: question,\nconfidence, answer", PURPLE),
    "buffer": (4.6, 3, "replay buffer\nof earlier rows", GREY),
    "tune": (4.6, 1, "LoRA fine-tuning\non new + replayed rows", GREEN),
    "merge": (1.1, 1, "merge:\n$R_{t+1}$", GREEN),
}
CIRCLE = ("model", "sample", "count", "label", "rows", "tune", "merge")
STEPS: Arrows = [
    *((first, second, GREY, "") for first, second in pairwise(CIRCLE)),
    ("rows", "buffer", GREY, ""),
    ("buffer", "tune", GREY, ""),
    ("merge", "model", BLUE, "14 rounds,\n7 domains\nin turn"),
]


def diagram(axes: Axes, title: str, boxes: Boxes, arrows: Arrows) -> None:
    """Texts in rounded boxes, with arrows from box to box."""
    axes.set(xlim=(-0.2, 9.6), ylim=(0.3, 5.8))
    axes.axis("off")
    axes.set_title(title, fontweight="bold")
    patches = {}
    for name, (x, y, text, colour) in boxes.items():
        fill = mpl.colors.to_rgba(colour, 0.12)
        look = {"boxstyle": "round,pad=0.5", "fc": fill, "ec": colour, "lw": 1.6}
        box = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=look)
        patches[name] = box.get_bbox_patch()
    for first, second, colour, text in arrows:
        start, end = np.array([boxes[first][:2], boxes[second][:2]])
        look = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
        look |= {"patchA": patches[first], "patchB": patches[second]}
        axes.annotate("", end, start, arrowprops=look)
        x, y = (start + end) / 2
        axes.text(x + 0.15, y - 0.1, text, ha="left", va="top", fontsize=9, color=colour)


def overview() -> Figure:
    """(a) routing at inference, (b) the loop that teaches the model to know itself."""
    show.style()
    plt.rcParams["text.parse_math"] = True  # no names from files here, but formulas
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.0), width_ratios=(1, 1.12))
    diagram(left, "(a) Inference: one generation decides", ROUTING, ROUTES)
    diagram(right, "(b) Training: rounds of labelling and fine-tuning", LOOP, STEPS)
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    show.save(overview(), folder, "overview")
