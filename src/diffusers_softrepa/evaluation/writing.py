"""What an evaluation leaves for people: tables, pictures, and its place in an adapter's model card."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from ..card import metadata_of, model_card, section
from ..checkpoint import CONFIG_NAME, write_card
from ..config import SoftREPAConfig
from ..hub import CARD_NAME, UNKNOWN_REPO, push_folder
from ..quoting import in_markdown
from .result import RESULTS_NAME, EvaluationResult

TABLE_NAME = "results.md"
CSV_NAME = "results.csv"
GRID_NAME = "grid.png"
PLOT_NAME = "plot.png"
CARD_PICTURE_NAME = "evaluation.png"


def write_result(result: EvaluationResult, folder: Path, grid: Image.Image, plot: Any) -> None:
    """Writes the tables, the grid and, if there is one, the plot."""
    (folder / TABLE_NAME).write_text(result.to_markdown(), encoding="utf-8")
    (folder / CSV_NAME).write_text(result.to_csv(), encoding="utf-8")
    (folder / RESULTS_NAME).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    grid.save(folder / GRID_NAME)
    if plot is not None:
        plot.savefig(folder / PLOT_NAME, dpi=110)


def eval_results(
    result: EvaluationResult, setting: str, *, dataset_name: str, dataset_id: str | None = None
) -> list[EvalResult]:
    """Returns the numbers of a setting as the Hub's metadata hold them.

    Args:
        result: The evaluation.
        setting: One of its settings.
        dataset_name: What the prompts are called, such as "COCO 2017 captions".
        dataset_id: Hub id of their data set.
    """
    rows = [result.row(setting, score) for score in result.directions]
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=dataset_id or dataset_name,
            dataset_name=dataset_name,
            metric_type=row.score,
            metric_name=row.score,
            metric_value=round(row.mean, 6),
        )
        for row in rows
        if row.count and row.mean == row.mean
    ]


def add_to_card(
    result: EvaluationResult,
    adapter: str | os.PathLike[str],
    *,
    dataset_name: str,
    dataset_id: str | None = None,
    setting: str | None = None,
    grid: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    token: str | bool | None = None,
) -> str | None:
    """Puts an evaluation into an adapter's model card: its tables as a section, one setting's numbers as metadata.

    Of a card that is there only the section `evaluation` and those numbers are replaced; one that was written by hand,
    without a section of this package, is left alone.

    Args:
        result: The evaluation.
        adapter: Folder of the adapter.
        dataset_name: What the prompts are called, such as "COCO 2017 captions".
        dataset_id: Hub id of their data set.
        setting: The setting that is this adapter; the last one unless given.
        grid: A picture to show, such as the `grid.png` of the evaluation.
        repo_id: Push the card and the picture to this repository.
        token: Hub token.

    Returns:
        The URL of the commit, None when nothing was pushed.

    Raises:
        OSError: There is no adapter in the folder, or the Hub refused.
        KeyError: There is no such setting.
    """
    folder = Path(adapter)
    if not (folder / CONFIG_NAME).is_file():
        raise OSError(f"there is no {CONFIG_NAME} in {folder}; give the folder of an adapter")
    shown = []
    if grid is not None:
        with Image.open(grid) as picture:
            picture.save(folder / CARD_PICTURE_NAME)
        shown.append(CARD_PICTURE_NAME)
    if not (folder / CARD_NAME).is_file():
        config = SoftREPAConfig.from_dict(SoftREPAConfig.from_json_file(str(folder / CONFIG_NAME)))
        write_card(folder, str(model_card(config, UNKNOWN_REPO)))
    found = eval_results(result, setting or result.settings[-1], dataset_name=dataset_name, dataset_id=dataset_id)
    write_card(folder, _fragment(result, found, _model_name(folder), dataset_name, shown))
    if repo_id is None:
        return None
    return push_folder(folder, repo_id, [CARD_NAME, *shown], token=token, commit_message="Add an evaluation")


def _model_name(folder: Path) -> str:
    text = (folder / CARD_NAME).read_text(encoding="utf-8", errors="surrogateescape")
    name = metadata_of(text).get("model_name")
    index = metadata_of(text).get("model-index")
    if name is None and isinstance(index, list) and index and isinstance(index[0], dict):
        name = index[0].get("name")
    return name if isinstance(name, str) and name else UNKNOWN_REPO


def _fragment(
    result: EvaluationResult, found: list[EvalResult], model_name: str, dataset_name: str, shown: Sequence[str]
) -> str:
    """Returns a card that has nothing but the evaluation."""
    data = ModelCardData(model_name=model_name, eval_results=found) if found else ModelCardData()
    parts = [f"## Evaluation\n\nOn {in_markdown(dataset_name)}.", result.to_markdown().rstrip()]
    parts += [f"![Settings side by side, from the same noise]({name})" for name in shown]
    text = section("evaluation", "\n\n".join(parts))
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"
