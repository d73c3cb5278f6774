"""Figures as PNG. Colors: Okabe and Ito, for every kind of color vision; lines differ in dashes too."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fedkl import wording
from fedkl.report.collect import TrainRun
from fedkl.report.partitions import Counts
from fedkl.report.pictures import Grid, Picture

ACCURACY = "accuracy.png"
SIDE_BY_SIDE = "side-by-side.png"
SIDE_BY_SIDE_DARK = "side-by-side-dark.png"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*")
_DPI = 200
_WIDTH = 4.4  # of a page's figures, in inches
_TITLE, _CAPTION = 11, 10  # type sizes of pictures, in points
_CELL, _SIDE = (1.1, 1.3), 0.98  # what a picture has with its caption, and its longer side, in inches
_FEW = 20  # rows that can be read one by one
_LIGHT, _DARK = ("white", "black"), ("#0d1117", "#e6edf3")  # paper and ink; dark ones are GitHub's
_LINE = 0.075  # height of a label, as a share of the axes


def accuracy_curves(trains: Sequence[TrainRun]) -> bytes:
    """Test accuracy over rounds: one line for each run, named at its end."""
    figure = _figure(_WIDTH, 3.1)
    axes = figure.add_axes((0.14, 0.16, 0.49, 0.79))
    ends = []
    for index, run in enumerate(trains):
        color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
        rounds, values = _curve(run)
        marker = "o" if len(rounds) < 3 else None
        axes.plot(rounds, values, color=color, linestyle=dashes, linewidth=1.8, marker=marker)
        ends.append((values[-1], f"{_short(run.name)} {values[-1]:.1f} %", color))
    axes.set_xlabel("Round")
    axes.set_ylabel("Test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends)
    return _png(figure)


def curves_alt(trains: Sequence[TrainRun]) -> str:
    """The figure in words."""
    ends = [f"{run.name} ends at {wording.percent(run.summary['accuracy'])}" for run in trains]
    return "Test accuracy over rounds: " + "; ".join(ends) + "."


def _curve(run: TrainRun) -> tuple[list[int], list[float]]:
    evaluated = [r for r in run.records if r["event"] == "round" and r["accuracy"] is not None]
    if not evaluated:  # results.jsonl is gone: the summary still has the end
        return [run.summary["rounds"]], [100 * run.summary["accuracy"]]
    return [r["round"] + 1 for r in evaluated], [100 * r["accuracy"] for r in evaluated]


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Labels right of the axes at the height of the lines' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    heights: list[float] = []
    for value, _, _ in ordered:
        wanted = (value - low) / (high - low)
        heights.append(wanted if not heights else max(wanted, heights[-1] + _LINE))
    excess = max(0.0, heights[-1] - 1)
    for height, (_, label, color) in zip(heights, ordered, strict=True):
        axes.text(1.03, height - excess, label, color=color, transform=axes.transAxes, va="center", size=9)


def partition_map(counts: Counts) -> bytes:
    """Samples by client (rows) and class (columns), darker for more and white for none; bars of the sums."""
    clients, classes = counts.shape
    height = min(max(0.19 * clients, 0.9), 5.0)
    figure = _figure(_WIDTH, height + 0.55)

    def place(left: float, right: float) -> Axes:
        size = (left / _WIDTH, 0.45 / (height + 0.55), (right - left) / _WIDTH, height / (height + 0.55))
        return figure.add_axes(size)

    axes, bars = place(0.5, 3.1), place(3.18, 3.75)
    image = axes.imshow(np.ma.masked_equal(counts, 0), aspect="auto", cmap=_shades(), vmin=0)
    axes.set_xlabel("Class", size=8)
    axes.set_ylabel("Client", size=8)
    bars.barh(range(clients), counts.sum(1), height=0.8 if clients <= _FEW else 1.0, color="#666666")
    bars.set_ylim(axes.get_ylim())
    bars.set_xlabel("All classes", size=8)
    bars.xaxis.set_major_locator(MaxNLocator(1, integer=True))
    bars.set_yticks([])
    bars.spines[["top", "right"]].set_visible(False)
    for axis, length in ((axes.xaxis, classes), (axes.yaxis, clients)):
        axis.set_major_locator(MaxNLocator(length if length <= _FEW else 10, integer=True))
    for each in (axes, bars):
        each.tick_params(labelsize=7, length=2)
    if clients <= _FEW and classes <= 10 and counts.max() < 10_000:
        _write_counts(axes, counts)
    else:
        figure.colorbar(image, cax=place(3.9, 3.98)).ax.tick_params(labelsize=7, length=2)
    return _png(figure)


def _shades() -> ListedColormap:
    """One hue, told apart by lightness alone; a single sample is told from none."""
    return ListedColormap(matplotlib.colormaps["Blues"](np.linspace(0.15, 1, 256)))


def _write_counts(axes: Axes, counts: Counts) -> None:
    for (client, label), count in np.ndenumerate(counts):
        color = "white" if count > 0.55 * counts.max() else "black"
        text = str(count) if count else ""
        axes.text(label, client, text, color=color, size=6, ha="center", va="center")


def picture_grid(grid: Grid, *, dark: bool = False) -> bytes:
    """The grid as one PNG: rows of true images, columns of arms, PSNR below each picture.

    Args:
        grid: The pictures.
        dark: Whether for a dark page; the pictures are the same.
    """
    paper, ink = _DARK if dark else _LIGHT
    with matplotlib.rc_context({"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink}):
        return _picture_grid(grid, paper)


def _picture_grid(grid: Grid, paper: str) -> bytes:
    """All on one pair of axes in inches: axes for each picture take nearly twice as long."""
    columns, rows = len(grid.columns), max(len(grid.rows), 1)
    titles = [_title(name) for name in grid.columns]
    head = 0.12 + 0.18 * max(name.count("\n") + 1 for name in titles)
    width, height = _CELL[0] * columns, _CELL[1] * rows + head
    figure = _figure(width, height, paper=paper)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    for column, title in enumerate(titles):
        axes.text(
            (column + 0.5) * _CELL[0], height - head + 0.06, title, size=_TITLE, ha="center", va="bottom"
        )
    for index, row in enumerate(grid.rows):
        for column, picture in enumerate(row.cells):
            middle = (column + 0.5) * _CELL[0], height - head - index * _CELL[1] - _SIDE / 2
            _draw(axes, picture, middle)
    return _png(figure)


def _title(name: str) -> str:
    """On lines that fit over a picture in large type, which is readable on a phone."""
    lines = [fill(line, 12, break_long_words=False) for line in name.split("\n")]
    return _plain("\n".join(lines))


def _draw(axes: Axes, picture: Picture, middle: tuple[float, float]) -> None:
    """One picture in a frame, as large as fits into a square around `middle`, and its caption below."""
    tall, wide = (1, 1) if picture.image is None else picture.image.shape[1:]
    high, broad = _SIDE * tall / max(tall, wide), _SIDE * wide / max(tall, wide)
    left, bottom = middle[0] - broad / 2, middle[1] - high / 2
    right, top = left + broad, bottom + high
    if picture.image is None:
        axes.plot([left, right], [bottom, top], color="#999999", linewidth=0.8)
        axes.plot([left, right], [top, bottom], color="#999999", linewidth=0.8)
    else:
        pixels, place = _pixels(picture.image), (left, right, bottom, top)
        axes.imshow(pixels, extent=place, interpolation="nearest", vmin=0, vmax=1, aspect="auto")
    frame = Rectangle(
        (left, bottom),
        broad,
        high,
        fill=False,
        linewidth=0.8,
        edgecolor=matplotlib.rcParams["axes.edgecolor"],
    )
    axes.add_patch(frame)
    axes.text(middle[0], middle[1] - _SIDE / 2 - 0.05, picture.caption, size=_CAPTION, ha="center", va="top")


class Tradeoff(NamedTuple):
    """One arrangement: group, name, its cost ± spread in percentage points, and what is read behind it.

    The share, with its interval, is in percent.
    """

    group: str
    name: str
    cost: float
    spread: float
    share: float
    low: float
    high: float


def frontier(points: Sequence[Tradeoff], *, share: str = "Identified by the worst rung (%)") -> bytes:
    """Accuracy lost (to the right) against what is read (upwards), one panel for each group.

    Args:
        points: All.
        share: What is read, for the axis.
    """
    groups = list(dict.fromkeys(point.group for point in points))
    figure = _figure(1.4 * _WIDTH * max(len(groups), 1), 3.4)
    for place, group in enumerate(groups):
        axes = figure.add_axes(((place + 0.1) / len(groups), 0.15, 0.52 / len(groups), 0.74))
        for index, point in enumerate([each for each in points if each.group == group]):
            axes.errorbar(
                point.cost,
                point.share,
                xerr=point.spread,
                yerr=[[point.share - point.low], [point.high - point.share]],
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=5,
                elinewidth=0.8,
                linestyle="",
                label=point.name,
            )
        axes.set_title(_plain(group), size=9)
        axes.set_xlabel("Accuracy lost (percentage points)", size=8)
        axes.set_ylabel(share, size=8)
        axes.set_ylim(-4, 104)
        axes.tick_params(labelsize=7)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.02))  # on no point
    return _png(figure)


def thumbnail(image: Float[Tensor, "channels height width"]) -> bytes:
    """One image, pixel by pixel; the page scales it up without smoothing."""
    buffer = BytesIO()
    imsave(buffer, _pixels(image), format="png", vmin=0, vmax=1)
    return buffer.getvalue()


def _pixels(image: Tensor) -> Any:
    """(height, width, 3) in [0, 1]: gray is repeated, further channels are left out."""
    channels = image if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return np.asarray(channels[:3].permute(1, 2, 0).clamp(0, 1).double().numpy())


def _figure(width: float, height: float, *, paper: str = "white") -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=paper)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _short(name: str) -> str:
    text = _plain(name)
    return text if len(text) <= 14 else text[:6] + "…" + text[-7:]


def _plain(text: str) -> str:
    """A dollar sign would start mathematics."""
    return text.replace("$", r"\$")
