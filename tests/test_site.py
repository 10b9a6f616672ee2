"""The documentation's site builds without a warning, its Python runs, and the errors that it names are the code's."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

import tiny
from diffusers_softrepa import SoftREPAConfig, SoftREPAMethods, training
from diffusers_softrepa.checkpoint import save_checkpoint
from test_convert import write_reference
from test_convert_anima import anima, file_of
from test_docs import DOCS, SHORT, blocks, make_photos

pytest_plugins = ["hub_server"]

ROOT = DOCS.parent
MARKS = re.compile(r"(<!-- (?:run|not run: [^>]+) -->\n)?```python\n")


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_every_block_of_python_runs_or_says_why_it_does_not(page: Path):
    """Marked blocks are run here or by the test of their page."""
    text = page.read_text(encoding="utf-8")
    assert all(found.group(1) for found in MARKS.finditer(text)), f"{page.name} has Python that is not marked"
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert "<!-- run -->" not in text or f'"{page.name}"' in tests, f"no test runs the Python of {page.name}"


def small_sd3() -> StableDiffusion3Pipeline:
    """Returns a small pipeline whose images take one step."""
    pipe = tiny.sd3_pipeline()
    call = type(pipe).__call__

    def draw(self: Any, prompt: str, **settings: Any) -> Any:
        short = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 24}
        return call(self, prompt, **(settings | short))

    type(pipe).__call__ = draw
    return pipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Any) -> Path:
    """A folder with everything that the pages take for granted, and a Hub with the user of that name."""
    monkeypatch.chdir(tmp_path)
    token = hub.add_user("user")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", StableDiffusion3Pipeline.__call__)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *_, **__: small_sd3())
    pipe = tiny.sd3_pipeline()
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(pipe.transformer, init_std=0.5))
    pipe.save_softrepa("my-tokens")
    hub.add_repo("user/softrepa-sd3", {path.name: path.read_bytes() for path in Path("my-tokens").iterdir()})
    make_photos(tmp_path / "photos")
    (tmp_path / "SoftREPA" / "tokens").mkdir(parents=True)
    write_reference(tmp_path / "SoftREPA" / "tokens" / "sd3", torch.randn(5, 4, 24), torch.randn(100, 5 * 24))
    save_file(file_of(), "soft_tokens.safetensors")
    original = training.ContrastiveFlowMatchingArguments
    monkeypatch.setattr(
        training, "ContrastiveFlowMatchingArguments", lambda **settings: original(**(settings | SHORT))
    )
    return tmp_path


def run_page(page: str, **names: Any) -> dict[str, Any]:
    for block in blocks(page, "python", marked=True):
        exec(block, names)
    return names


def test_the_python_of_the_start_page_runs(place: Path):
    names = run_page("index.md")
    assert names["image"].size == names["without"].size == (16, 16)
    assert names["with_tokens"].tobytes() != names["without"].tobytes()
    assert (place / "my-tokens" / "README.md").is_file()


def test_the_python_of_the_verbs_runs(place: Path, hub: Any):
    names = run_page("verbs.md")
    assert list(names["pipe"].get_softrepa_adapters()) == ["fresh"]
    assert set(hub.files("user/my-tokens")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_every_verb_is_on_its_page():
    text = (DOCS / "verbs.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w*softrepa\w*)\(", text))
    assert {name for name in vars(SoftREPAMethods) if not name.startswith("_")} <= named


def test_the_python_of_the_file_format_runs_and_its_page_names_every_field(place: Path):
    names = run_page("file_format.md")
    text = (DOCS / "file_format.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in names["config"] if key not in ("auto_mapping", "peft_version"))


def test_the_python_of_the_foreign_formats_runs(place: Path):
    stand_in = SimpleNamespace(
        transformer=anima(), text_conditioner=SimpleNamespace(register_to_config=lambda min_sequence_length: None)
    )
    assert isinstance(stand_in.transformer, CosmosTransformer3DModel)
    run_page("foreign_formats.md", anima=stand_in)
    assert (place / "sd3-tokens" / "adapter_model.safetensors").is_file()
    assert (place / "back.safetensors").is_file()


def test_the_commands_of_the_foreign_formats_run(place: Path, hub: Any, monkeypatch: pytest.MonkeyPatch):
    from diffusers_softrepa.convert import main

    write_reference(place / "SoftREPA" / "tokens" / "sdxl", torch.randn(4, 2048))
    files = {f"sd3/{path.name}": path.read_bytes() for path in (place / "SoftREPA" / "tokens" / "sd3").iterdir()}
    hub.add_repo("user/softrepa-published", files)
    cosmos = SoftREPAConfig(family="cosmos", token_dim=4)
    lines = "".join(blocks("foreign_formats.md", "bash")).splitlines()
    commands = [line.split()[2:] for line in lines if line.startswith("softrepa convert ")]
    assert len(commands) == 5 == len(lines) - 1  # and one that clones the authors' repository
    for arguments in commands:
        if arguments[0] == "my-tokens":
            save_checkpoint("my-tokens", cosmos, {"tokens": torch.ones(1, 4, 4)})
        main(arguments)


# Errors.


def sentences() -> Iterator[str]:
    """Yields every string of the package, with `…` for what is filled in."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(\.\d)?[a-z]", "…", node.value)


def test_every_error_among_the_questions_is_one_of_the_code():
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    errors = re.findall(r"^### (.+)$", text, re.MULTILINE)
    known = list(sentences())
    assert len(errors) > 20
    for error in errors:
        parts = [part.strip() for part in error.split("…") if part.strip()]
        pattern = re.compile(".*".join(re.escape(part) for part in parts), re.DOTALL)
        assert any(pattern.search(sentence) for sentence in known), error


# The site.


@pytest.mark.skipif(shutil.which("mkdocs", path=str(Path(sys.executable).parent)) is None, reason="no mkdocs here")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8").count("load_softrepa") > 2


def test_the_drawing_says_in_words_what_it_shows():
    drawing = (DOCS / "img" / "how_it_works.svg").read_text(encoding="utf-8")
    assert "<title" in drawing and "<desc" in drawing


def test_the_drawing_and_the_pages_fetch_nothing_from_elsewhere():
    assert "font: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    drawing = (DOCS / "img" / "how_it_works.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", drawing) == ["http://www.w3.org/2000/svg"]
    for page in pages():
        assert not re.search(r"!\[[^\]]*\]\(https?://", page.read_text(encoding="utf-8")), page
