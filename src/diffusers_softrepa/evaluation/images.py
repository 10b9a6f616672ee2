"""What an evaluation looks like: settings side by side, and their scores as a plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import EvaluationResult

CAPTION_HEIGHT = 16
_MIN_SIDE, _MAX_SIDE = 128, 256


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    heads: Sequence[str],
    *,
    max_side: int | None = _MAX_SIDE,
) -> Image.Image:
    """Returns one picture: a row for each prompt with its caption above, a column for each setting.

    Very small pictures are enlarged a whole number of times, without smoothing, unless `max_side` is None.

    Args:
        rows: Pictures, all rows of equal length.
        captions: What is above each row.
        heads: What is above each column.
        max_side: Widest picture in pixels; wider ones are reduced. None shows all of them as they are.
    """
    widest = max(picture.width for row in rows for picture in row)
    width = widest if max_side is None else min(max_side, widest * -(-_MIN_SIDE // widest))
    small = [[_fitted(picture, width) for picture in row] for row in rows]
    heights = [max(picture.height for picture in row) + CAPTION_HEIGHT for row in small]
    sheet = Image.new("RGB", (width * len(heads), CAPTION_HEIGHT + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((column * width + 2, 2), head, fill="black")
    top = CAPTION_HEIGHT
    for row, caption, height in zip(small, captions, heights, strict=True):
        draw.text((2, top + 2), caption, fill="black")
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, top + CAPTION_HEIGHT))
        top += height
    return sheet


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    if picture.width == width:
        return picture
    how = Image.Resampling.LANCZOS if width % picture.width else Image.Resampling.NEAREST
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), how)


def plot(result: "EvaluationResult") -> "Figure | None":
    """Returns a panel for each score: means of the settings; None where matplotlib is missing.

    Bars are 95% intervals of the paired difference to the first setting, whose mean is dotted: one that does not cross
    the dots is a difference.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    names = list(result.directions)
    if not names:
        return None
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    size = (3.4 * columns, (0.9 + 0.32 * len(result.settings)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, name in zip(panels.flat, names, strict=False):
        rows = [result.row(setting, name) for setting in result.settings]
        errors = [1.96 * row.difference_error if row.difference_error > 0 else 0.0 for row in rows]
        places = range(len(rows))
        axes.errorbar([row.mean for row in rows], places, xerr=errors, fmt="o", capsize=3)
        axes.axvline(rows[0].mean, color="0.6", linestyle=":")
        axes.set_yticks(list(places), result.settings)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(f"{name} {'↑' if result.directions[name] else '↓'}", fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    return figure
