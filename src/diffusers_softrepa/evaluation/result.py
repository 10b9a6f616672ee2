"""What an evaluation found: scores of every picture, and the tables made of them."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
from ..quoting import in_markdown
from .statistics import clustered_mean, share_better

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Row:
    """One number of a table and how it differs from the first setting's.

    Attributes:
        setting: Its setting.
        score: Name of the score.
        category: Of the prompts, None for all.
        count: Pictures.
        mean: Mean over the pictures, or the distance of a set.
        error: Its standard error, clustered by prompt; NaN for distances.
        difference: Mean paired difference to the first setting; NaN for the first.
        difference_error: Its standard error.
        better: Share of pairs that are better than the first setting's, equal ones counting half.
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
    """What an evaluation found.

    Attributes:
        settings: Labels, the first one being what the others are compared with.
        prompts: Ids of the prompts.
        texts: Their texts.
        categories: Category of each prompt, None without one.
        seeds: The seeds.
        scores: Score of each picture by name, (settings, prompts, seeds) float64; NaN where it does not apply.
        distances: Distance of each setting's pictures to reference pictures, by name.
        directions: Whether higher is better, by name of all scores and distances.
        references: Where each was published.
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
        """The categories, in the order in which they come."""
        return list(dict.fromkeys(category for category in self.categories if category is not None))

    def row(self, setting: str, score: str, category: str | None = None) -> Row:
        """Returns one number with its difference to the first setting.

        Raises:
            KeyError: There is no such setting or score.
        """
        if setting not in self.settings or score not in self.directions:
            raise KeyError(f"there is no {score!r} of {setting!r}; scores {list(self.directions)}, {self.settings}")
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
        """Returns all numbers, also those of each category if asked."""
        categories: list[str | None] = [None, *(self.category_names if by_category else [])]
        return [
            self.row(setting, score, category)
            for score in self.directions
            for category in (categories if score in self.scores else [None])
            for setting in self.settings
        ]

    # Tables.

    def to_markdown(self) -> str:
        """Returns a table of the settings, and one for each score by category where there are categories."""
        heads = ["setting", *(f"{in_markdown(name)} {'↑' if up else '↓'}" for name, up in self.directions.items())]
        lines = [
            [
                in_markdown(setting),
                *(_cell(self.row(setting, name), self.directions[name]) for name in self.directions),
            ]
            for setting in self.settings
        ]
        pictures = f"{len(self.prompts)} prompts x {len(self.seeds)} seeds"
        first = in_markdown(self.settings[0])
        note = (
            f"{pictures}; mean ± standard error (in brackets: paired difference to {first}, bold where it is better "
            "by more than two standard errors). Errors are clustered by prompt."
        )
        parts = [_table(heads, lines), note]
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
        return _table(["setting", *map(in_markdown, self.category_names), "mean of categories"], lines)

    def to_csv(self) -> str:
        """Returns every number in a line of its own; what there is not is empty."""
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
        """Returns everything as JSON can hold it: scores of pictures by name, setting, prompt and seed."""
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
        """Returns the result that an evaluation left in its output folder."""
        found = read_json(Path(folder) / RESULTS_NAME)
        return cls(
            settings=found["settings"],
            prompts=[prompt["id"] for prompt in found["prompts"]],
            texts=[prompt["text"] for prompt in found["prompts"]],
            categories=[prompt["category"] for prompt in found["prompts"]],
            seeds=found["seeds"],
            scores={
                name: torch.tensor(_with_nan(values), dtype=torch.float64) for name, values in found["scores"].items()
            },
            distances=_with_nan(found["distances"]),
            directions=found["directions"],
            references=found["references"],
        )

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
    """Returns a number with as many digits as its error bears out."""
    if not error > 0:
        return f"{value:{sign}.4g}"
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def without_nan(value: Any) -> Any:
    """Returns values as JSON can hold them: None for numbers that are not finite, at any depth."""
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
