"""Damaged checkpoints are seen, named and stepped over; other data and a full disk are met before the first step."""

import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusers_softrepa.training import checkpoints as checkpoints_room
from diffusers_softrepa.training.checkpoints import Checkpoints, DamagedCheckpoint
from training_runs import assert_same_run, log_of, rows, train_until_killed, trainer

STATE, WEIGHTS, CONFIG, MANIFEST = (
    "training_state.pt",
    "adapter_model.safetensors",
    "adapter_config.json",
    "manifest.json",
)


def cut(name: str, length: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def zeros(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def flip_a_weight(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def edit_manifest(folder: Path, change: dict[str, str]) -> None:
    (folder / MANIFEST).write_text(json.dumps(json.loads((folder / MANIFEST).read_text()) | change))


def other_moments(folder: Path) -> None:
    state = torch.load(folder / STATE, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"].add_(1e-3)
    torch.save(state, folder / STATE)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "an empty state": cut(STATE, 0),
    "a state cut off": cut(STATE, 1000),
    "a state of zeros": zeros(STATE),
    "empty weights": cut(WEIGHTS, 0),
    "weights of zeros": zeros(WEIGHTS),
    "one bit of a weight": flip_a_weight,
    "other moments": other_moments,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "a manifest cut off": cut(MANIFEST, 9),
    "a manifest that is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a manifest that names a device": lambda folder: (folder / MANIFEST).write_text('{"/dev/zero": "0"}'),
    "a manifest that names a file elsewhere": lambda folder: (folder / MANIFEST).write_text('{"../README.md": "0"}'),
    "a manifest that is a folder": lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir()),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    "a manifest with a file more": lambda folder: edit_manifest(folder, {"README.md": "0"}),
    "the name of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("checkpoint-2"), folder),
    ),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("ended")
    trainer(folder, max_steps=4).train()
    return folder


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(run: Path, damage: Callable[[Path], Any]):
    damage(run / "checkpoint-4")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resumed = trainer(run, resume_from_checkpoint="checkpoint-4")
    tokens = resumed.parameters[0].clone()
    with pytest.raises(
        DamagedCheckpoint, match=r"checkpoint-4 is damaged: .*; the newest whole one before it is checkpoint-2"
    ):
        resumed.train()
    assert resumed.parameters[0].equal(tokens)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", list(DAMAGE.values())[:7:3], ids=list(DAMAGE)[:7:3])
def test_latest_is_the_newest_whole_one_and_says_so(
    run: Path, tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
):
    damage(run / "checkpoint-4")
    assert trainer(run, resume_from_checkpoint="latest").train().finished
    assert "checkpoint-4 is damaged" in caplog.text and "the one before it is taken" in caplog.text
    trainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", run)


def test_where_no_checkpoint_is_whole_the_run_does_not_start_anew_by_itself(run: Path):
    for name in ("checkpoint-2", "checkpoint-4"):
        cut(STATE, 0)(run / name)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint-2 is damaged.* none in .* is whole: remove them"):
        trainer(run, resume_from_checkpoint="latest").train()


@pytest.mark.parametrize("name", ["checkpoint-0006", "checkpoint-٦", "checkpoint-99999999999999999999", "checkpoint-"])
def test_folders_of_other_names_are_no_checkpoints(run: Path, name: str):
    (run / "checkpoint-4").rename(run / name)
    assert [path.name for path in Checkpoints(run).all()] == ["checkpoint-2"]


def test_a_state_with_code_runs_none(run: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "run by the state",))

    torch.save({"settings": Evil()}, run / "checkpoint-4" / STATE)
    edit_manifest(
        run / "checkpoint-4", {STATE: hashlib.sha256((run / "checkpoint-4" / STATE).read_bytes()).hexdigest()}
    )
    with pytest.raises(DamagedCheckpoint):
        trainer(run, resume_from_checkpoint="checkpoint-4").train()
    assert not (tmp_path / "run by the state").exists()


def test_damaged_lines_of_a_log_cost_neither_the_others_nor_the_run(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    log = run / "log.jsonl"
    log.write_bytes(b"{bad}\n" + log.read_bytes() + b'\xff\xfe\n[{"step": 1}\n5\n{"a": 1}\n{"step": 9, "lo')
    assert trainer(run, resume_from_checkpoint="latest").train().finished
    assert "no log entries and are dropped" in caplog.text
    trainer(tmp_path / "whole").train()
    entries = log_of(run)  # with an evaluation at step 4, where the first run ended
    assert all(entry in entries for entry in log_of(tmp_path / "whole"))


OTHER_DATA = {
    "images": lambda: rows(8, seed=7),
    "captions": lambda: [{**row, "text": f"{row['text'][0]}!"} for row in rows()],
    "order": lambda: rows()[::-1],
}


@pytest.mark.parametrize("change", OTHER_DATA.values(), ids=OTHER_DATA)
def test_resuming_on_other_data_is_refused(run: Path, change: Callable[[], Any]):
    with pytest.raises(ValueError, match="saved while training on other data"):
        trainer(run, change(), resume_from_checkpoint="latest").train()


def test_the_same_data_stored_otherwise_are_the_same_data(tmp_path: Path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        lines = []
        for number, row in enumerate(rows()):
            row["image"].save(tmp_path / name / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": row["text"]}) + "\n")
        (tmp_path / name / "metadata.jsonl").write_text("".join(lines))
    train_until_killed(trainer(tmp_path / "run", tmp_path / "one"), "step-3")
    assert trainer(tmp_path / "run", tmp_path / "other", resume_from_checkpoint="latest").train().finished


def test_what_a_run_draws_among_its_data_is_no_data_when_it_resumes(tmp_path: Path):
    for number, row in enumerate(rows()):
        row["image"].save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(row["text"][0])
    drawn: dict[str, Any] = {"validation_prompts": ["a picture"], "num_validation_inference_steps": 1}
    train_until_killed(trainer(tmp_path / "run", tmp_path, **drawn), "step-3")
    assert (tmp_path / "run" / "images" / "00.png").is_file()
    assert trainer(tmp_path / "run", tmp_path, resume_from_checkpoint="latest", **drawn).train().finished


def test_checkpoints_that_would_not_fit_on_the_disk_are_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = namedtuple("usage", "total used free")(10**9, 10**9, 700_000)
    monkeypatch.setattr(checkpoints_room.shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match=r"50 checkpoints of about .* MB do not fit .* checkpoints_total_limit"):
        trainer(tmp_path / "many", max_steps=100, save_steps=2).train()
    assert not list((tmp_path / "many").iterdir())
    assert trainer(tmp_path / "few", max_steps=4, save_steps=2, checkpoints_total_limit=1).train().finished


def test_what_a_checkpoint_weighs_is_estimated_from_above_but_not_by_much(
    ended: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    monkeypatch.setattr(Checkpoints, "check_room", lambda _self, num_bytes, _count: asked.append(num_bytes))
    trainer(ended, max_steps=4, resume_from_checkpoint="latest").train()
    real = sum(path.stat().st_size for path in (ended / "checkpoint-4").iterdir())
    assert real <= asked[0] <= 2 * real + 2**15
    assert load_file(ended / "checkpoint-4" / WEIGHTS)
