"""The files of an evaluation: tables, images, and a section of an adapter's model card."""

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
from ..files import whole_file, write_whole
from ..hub import CARD_NAME, UNKNOWN_REPO, push_folder
from ..quoting import in_markdown
from .result import RESULTS_NAME, EvaluationResult

TABLE_NAME = "results.md"
CSV_NAME = "results.csv"
GRID_NAME = "grid.png"
PLOT_NAME = "plot.png"
CARD_IMAGE_NAME = "evaluation.png"
RESULT_FILES = (TABLE_NAME, CSV_NAME, RESULTS_NAME, GRID_NAME, PLOT_NAME)


def write_result(result: EvaluationResult, folder: Path, grid: Image.Image, plot: Any) -> None:
    """Writes the tables, the grid and the plot, each file whole or not at all.

    Args:
        result: The evaluation.
        folder: Folder that the files are written to.
        grid: Settings side by side.
        plot: Figure of the scores; None to remove the plot of an earlier evaluation.

    Raises:
        OSError: A file cannot be written.
    """
    write_whole(folder / TABLE_NAME, result.to_markdown())
    write_whole(folder / CSV_NAME, result.to_csv())
    write_whole(folder / RESULTS_NAME, json.dumps(result.to_dict(), indent=1) + "\n")
    save_image(grid, folder / GRID_NAME)
    if plot is None:
        (folder / PLOT_NAME).unlink(missing_ok=True)
        return
    with whole_file(folder / PLOT_NAME) as file:
        plot.savefig(file, format="png", dpi=110)


def save_image(image: Image.Image, path: Path) -> None:
    """Saves an image as PNG, whole or not at all; makes the folder if there is none.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        image.save(file, format="PNG")


def eval_results(
    result: EvaluationResult, setting: str, *, dataset_name: str, dataset_id: str | None = None
) -> list[EvalResult]:
    """Returns the numbers of a setting in the form of the Hub's `model-index` metadata.

    Args:
        result: The evaluation.
        setting: Label of the setting.
        dataset_name: Name of the set of prompts, such as "COCO 2017 captions".
        dataset_id: Hub id of the data set. Defaults to its name.
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
    """Adds an evaluation to an adapter's model card: a section with its tables, and metadata with its numbers.

    In an existing card only the section `evaluation` and these numbers are replaced. A card without sections of this
    package was written by hand and is left unchanged.

    Args:
        result: The evaluation.
        adapter: Folder of the adapter.
        dataset_name: Name of the set of prompts, such as "COCO 2017 captions".
        dataset_id: Hub id of the data set. Defaults to its name.
        setting: Label of the setting that uses this adapter. Defaults to the last one.
        grid: Image file to show in the section, such as the evaluation's `grid.png`. Defaults to none.
        repo_id: Repository to push the card and the image to. Defaults to none: nothing is pushed.
        token: Hub token. Defaults to the stored one.

    Returns:
        The URL of the commit; None if nothing was pushed.

    Raises:
        OSError: The folder has no adapter, or the Hub refused the push.
        KeyError: The evaluation has no such setting.
    """
    folder = Path(adapter)
    if not (folder / CONFIG_NAME).is_file():
        raise OSError(f"there is no {CONFIG_NAME} in {folder}; give the folder of an adapter")
    shown = []
    if grid is not None:
        with Image.open(grid) as image:
            save_image(image, folder / CARD_IMAGE_NAME)
        shown.append(CARD_IMAGE_NAME)
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
    """Returns a card that contains only the evaluation."""
    data = ModelCardData(model_name=model_name, eval_results=found) if found else ModelCardData()
    parts = [f"## Evaluation\n\nOn {in_markdown(dataset_name)}.", result.to_markdown().rstrip()]
    parts += [f"![Settings side by side, from the same noise]({name})" for name in shown]
    text = section("evaluation", "\n\n".join(parts))
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"
