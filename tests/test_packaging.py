"""What is published installs and imports: the wheel, the source distribution, and what stands beside the code."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import diffusers_softrepa

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("src", "docs", "benchmarks", "examples")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution, and the wheel that was built from it, without a network."""
    checkout = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.safetensors")
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".whl":
            shutil.copy(path, checkout)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_nothing.py").touch()
    run([sys.executable, "-m", "build", "--no-isolation", str(checkout)])
    return checkout / "dist"


def run(command: list[str], **variables: str) -> str:
    """Returns what a command prints, run where no checkout is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_installs_and_imports_in_a_clean_environment(built: Path, tmp_path: Path):
    """Its dependencies are borrowed from this environment; the package comes from the wheel alone."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "clean", with_pip=False)
    (python,) = tmp_path.glob("clean/bin/python")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)])
    (packages,) = tmp_path.glob("clean/lib/python*/site-packages")
    # A path in a .pth file is added as it is: .pth files in there, such as those of editable installs, are not read.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import diffusers_softrepa, runpy, sys; print(diffusers_softrepa.__file__, diffusers_softrepa.__version__); "
        "sys.argv[1:] = ['--help']; runpy.run_module('diffusers_softrepa.convert', run_name='__main__')"
    )
    found, version, help_of_convert = run([str(python), "-c", code]).split(maxsplit=2)
    assert Path(found).is_relative_to(packages)
    assert version == diffusers_softrepa.__version__
    assert (packages / "diffusers_softrepa" / "py.typed").is_file()
    assert "--to" in help_of_convert


def test_installing_the_wheel_changes_no_other_package(built: Path):
    """Beside the releases of this environment, the lowest, middle or newest ones, an installer has nothing to do."""
    (wheel,) = built.glob("*.whl")
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "--report", "-"]
    report = json.loads(run([*asked, f"{wheel}[train,eval]"]))
    changed = {package["metadata"]["name"] for package in report["install"]}
    assert changed == {"diffusers-softrepa"}


def test_the_wheel_holds_the_package_its_types_and_its_licence_and_nothing_else(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    source = built.parent / "src"
    package = {str(path.relative_to(source)) for path in (source / "diffusers_softrepa").rglob("*.py")}
    assert package | {"diffusers_softrepa/py.typed"} <= names
    top = {name.split("/")[0].split("-")[0] for name in names}
    assert top == {"diffusers_softrepa", "softrepa_command.py"}
    assert any(name.endswith("LICENSE") for name in names)
    for extra in ("train", "eval", "docs", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_the_description_on_a_package_index_has_no_link_that_leads_nowhere(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    description = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)]*)\)|(?:href|src)=[\"']([^\"']*)", description)
    assert targets and all(target.startswith("https://") for pair in targets for target in pair if target)
    for sentence in ("## Will it help me?", "pipe.load_softrepa(", "| base model | 14.7 |", "All verbs: weights"):
        assert sentence in description
    assert "A green frame marks" not in description  # the caption of an image that is not there
    urls = [url.split(", ", 1)[1] for url in metadata.get_all("Project-URL")]
    assert urls and all(url.startswith("https://") for url in urls)


def test_the_source_distribution_holds_what_tells_about_the_package_and_nothing_large(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        sizes = {member.name.partition("/")[2]: member.size for member in archive.getmembers() if member.isfile()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "docs/training.md"}
    assert needed <= set(sizes)
    assert not [name for name in sizes if name.startswith("tests/") or name.endswith((".safetensors", ".png"))]
    assert max(sizes.values()) < 200_000
    assert sdist.stat().st_size < 1_000_000


def test_the_version_is_the_same_everywhere():
    version = diffusers_softrepa.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_the_papers_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    papers = [citation["preferred-citation"], *citation["references"]]
    assert {paper["identifiers"][0]["value"] for paper in papers} == {"arXiv:2503.08250", "arXiv:2605.30038"}
    assert all(paper["authors"] and paper["title"] and paper["year"] for paper in papers)


def test_what_is_checked_before_a_commit_has_the_versions_of_the_constraints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {hook["repo"].split("/")[-1]: hook.get("rev") for hook in hooks}
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert revisions["ruff-pre-commit"] == f"v{constraints['ruff']}"
    assert revisions["typos"] == f"v{constraints['typos']}"


def test_the_workflows_run_what_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}, path
        steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
        assert set(re.findall(r"\bmake ([\w-]+)", "\n".join(steps))) <= targets


def test_the_lowest_versions_are_those_that_the_package_asks_for():
    lowest = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE))
    text = (ROOT / "pyproject.toml").read_text()
    required = text.partition("dependencies = [")[2].partition("]")[0]
    extras = "".join(re.findall(r"^(?:train|eval|space) = \[.*\]$", text, re.MULTILINE))
    assert required.count(">=") == 7 and extras.count(">=") == 8
    for name in required.replace('"', "").replace(",", "").split():
        assert "<" not in name, f"an upper bound needs a reason: {name}"
    for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', required + extras):
        assert f"{lowest[name]}.".startswith(f"{version}."), name
