"""The result of an evaluation: the score of each image, and tables of their means."""

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from ..quoting import in_markdown, markdown_table, quoted
from .statistics import clustered_mean, share_better

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Row:
    """One number of a table and its difference from the first setting.

    Attributes:
        setting: Label of the setting.
        score: Name of the score.
        category: Category of the prompts; None for all prompts.
        count: Number of images.
        mean: Mean score of the images, or the distance of the set of images.
        error: Standard error of the mean, clustered by prompt; NaN for distances.
        difference: Mean paired difference from the first setting; NaN for the first setting.
        difference_error: Standard error of the difference; NaN for distances.
        better: Share of images that are better than the first setting's, equal ones counting half; NaN for distances.
    """

    setting: str
    score: str
    category: str | None
    count: int
    mean: float
    error: float
    difference: float
    difference_error: float
    better: float


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation.

    Attributes:
        settings: Labels of the settings; the first is the baseline of the others.
        prompts: Ids of the prompts.
        texts: Texts of the prompts.
        categories: Category of each prompt; None for a prompt without one.
        seeds: The seeds.
        scores: Score of each image by name, (settings, prompts, seeds) float64; NaN where a score does not apply.
        distances: Distance between each setting's images and the reference images, by name.
        directions: Whether higher is better, by name of the score or distance.
        references: Publication of each score or distance, by name.
    """

    settings: list[str]
    prompts: list[str]
    texts: list[str]
    categories: list[str | None]
    seeds: list[int]
    scores: Mapping[str, Tensor]
    distances: Mapping[str, list[float]]
    directions: Mapping[str, bool]
    references: Mapping[str, str] = field(default_factory=dict)

    @property
    def category_names(self) -> list[str]:
        """The categories, in the order of the prompts."""
        return list(dict.fromkeys(category for category in self.categories if category is not None))

    def row(self, setting: str, score: str, category: str | None = None) -> Row:
        """Returns one number with its difference from the first setting.

        Args:
            setting: Label of the setting.
            score: Name of the score or distance.
            category: Category of the prompts; None for all prompts.

        Raises:
            KeyError: The result has no such setting or score.
        """
        if setting not in self.settings or score not in self.directions:
            raise KeyError(
                f"there is no score {score!r} of setting {setting!r}; the scores are {list(self.directions)}, the "
                f"settings {self.settings}"
            )
        index = self.settings.index(setting)
        if score in self.distances:
            values = self.distances[score]
            apart = values[index] - values[0] if index else math.nan
            count = len(self.prompts) * len(self.seeds)
            return Row(setting, score, None, count, values[index], math.nan, apart, math.nan, math.nan)
        chosen = torch.tensor([category in (None, each) for each in self.categories])
        each = self.scores[score][:, chosen]
        mean = clustered_mean(each[index])
        if not index:
            nan = math.nan
            return Row(setting, score, category, mean.count, mean.value, mean.error, nan, nan, nan)
        differences = each[index] - each[0]
        apart_mean = clustered_mean(differences)
        better = share_better(differences, higher_is_better=self.directions[score])
        difference = (apart_mean.value, apart_mean.error, better)
        return Row(setting, score, category, mean.count, mean.value, mean.error, *difference)

    def rows(self, *, by_category: bool = False) -> list[Row]:
        """Returns all numbers; with `by_category` also those of each category."""
        categories: list[str | None] = [None, *(self.category_names if by_category else [])]
        return [
            self.row(setting, score, category)
            for score in self.directions
            for category in (categories if score in self.scores else [None])
            for setting in self.settings
        ]

    # Tables.

    def to_markdown(self) -> str:
        """Returns a table of the settings and, if prompts have categories, one of each score by category."""
        heads = ["setting", *(f"{in_markdown(name)} {'↑' if up else '↓'}" for name, up in self.directions.items())]
        lines = [
            [
                in_markdown(setting),
                *(_cell(self.row(setting, name), self.directions[name]) for name in self.directions),
            ]
            for setting in self.settings
        ]
        count = f"{len(self.prompts)} prompts x {len(self.seeds)} seeds"
        first = in_markdown(self.settings[0])
        note = (
            f"{count}; mean ± standard error (in brackets: paired difference from {first}, bold if it is an "
            "improvement of more than two standard errors). Errors are clustered by prompt."
        )
        parts = [markdown_table(heads, lines), note]
        if self.category_names:
            parts += [f"### {in_markdown(name)} by category\n\n{self._by_category(name)}" for name in self.scores]
        return "\n\n".join(parts) + "\n"

    def _by_category(self, score: str) -> str:
        lines = []
        for setting in self.settings:
            rows = [self.row(setting, score, category) for category in self.category_names]
            means = [row.mean for row in rows if row.count]
            mean = f"{sum(means) / len(means):.4g}" if means else "-"
            lines.append([in_markdown(setting), *(_cell(row, self.directions[score]) for row in rows), mean])
        return markdown_table(["setting", *map(in_markdown, self.category_names), "mean of categories"], lines)

    def to_csv(self) -> str:
        """Returns CSV with a line for each number; cells without a value are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for row in self.rows(by_category=True):
            writer.writerow(
                {name: "" if value is None or value != value else value for name, value in asdict(row).items()}
            )
        return text.getvalue()

    # Files.

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole result in types that JSON has; NaNs are None."""
        return {
            "settings": self.settings,
            "seeds": self.seeds,
            "prompts": [
                {"id": name, "text": text, "category": category}
                for name, text, category in zip(self.prompts, self.texts, self.categories, strict=True)
            ],
            "directions": dict(self.directions),
            "references": dict(self.references),
            "rows": [without_nan(asdict(row)) for row in self.rows(by_category=True)],
            "distances": without_nan(dict(self.distances)),
            "scores": {name: without_nan(value.tolist()) for name, value in self.scores.items()},
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "EvaluationResult":
        """Returns the result that an evaluation wrote to its output folder.

        Args:
            folder: The `output_dir` of the evaluation.

        Raises:
            ValueError: The folder's `results.json` is truncated, or was not written by an evaluation.
            OSError: There is no such file.
        """
        path = Path(folder) / RESULTS_NAME
        found = read_json(path, max_bytes=1 << 30)
        try:
            result = cls(
                settings=found["settings"],
                prompts=[prompt["id"] for prompt in found["prompts"]],
                texts=[prompt["text"] for prompt in found["prompts"]],
                categories=[prompt["category"] for prompt in found["prompts"]],
                seeds=found["seeds"],
                scores={
                    name: torch.tensor(_with_nan(values), dtype=torch.float64)
                    for name, values in found["scores"].items()
                },
                distances=_with_nan(found["distances"]),
                directions=found["directions"],
                references=found["references"],
            )
            shape = (len(result.settings), len(result.prompts), len(result.seeds))
            if any(values.shape != shape for values in result.scores.values()):
                raise ValueError(f"scores must have the shape {shape} of settings, prompts and seeds")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not the result of an evaluation ({quoted(error)}); evaluate again") from error
        return result

    def __str__(self) -> str:
        return self.to_markdown()


def _cell(row: Row, higher_is_better: bool) -> str:
    if not row.count:
        return "-"
    text = _number(row.mean, row.error)
    if row.difference != row.difference:
        return text
    signed = row.difference if higher_is_better else -row.difference
    apart = _number(row.difference, row.difference_error, sign="+")
    return f"{text} ({f'**{apart}**' if signed > 2 * row.difference_error else apart})"


def _number(value: float, error: float, sign: str = "") -> str:
    """Returns a number with two significant digits of its error."""
    if not 0 < error < math.inf:
        return f"{value:{sign}.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def without_nan(value: Any) -> Any:
    """Returns a value with None in place of all numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return math.nan if value is None else value
