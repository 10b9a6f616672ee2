"""The notebooks are stored clean, and run from first to last on the embedded pipeline, without a network."""

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.~/])(?:/(?:home|root|Users|work|mnt|tmp|opt|data|var)/|[A-Z]:\\\\)")

# Images and plots that each shows, and what it must have made, asked in its own kernel behind its last cell. Where a
# text speaks of a gain, the gain must be above its own standard error.
SHOWN = {
    "01_use_an_adapter": 4,
    "02_combine_and_steer": 4,
    "03_train_on_your_own_folder": 4,
    "04_publish_and_load_back": 1,
    "05_edit_an_image": 4,
    "06_evaluate": 2,
}
MADE = {
    "01_use_an_adapter": """
assert same_bits
assert right(with_tokens, [ask] * 4).sum() > right(base, [ask] * 4).sum()
points, error = gain(verdicts["soft tokens"], verdicts["base"])
assert points > error > 0
assert pipe.get_softrepa_adapters() == {}
""",
    "02_combine_and_steer": """
assert all(np.isfinite(losses))
assert black(images["LoRA"]) > black(images["neither"]) + 0.3
assert black(images["both"]) > black(images["soft tokens"]) + 0.3
assert 0 == changes[0].max() < changes[-1].max()
points, error = gains["both"]
assert points > error > 0
assert pipe.get_softrepa_adapters() == {"softrepa": 1.0}
""",
    "03_train_on_your_own_folder": """
assert result.finished and result.step == args.max_steps == log[-1]["step"]
assert any("eval/top1" in entry for entry in log)
assert points > error > 0
assert same
""",
    "04_publish_and_load_back": """
assert same and kept and still
assert points > error > 0
assert set(hub.files("alice/shapes-tokens")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
assert fresh.get_softrepa_adapters() == {"softrepa": None, "v1": 1.0}
""",
    "05_edit_an_image": """
assert [len(made) for made in everything.values()] == [len(edits)] * 3
assert base.tobytes() != image.tobytes() and base.size == image.size
assert all(0 <= table["all"]["done"] <= 1 for table in results.values())
apart = results["soft tokens"]["all"]["done"] - results["base"]["all"]["done"]
assert abs(gains["done", "all"][0] - 100 * apart) < 1e-9
""",
    "06_evaluate": """
assert result.scores["oracle/right"].shape == (3, len(questions), 1)
full = result.row("softrepa", "oracle/right")
assert full.difference > full.difference_error > 0
half = result.row("softrepa:0.5", "oracle/right")
assert half.difference > half.difference_error > 0
assert again.row("softrepa", "oracle/right") == full
""",
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_every_notebook_is_in_the_table_and_has_its_checks():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+\.ipynb)\)", table) == [path.name for path in NOTEBOOKS]
    assert list(SHOWN) == list(MADE) == [path.stem for path in NOTEBOOKS]


@every_notebook
def test_a_notebook_is_stored_without_anything_of_a_run(path: Path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not MACHINE_PATH.search(text)


@every_notebook
def test_a_notebook_begins_with_what_it_needs_and_links_to_what_is_there(path: Path):
    first, *rest = nbformat.read(path, as_version=4).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**What is needed:**" in first.source
    assert re.search(r"\*\*With .*a real model,\*\*", first.source)
    words = "\n".join(cell.source for cell in (first, *rest) if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)\)", words):
        assert (FOLDER / target).is_file(), target


@every_notebook
def test_a_notebook_runs_and_shows_its_images(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = set(FOLDER.rglob("*"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(MADE[path.stem]))
    run(notebook, tmp_path, monkeypatch)
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown(notebook)]
    assert len(images) >= SHOWN[path.stem]
    for image in images:
        assert image.width > 100 and image.height > 100
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 2
    assert set(FOLDER.rglob("*")) == before


def run(notebook: nbformat.NotebookNode, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all cells in the notebooks' folder; an error in any is an error here. Nobody's settings are read."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    for name in ("HF_TOKEN", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    examples = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))  # has shapes_world
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    variables = {**os.environ, **offline, "PYTHONPATH": examples}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute(env=variables)


def shown(notebook: nbformat.NotebookNode) -> list[Any]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
