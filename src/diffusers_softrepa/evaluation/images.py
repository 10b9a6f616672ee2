"""The images that summarize an evaluation: a grid of its settings side by side, and a plot of its scores."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ..quoting import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import EvaluationResult

_MAX_SIDE = 256
_MIN_FONT_SIZE = 13
_MARGIN = 4
_GAP = 4  # between columns
_MAX_CAPTION = 300  # characters


def grid(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    heads: Sequence[str] = (),
    *,
    max_side: int | None = _MAX_SIDE,
) -> Image.Image:
    """Returns one image with a row for each prompt, its caption above it, and a column for each setting.

    Captions are wrapped; those of more than 300 characters are shortened.

    Args:
        rows: The images, each row with the same number of them.
        captions: Text above each row.
        heads: Text above each column. Defaults to none.
        max_side: Width in pixels at which images are shown. Wider ones are reduced to it, and smaller ones are
            enlarged a whole number of times, without smoothing, as long as they fit. None shows all of them in the
            width of the widest. Defaults to 256.
    """
    width = max(image.width for row in rows for image in row)
    if max_side is not None:
        width = max_side if width >= max_side else width * (max_side // width)
    shown = [[_resized(image, width) for image in row] for row in rows]
    columns = len(rows[0])
    across = columns * (width + _GAP) - _GAP
    above = [_label(caption, width, across) for caption in captions]
    titles = [_label(head, width, width) for head in heads]
    top = max((title.height for title in titles), default=0)
    heights = [max(image.height for image in row) for row in shown]
    sheet = Image.new("RGB", (across, top + sum(label.height for label in above) + sum(heights)), "white")
    for column, title in enumerate(titles):
        sheet.paste(title, (column * (width + _GAP), 0))
    for row, label, height in zip(shown, above, heights, strict=True):
        sheet.paste(label, (0, top))
        top += label.height
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + _GAP), top))
        top += height
    return sheet


def _label(text: str, image_width: int, width: int) -> Image.Image:
    """Returns a text in black on white, wrapped to a width in pixels, in a size that suits the images below it."""
    font = ImageFont.load_default(max(_MIN_FONT_SIZE, round(image_width / 28)))
    lines = _wrapped(one_line(text, _MAX_CAPTION), font, width - 2 * _MARGIN)
    ascent, descent = font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (_MIN_FONT_SIZE, 0)
    label = Image.new("RGB", (width, (ascent + descent) * len(lines) + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(label)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * (ascent + descent)), line, fill="black", font=font)
    return label


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Returns the lines of a text; a word that is wider than a line is broken."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for sign in word:
            if lines[-1] and font.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
    return lines


def _resized(image: Image.Image, width: int) -> Image.Image:
    if image.width == width:
        return image
    how = Image.Resampling.LANCZOS if width % image.width else Image.Resampling.NEAREST
    return image.resize((width, max(1, round(image.height * width / image.width))), how)


def plot(result: "EvaluationResult") -> "Figure | None":
    """Returns a figure with a panel of the settings' means for each score; None where matplotlib is not installed.

    Bars are 95% intervals of the paired difference from the first setting, whose mean is a dotted line: a bar that
    does not cross that line is a significant difference.

    Args:
        result: The evaluation.
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
