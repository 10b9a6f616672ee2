"""The tables and the plot of what `agreement.py` found."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

CLEAR = 2  # standard errors from which on a difference counts
UNEDITED = "unedited"  # the setting of images that were left alone

Found = dict[str, Any]


def as_markdown(found: Mapping[str, Found]) -> str:
    """Returns all tables."""
    parts = []
    if "clean" in found:
        head = "Clean images: per cent of comparisons that the true caption wins (50: blind), by what is false"
        parts += [f"### {head}", _clean_table(found["clean"])]
    for part, name in (("images", "prompts"), ("edits", "edits")):
        if part in found:
            parts += [
                f"### Images of {name}: does the score tell right from wrong?",
                _area_table(found[part]["areas"]),
                f"### Images of {name}: does it rank settings as the oracle does?",
                _setting_table(found[part]["settings"]),
            ]
    return "\n\n".join(parts) + "\n"


def _clean_table(found: Found) -> str:
    lines = [
        [name, *(_number(100 * cell["share"], 100 * cell["error"], 1) for cell in row.values())]
        for name, row in found.items()
    ]
    return _table(["true caption", *found["all"]], lines)


def _area_table(areas: Found) -> str:
    heads = ["", "right", "wrong", "AUC", "AUC within a prompt", "prompts with both"]
    return _table(
        heads,
        [
            [
                *(name, str(row["right"]), str(row["wrong"]), _number(row["auc"], row["auc_error"])),
                *(_number(row["within"], row["within_error"]), str(row["within_count"])),
            ]
            for name, row in areas.items()
        ],
    )


def _setting_table(rows: Sequence[Found]) -> str:
    heads = ["setting", "", "CLIP score", "difference", "oracle, % right", "difference", ""]
    lines = []
    for row in rows:
        clip = [_number(row["clip"], row["clip_error"])]
        clip += [_number(row["clip_difference"], row["clip_difference_error"], sign="+")]
        oracle = [_number(100 * row["oracle"], 100 * row["oracle_error"], 1)]
        oracle += [_number(100 * row["oracle_difference"], 100 * row["oracle_difference_error"], 1, "+")]
        lines.append([row["setting"], row["category"], *clip, *oracle, row["verdict"]])
    return _table(heads, lines)


def _number(value: float, error: float, digits: int = 3, sign: str = "") -> str:
    if math.isnan(value):
        return ""
    return f"{value:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def plot(found: Mapping[str, Found]) -> Any:
    """Returns a figure with a panel for each question that was asked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [part for part in ("images", "edits") if part in found]
    panels = [*(["clean"] if "clean" in found else []), *(["areas", "settings"] if drawn else [])]
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel == "clean":
            _plot_clean(axes, found["clean"]["all"])
        elif panel == "areas":
            _plot_areas(axes, {part: found[part]["areas"] for part in drawn})
        else:
            _plot_settings(axes, {part: found[part]["settings"] for part in drawn})
    return figure


def _plot_clean(axes: Any, row: Found) -> None:
    shares, errors = ([100 * cell[name] for cell in row.values()] for name in ("share", "error"))
    axes.bar(list(row), shares, yerr=[CLEAR * error for error in errors], color="#4477aa", capsize=3)
    axes.axhline(50, color="black", linestyle=":", linewidth=1)
    axes.set(ylim=(0, 105), ylabel="% of comparisons", title="the true caption of a clean image wins")
    axes.tick_params(axis="x", rotation=30)


def _plot_areas(axes: Any, parts: Mapping[str, Found]) -> None:
    for (part, areas), color in zip(parts.items(), ("#4477aa", "#cc6677"), strict=False):
        names = [f"edit: {name}" if part == "edits" else name for name in areas]
        values, errors = ([row[name] for row in areas.values()] for name in ("auc", "auc_error"))
        axes.errorbar(values, names, xerr=[CLEAR * error for error in errors], fmt="o", color=color, capsize=3)
    axes.axvline(0.5, color="black", linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="AUC", title="the score tells right images from wrong")


def _plot_settings(axes: Any, parts: Mapping[str, Sequence[Found]]) -> None:
    for part, marker in (("images", "o"), ("edits", "s")):
        rows = [row for row in parts.get(part, ()) if row["verdict"] and row["setting"] != UNEDITED]
        for number, setting in enumerate(dict.fromkeys(row["setting"] for row in rows)):
            for row in rows:
                if row["setting"] != setting:
                    continue
                whole = row["category"] == "all"
                axes.errorbar(
                    100 * row["oracle_difference"],
                    row["clip_difference"],
                    xerr=100 * CLEAR * row["oracle_difference_error"] if whole else None,
                    yerr=CLEAR * row["clip_difference_error"] if whole else None,
                    fmt=marker,
                    color=f"C{number}",
                    markersize=8 if whole else 4,
                    alpha=1 if whole else 0.5,
                    label=f"{setting}, {part}" if whole else None,
                )
    axes.axhline(0, color="black", linestyle=":", linewidth=1)
    axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="oracle: points of % right more than the base", ylabel="CLIP score more than the base")
    axes.set(title="settings against the base, small: by skill")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
