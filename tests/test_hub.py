"""The Hub through the verbs: the real huggingface_hub client against a server on the loopback."""

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, constants, errors
from huggingface_hub.utils import _http
from torch import nn

import tiny
from diffusers_softrepa import SoftREPAConfig, add_softrepa, load_softrepa, softrepa_parameters, unload_softrepa
from diffusers_softrepa.checkpoint import save_checkpoint
from diffusers_softrepa.hub import check_login
from diffusers_softrepa.pipeline import denoiser_of

pytest_plugins = ["hub_server"]

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
REPO = "alice/tokens"
ALICE, BOB = "hf_alice", "hf_bob"
MISSING = r"is no folder or file here and no repository that the Hub shows you; .* token="


@pytest.fixture
def denoiser() -> nn.Module:
    return tiny.sd3_transformer()


def adapter_files(denoiser: nn.Module, folder: Path, value: float = 0.5, **keywords: Any) -> dict[str, bytes]:
    """Returns the files of an adapter all of whose tokens have one value."""
    config = SoftREPAConfig.for_denoiser(denoiser, num_timestep_bins=None)
    names = save_checkpoint(folder, config, {"tokens": torch.full(config.shapes["tokens"], value)}, **keywords)
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def files(denoiser: nn.Module, tmp_path: Path) -> dict[str, bytes]:
    return adapter_files(denoiser, tmp_path / "made")


def loaded(denoiser: nn.Module, source: str = REPO, **keywords: Any) -> float:
    """Loads an adapter, checks that all its tokens have one value, unloads it and returns the value."""
    load_softrepa(denoiser, source, **keywords)
    tokens = softrepa_parameters(denoiser)["tokens"]
    unload_softrepa(denoiser)
    assert tokens.min() == tokens.max()
    return float(tokens.min())


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    from hub_server import close_session  # a plugin by now, which a module must not import before

    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()  # huggingface_hub 0 reads the constant when it makes a session

    return switch


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)


@pytest.fixture
def pipe(hub: Any) -> Iterator[DiffusionPipeline]:
    pipe = tiny.sd3_pipeline()
    pipe.register_to_config(_name_or_path="stabilityai/sd3")
    pipe.add_softrepa()
    yield pipe


# Up and down again


def test_what_is_pushed_draws_the_same_pictures_when_loaded(hub: Any, pipe: DiffusionPipeline, tmp_path: Path):
    drawn = tiny.generate(pipe)
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    assert hub.files(REPO).keys() == {WEIGHTS, CONFIG, CARD}
    pipe.unload_softrepa()
    pipe.load_softrepa(REPO)
    assert torch.equal(tiny.generate(pipe), drawn)


def test_weights_travel_over_large_file_storage_and_one_request_finds_them(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    assert any(request.startswith("PUT /storage/") for request in hub.requests)
    hub.requests.clear()
    pipe.unload_softrepa()
    pipe.load_softrepa(REPO)
    assert [request.split()[0] for request in hub.requests] == ["HEAD", "GET"]


def test_only_the_adapters_own_files_are_pushed(hub: Any, pipe: Any, tmp_path: Path):
    (tmp_path / "diary.txt").write_text("private")
    (tmp_path / "m[1]x.safetensors").write_text("private")
    pipe.save_softrepa(tmp_path, weight_name="m[1].safetensors", push_to_hub=True, repo_id=REPO, token=ALICE)
    assert hub.files(REPO).keys() == {"m[1].safetensors", CONFIG, CARD}


@pytest.mark.parametrize("repo_id", ["tokens", REPO, None])
def test_a_repository_is_named_in_full_or_in_ones_own_namespace(hub: Any, pipe: Any, tmp_path: Path, repo_id: Any):
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, repo_id=repo_id, token=ALICE)
    assert list(hub.repos) == [REPO]


def test_the_pushed_card_names_its_own_repository_and_is_valid(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "anything", push_to_hub=True, repo_id="tokens", token=ALICE)
    card = ModelCard.load(REPO)
    card.validate()
    assert f'pipe.load_softrepa("{REPO}")' in card.text
    assert "user/this-adapter" not in card.text
    assert card.data.base_model == "stabilityai/sd3"


def test_a_base_model_that_is_a_folder_does_not_stop_the_push(hub: Any, pipe: Any, tmp_path: Path):
    pipe.unload_softrepa()
    pipe.register_to_config(_name_or_path=str(tmp_path))
    pipe.add_softrepa()
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    assert str(tmp_path).encode() not in hub.files(REPO)[CARD]


def test_a_second_push_replaces_the_values_and_keeps_a_card_written_by_hand(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    hub.commit(REPO, {CARD: b"# By hand\n"})
    before = hub.files(REPO)
    pipe.add_softrepa(adapter_name="better")
    pipe.save_softrepa(tmp_path / "other", "better", push_to_hub=True, repo_id=REPO, token=ALICE)
    after = hub.files(REPO)
    assert after[CARD] == b"# By hand\n"
    assert after[WEIGHTS] != before[WEIGHTS]


def test_a_second_push_brings_the_generated_part_of_the_card_up_to_date(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    hub.commit(REPO, {CARD: hub.files(REPO)[CARD] + b"\nBy hand.\n"})
    pipe.add_softrepa(SoftREPAConfig.for_denoiser(denoiser_of(pipe), num_tokens=3), "better")
    pipe.save_softrepa(tmp_path / "other", "better", push_to_hub=True, repo_id=REPO, token=ALICE)
    card = hub.files(REPO)[CARD].decode()
    assert "| tokens per layer | 3 |" in card and "| tokens per layer | 4 |" not in card
    assert f'pipe.load_softrepa("{REPO}")' in card and card.endswith("By hand.\n")


def test_words_that_are_not_pushed_are_warned_of(
    hub: Any, pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for _ in range(2):
        pipe.save_softrepa(tmp_path, push_to_hub=True, repo_id=REPO, token=ALICE)
    assert "differ from" not in caplog.text
    with open(tmp_path / CARD, "a", encoding="utf-8") as card:
        card.write("\nWritten here.\n")
    pipe.save_softrepa(tmp_path, push_to_hub=True, repo_id=REPO, token=ALICE)
    assert f"differ from those of {REPO} on the Hub, which stay as they are there" in caplog.text
    assert b"Written here" not in hub.files(REPO)[CARD]


def test_a_login_can_be_checked_before_anything_long_starts(hub: Any):
    check_login(ALICE)
    with pytest.raises(OSError, match="pushing needs a Hub login, but: Invalid user token"):
        check_login("hf_wrong")


def test_a_card_written_by_hand_in_the_folder_is_pushed(hub: Any, pipe: Any, tmp_path: Path):
    text = "---\nlibrary_name: diffusers\n---\n# By hand\n"
    (tmp_path / CARD).write_text(text)
    pipe.save_softrepa(tmp_path, push_to_hub=True, repo_id=REPO, token=ALICE)
    assert hub.files(REPO)[CARD].decode() == text


def test_a_push_of_the_same_files_makes_no_commit(hub: Any, pipe: Any, tmp_path: Path):
    for _ in range(2):
        pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)
    assert len(hub.repos[REPO].commits) == 2  # the repository's own first one, and ours


def test_a_push_to_a_branch_leaves_main_alone(hub: Any, pipe: Any, tmp_path: Path):
    drawn = tiny.generate(pipe)
    for _ in range(2):
        pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE, revision="trial")
    assert hub.files(REPO) == {}
    pipe.unload_softrepa()
    pipe.load_softrepa(REPO, revision="trial")
    assert torch.equal(tiny.generate(pipe), drawn)


def test_a_pull_request_can_be_opened_on_a_foreign_repository_loaded_and_added_to(
    hub: Any, denoiser: Any, pipe: Any, tmp_path: Path, files: Any
):
    hub.add_repo(REPO, files)
    bob = hub.add_user("bob")
    pipe.save_softrepa(tmp_path / "a", push_to_hub=True, repo_id=REPO, token=bob, create_pr=True)
    assert hub.files(REPO) == files
    pipe.add_softrepa(adapter_name="better")
    pipe.save_softrepa(
        tmp_path / "b",
        "better",
        push_to_hub=True,
        repo_id=REPO,
        token=ALICE,
        revision="refs/pr/1",
        commit_message="Mine",
    )
    assert list(hub.repos[REPO].pulls) == ["refs/pr/1"]
    assert "refs/pr/1" not in hub.repos[REPO].branches
    pipe.load_softrepa(REPO, "from the pull request", revision="refs/pr/1")
    assert torch.equal(
        softrepa_parameters(pipe, "from the pull request")["tokens"], softrepa_parameters(pipe, "better")["tokens"]
    )


def test_private_is_what_a_new_repository_becomes(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE, private=True)
    assert hub.repos[REPO].private


def test_a_stored_token_is_used(hub: Any, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, private=True)
    pipe.load_softrepa(REPO, "again")


@pytest.mark.parametrize(
    ("keywords", "cause", "message"),
    [
        ({}, errors.HfHubHTTPError, "Invalid username or password"),
        ({"token": "hf_wrong"}, errors.HfHubHTTPError, "Invalid credentials"),
        ({"token": BOB, "repo_id": REPO}, errors.HfHubHTTPError, "don't have the rights"),
        ({"token": ALICE, "repo_id": "not/a/repo"}, errors.HFValidationError, "not/a/repo"),
        (
            {"token": ALICE, "create_pr": True, "revision": "absent"},
            errors.RevisionNotFoundError,
            "Revision Not Found",
        ),
    ],
    ids=["no token", "wrong token", "another's namespace", "no repository id", "pull request against no branch"],
)
def test_a_refused_push_says_what_to_do_and_where_the_files_are(
    hub: Any, pipe: Any, tmp_path: Path, keywords: Any, cause: type[Exception], message: str
):
    hub.add_user("bob")
    folder = tmp_path / "tokens"
    with pytest.raises(OSError, match=r"the adapter is saved in .*tokens, but the Hub did not take it as") as caught:
        pipe.save_softrepa(folder, push_to_hub=True, **keywords)
    assert isinstance(caught.value.__cause__, cause)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    pipe.load_softrepa(folder, "again")


def test_a_card_with_wrong_metadata_is_refused_before_anything_is_uploaded(hub: Any, pipe: Any, tmp_path: Path):
    (tmp_path / CARD).write_text("---\nbase_model: /home/me/model\n---\n")
    with pytest.raises(OSError, match=r'Invalid metadata in README.md.*"base_model" with value'):
        pipe.save_softrepa(tmp_path, push_to_hub=True, repo_id=REPO, token=ALICE)
    assert hub.files(REPO) == {}


def test_without_push_nothing_is_asked_of_the_hub(hub: Any, pipe: Any, tmp_path: Path):
    pipe.save_softrepa(tmp_path / "tokens", token=ALICE, repo_id=REPO)
    pipe.save_softrepa(tmp_path / "none", push_to_hub=True, token=ALICE, is_main_process=False)
    assert hub.requests == []
    assert not (tmp_path / "none").exists()


# Down


def test_revision_is_a_branch_a_tag_or_a_commit(hub: Any, denoiser: Any, files: Any, tmp_path: Path):
    first = hub.add_repo(REPO, files)
    api = HfApi(token=ALICE)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="a/branch")
    hub.commit(REPO, adapter_files(denoiser, tmp_path / "newer", 0.75), revision="a/branch")
    hub.commit(REPO, adapter_files(denoiser, tmp_path / "newest", 1.0))
    found = {name: loaded(denoiser, revision=name) for name in (first, "v1", "a/branch", "main", None)}
    assert found == {first: 0.5, "v1": 0.5, "a/branch": 0.75, "main": 1.0, None: 1.0}


def test_subfolder_and_weight_name_find_one_adapter_among_several(hub: Any, denoiser: Any, files: Any, tmp_path: Path):
    deep = adapter_files(denoiser, tmp_path / "deep", 0.75)
    named = adapter_files(denoiser, tmp_path / "named", 1.0, weight_name="late.safetensors")
    tree = {**files, **{f"runs/9/{name}": content for name, content in {**deep, **named}.items()}}
    hub.add_repo(REPO, tree)
    assert loaded(denoiser) == 0.5
    assert loaded(denoiser, subfolder="runs/9") == 0.75
    assert loaded(denoiser, subfolder="runs/9", weight_name="late.safetensors") == 1.0
    assert loaded(denoiser, weight_name="runs/9/late.safetensors") == 1.0


@pytest.mark.parametrize("keywords", [{"subfolder": "deep"}, {"weight_name": f"deep/{WEIGHTS}"}])
def test_weights_without_metadata_have_their_config_from_the_json_beside_them(
    hub: Any, denoiser: Any, files: Any, keywords: Any
):
    from safetensors.torch import load, save

    hub.add_repo(REPO, {f"deep/{WEIGHTS}": save(load(files[WEIGHTS])), f"deep/{CONFIG}": files[CONFIG]})
    assert loaded(denoiser, **keywords) == 0.5
    hub.commit(REPO, {f"deep/{CONFIG}": None})
    with pytest.raises(ValueError, match=r"carries no SoftREPA config .* pass config=") as caught:
        load_softrepa(denoiser, REPO, **keywords)
    assert isinstance(caught.value.__cause__.__cause__, errors.EntryNotFoundError)
    assert loaded(denoiser, config=SoftREPAConfig.for_denoiser(denoiser, num_timestep_bins=None), **keywords) == 0.5


def test_a_private_repository_needs_its_readers_token(hub: Any, denoiser: Any, files: Any):
    hub.add_repo(REPO, files, private=True)
    for token in (None, False, hub.add_user("bob")):
        with pytest.raises(OSError, match=MISSING) as caught:
            load_softrepa(denoiser, REPO, token=token)
        assert isinstance(caught.value.__cause__, errors.RepositoryNotFoundError)
    assert loaded(denoiser, token=ALICE) == 0.5


def test_a_token_never_reaches_the_storage_host(hub: Any, denoiser: Any, files: Any):
    hub.add_repo(REPO, files, private=True)
    loaded(denoiser, token=ALICE)  # the server refuses a request to its storage that carries one
    assert any(request.startswith("GET /storage/") for request in hub.requests)


@pytest.mark.parametrize("token", [None, BOB])
def test_a_gated_repository_says_that_its_terms_must_be_accepted(hub: Any, denoiser: Any, files: Any, token: Any):
    hub.add_user("bob")
    hub.add_repo(REPO, files, gated=True)
    with pytest.raises(OSError, match=f"access to {REPO} is gated: accept its terms on its Hub page") as caught:
        load_softrepa(denoiser, REPO, token=token)
    assert isinstance(caught.value.__cause__, errors.GatedRepoError)
    hub.repos[REPO].readers.add("bob")
    assert loaded(denoiser, token=BOB) == 0.5


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("source", "keywords", "cause", "message"),
    [
        ("alice/nothing", {}, errors.RepositoryNotFoundError, f"'alice/nothing' {MISSING}"),
        ("alice/nothing", {"token": ALICE}, errors.RepositoryNotFoundError, f"'alice/nothing' {MISSING}"),
        (REPO, {"revision": "v9"}, errors.RevisionNotFoundError, f"{REPO} has no revision 'v9'; name one of its"),
        (REPO, {"weight_name": "x.safetensors"}, errors.EntryNotFoundError, f"{REPO} has no file x.safetensors; give"),
        (REPO, {"subfolder": "x"}, errors.EntryNotFoundError, f"{REPO} has no file x/{WEIGHTS}; give weight_name="),
        (REPO, {"token": "hf_wrong"}, errors.HfHubHTTPError, f"asked for {WEIGHTS} of {REPO}: .*Invalid credentials"),
        ("no/such/repository", {}, errors.HFValidationError, "neither a folder or file here nor a Hub repository id"),
    ],
)
def test_what_is_missing_is_named_and_the_hubs_error_is_the_cause(
    hub: Any, denoiser: Any, files: Any, source: str, keywords: Any, cause: type[Exception], message: str, force: bool
):
    hub.add_repo(REPO, files)
    attributes = set(vars(denoiser))
    with pytest.raises(OSError, match=message) as caught:
        load_softrepa(denoiser, source, force_download=force, **keywords)
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)
    assert set(vars(denoiser)) == attributes


def test_a_pickle_in_a_repository_is_not_even_downloaded(hub: Any, denoiser: Any):
    hub.add_repo(REPO, {"tokens.pth": b"\x80\x02."})
    with pytest.raises(ValueError, match=r"tokens\.pth is a pickle"):
        load_softrepa(denoiser, REPO, weight_name="tokens.pth")
    assert hub.requests == []


def test_a_repository_of_another_method_says_so(hub: Any, denoiser: Any):
    hub.add_repo("alice/lora", {"pytorch_lora_weights.safetensors": b"..."})
    with pytest.raises(OSError, match=r"alice/lora has no file adapter_model\.safetensors; it holds a LoRA; load it"):
        load_softrepa(denoiser, "alice/lora")
    hub.add_repo("alice/other", {"part/ip-adapter_sd15.bin": b"...", "model.safetensors": b"..."})
    with pytest.raises(OSError, match=r"has no file .*; it holds an IP-Adapter; load it with pipe\.load_ip_adapter"):
        load_softrepa(denoiser, "alice/other", subfolder="part")
    for kwargs in ({}, {"subfolder": "par"}, {"subfolder": "part", "weight_name": "x.safetensors", "revision": "dev"}):
        with pytest.raises(OSError, match=r"has no (file .* give weight_name= or subfolder=|revision 'dev')"):
            load_softrepa(denoiser, "alice/other", **kwargs)


# Cache


def test_what_was_loaded_once_is_loaded_offline_without_more_words(hub: Any, denoiser: Any, files: Any, offline: Any):
    hub.add_repo(REPO, files)
    assert loaded(denoiser) == 0.5
    hub.requests.clear()
    assert loaded(denoiser, local_files_only=True) == 0.5
    offline()
    assert loaded(denoiser) == 0.5
    assert hub.requests == []


@pytest.mark.parametrize("how", ["keyword", "variable"])
def test_what_is_not_in_the_cache_says_so_offline(hub: Any, denoiser: Any, files: Any, offline: Any, how: str):
    hub.add_repo(REPO, files)
    if how == "variable":
        offline()
    with pytest.raises(
        OSError, match=f"{WEIGHTS} of {REPO} is not in the cache and the Hub is out of reach"
    ) as caught:
        load_softrepa(denoiser, REPO, local_files_only=how == "keyword")
    assert isinstance(caught.value.__cause__, errors.LocalEntryNotFoundError)


def test_a_forced_download_that_cannot_be_says_so(hub: Any, denoiser: Any, files: Any, offline: Any):
    hub.add_repo(REPO, files)
    loaded(denoiser)
    with pytest.raises(ValueError, match="'force_download=True' and 'local_files_only=True' at the same time"):
        load_softrepa(denoiser, REPO, force_download=True, local_files_only=True)
    offline()
    with pytest.raises(OSError, match="force_download=True needs the Hub, which is out of reach") as caught:
        load_softrepa(denoiser, REPO, force_download=True)
    assert isinstance(caught.value.__cause__, errors.OfflineModeIsEnabled)


@pytest.mark.usefixtures("_no_waiting")
def test_a_hub_that_is_gone_is_an_oserror_unless_the_cache_helps(hub: Any, denoiser: Any, files: Any):
    hub.add_repo(REPO, files)
    assert loaded(denoiser) == 0.5
    hub.close()
    assert loaded(denoiser) == 0.5
    with pytest.raises(OSError, match="is not in the cache and the Hub is out of reach"):
        load_softrepa(denoiser, REPO, subfolder="other")


def test_a_push_to_a_hub_that_is_gone_is_an_oserror(hub: Any, pipe: Any, tmp_path: Path):
    hub.close()
    with pytest.raises(OSError, match=r"the adapter is saved in .*, but the Hub did not take it"):
        pipe.save_softrepa(tmp_path / "tokens", push_to_hub=True, token=ALICE)


def test_force_download_fetches_again(hub: Any, denoiser: Any, files: Any):
    hub.add_repo(REPO, files)
    for force, fetched in ((False, 1), (False, 0), (True, 1)):
        hub.requests.clear()
        assert loaded(denoiser, force_download=force) == 0.5
        assert sum(request.startswith("GET ") for request in hub.requests) == fetched


def test_cache_dir_is_where_the_files_go(hub: Any, denoiser: Any, files: Any, tmp_path: Path):
    hub.add_repo(REPO, files)
    assert loaded(denoiser, cache_dir=tmp_path / "mine") == 0.5
    assert list((tmp_path / "mine").rglob(WEIGHTS))
    assert not (tmp_path / "hf_home" / "hub").exists()
    assert loaded(denoiser, cache_dir=str(tmp_path / "mine"), local_files_only=True) == 0.5


def test_a_folder_of_that_name_is_taken_before_the_hub(
    hub: Any, denoiser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter_files(denoiser, tmp_path / "alice" / "tokens", 0.25)
    monkeypatch.chdir(tmp_path)
    assert loaded(denoiser) == 0.25
    assert hub.requests == []


# Configured as people do it: by environment variables

_SESSION = """
import sys
sys.path.insert(0, {tests!r})
import torch, tiny, diffusers_softrepa
torch.manual_seed(0)
pipe = tiny.sd3_pipeline()
pipe.add_softrepa()
drawn = tiny.generate(pipe)
pipe.save_softrepa({folder!r}, push_to_hub=True, private=True)
pipe.unload_softrepa()
pipe.load_softrepa("alice/tokens")
assert torch.equal(tiny.generate(pipe), drawn)
torch.save(drawn, {output!r})
"""


def test_environment_variables_are_all_it_takes_and_the_next_process_needs_no_network(
    hub: Any, tmp_path: Path, offline: Any
):
    names = {"folder": str(tmp_path / "tokens"), "output": str(tmp_path / "drawn")}
    code = _SESSION.format(tests=str(Path(__file__).parent), **names)
    environment = {**os.environ, **hub.environment(tmp_path / "hf_home", token=ALICE)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert hub.repos[REPO].private
    hub.close()
    offline()
    torch.manual_seed(0)
    pipe = tiny.sd3_pipeline()
    pipe.load_softrepa(REPO)
    assert torch.equal(tiny.generate(pipe), torch.load(tmp_path / "drawn"))


def test_the_hub_keywords_are_those_of_lora():
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    documented = inspect.getsource(StableDiffusionLoraLoaderMixin.lora_state_dict)
    ours = inspect.signature(load_softrepa).parameters
    hub_keywords = ["cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder"]
    for name in [*hub_keywords, "weight_name", "use_safetensors"]:
        assert f'kwargs.pop("{name}"' in documented
        assert name in ours


def test_add_and_load_ask_nothing_of_the_hub_but_what_was_named(hub: Any, denoiser: Any):
    add_softrepa(denoiser)
    assert hub.requests == []


def test_pictures_that_the_card_shows_go_with_it(hub: Any, denoiser: nn.Module, tmp_path: Path):
    folder = tmp_path / "tokens"
    add_softrepa(denoiser)
    denoiser.save_softrepa(folder)
    (folder / "mine.png").write_bytes(b"a picture")
    (folder / "other.png").write_bytes(b"not shown")
    (folder / CARD).write_text((folder / CARD).read_text() + "\n![mine](mine.png) ![gone](gone.png)\n")
    denoiser.save_softrepa(folder, push_to_hub=True, repo_id=REPO, token=ALICE, license="apache-2.0")
    assert set(hub.files(REPO)) == {WEIGHTS, CONFIG, CARD, "mine.png"}
    card = ModelCard(hub.files(REPO)[CARD].decode())
    card.validate()
    assert card.data.license == "apache-2.0"
