"""The authors' files come from the Hub by its id as they come from a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import constants

from diffusers_softrepa.checkpoint import load_checkpoint
from diffusers_softrepa.convert import convert_reference, main, read_reference
from diffusers_softrepa.hub import HubOptions
from test_convert import write_reference

if TYPE_CHECKING:
    from hub_server import HubServer

pytest_plugins = ["hub_server"]


def publish(hub: "HubServer", folder: Path, under: str = "") -> str:
    files = {under + path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.add_repo("authors/soft-tokens", files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "sd3", torch.randn(5, 4, 24), torch.randn(100, 5 * 24))


def test_a_repository_gives_the_numbers_of_the_folder(hub: "HubServer", folder: Path):
    publish(hub, folder)
    torch.testing.assert_close(read_reference("authors/soft-tokens"), read_reference(folder), rtol=0, atol=0)


def test_a_subfolder_and_a_revision_are_found(hub: "HubServer", folder: Path):
    first = publish(hub, folder, under="sd3/")
    hub.commit("authors/soft-tokens", {"sd3/dc_tokens.pth": None, "sd3/dc_t_tokens.pth": None})
    found = read_reference("authors/soft-tokens", HubOptions(subfolder="sd3", revision=first))
    torch.testing.assert_close(found, read_reference(folder), rtol=0, atol=0)
    with pytest.raises(OSError, match=r"authors/soft-tokens has no file sd3/dc_tokens.pth"):
        read_reference("authors/soft-tokens", HubOptions(subfolder="sd3"))


def test_a_model_without_bins_comes_from_the_cache_too(
    hub: "HubServer", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(hub, write_reference(tmp_path / "sdxl", torch.randn(4, 2048)))
    tokens, table = read_reference("authors/soft-tokens")
    assert table is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, table = read_reference("authors/soft-tokens")
    assert table is None
    torch.testing.assert_close(again, tokens, rtol=0, atol=0)


def test_a_table_that_may_be_missing_from_the_cache_is_not_taken_for_none(hub: "HubServer", folder: Path):
    publish(hub, folder)
    from diffusers_softrepa.hub import fetch

    fetch("authors/soft-tokens", "dc_tokens.pth", HubOptions())
    with pytest.raises(OSError, match=r"dc_t_tokens.pth of authors/soft-tokens is not in the cache"):
        read_reference("authors/soft-tokens", HubOptions(local_files_only=True))


def test_what_the_hub_does_not_have_is_said(hub: "HubServer", tmp_path: Path):
    with pytest.raises(OSError, match="no folder or file here and no repository that the Hub shows you"):
        read_reference("authors/nothing")
    with pytest.raises(OSError, match=r"there is no folder .*, or a Hub repository id"):
        read_reference(tmp_path / "nothing")


def test_the_command_line_takes_a_hub_id(hub: "HubServer", folder: Path, tmp_path: Path):
    publish(hub, folder, under="sd3/")
    main(["authors/soft-tokens", str(tmp_path / "ours"), "--family", "sd3", "--subfolder", "sd3"])
    config, tensors = load_checkpoint(tmp_path / "ours")
    expected = convert_reference(*read_reference(folder), family="sd3")
    assert config == expected[0]
    torch.testing.assert_close(tensors, expected[1], rtol=0, atol=0)


def test_the_command_line_needs_a_family_for_the_authors_files(hub: "HubServer", capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["authors/soft-tokens", "ours"])
    assert "give --family sd3, or --family unet" in capsys.readouterr().err
