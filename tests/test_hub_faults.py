"""What can go wrong on the way to the Hub and back: one true sentence each, and a passing trouble passes by itself."""

import errno
import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import utils as hub_client
from torch import nn

import tiny
from diffusers_softrepa import SoftREPAConfig, load_softrepa, softrepa_parameters, unload_softrepa
from diffusers_softrepa import hub as our_hub
from diffusers_softrepa.adapter import adapters_of
from diffusers_softrepa.checkpoint import save_checkpoint
from diffusers_softrepa.hub import HubOptions, check_login, checked_token, located, push_folder
from diffusers_softrepa.hub_errors import push_advice

pytest_plugins = ["hub_server"]

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
REPO = "alice/tokens"
# The client of huggingface_hub 0 asks again by itself after pauses of its own, whatever the server says.
CLIENT_READS_HEADERS = hasattr(hub_client, "parse_ratelimit_headers")


@pytest.fixture
def denoiser() -> nn.Module:
    return tiny.sd3_transformer()


@pytest.fixture
def folder(denoiser: nn.Module, tmp_path: Path) -> Path:
    config = SoftREPAConfig.for_denoiser(denoiser, num_timestep_bins=None)
    save_checkpoint(tmp_path / "made", config, {"tokens": torch.full(config.shapes["tokens"], 0.5)})
    return tmp_path / "made"


@pytest.fixture
def files(hub: Any, folder: Path) -> dict[str, bytes]:
    found = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG, CARD)}
    hub.add_repo(REPO, found)
    return found


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def loaded(denoiser: nn.Module, source: str = REPO, **keywords: Any) -> float:
    load_softrepa(denoiser, source, **keywords)
    tokens = softrepa_parameters(denoiser)["tokens"]
    unload_softrepa(denoiser)
    return float(tokens.min())


def refused(denoiser: nn.Module, kind: type[Exception], message: str, source: str = REPO, **keywords: Any) -> str:
    """Checks that a load is refused with one printable sentence and changes nothing; returns the sentence."""
    with pytest.raises(kind, match=message) as caught:
        load_softrepa(denoiser, source, **keywords)
    assert type(caught.value) is kind and adapters_of(denoiser) is None
    text = str(caught.value)
    assert text.isprintable() and len(text) < 900
    return text


def answer(status: int, message: str, **headers: str) -> Exception:
    from hub_server import HubError  # a plugin by now, which a module must not import before

    error = HubError(status, message)
    error.headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return error


def failing(status: int, where: str, times: int = 10**9, **headers: str) -> Callable[[str], Exception | None]:
    """Returns a fault: this status for requests whose "METHOD path" holds `where`, so many times."""
    left = [times]

    def fault(request: str) -> Exception | None:
        if where not in request or left[0] <= 0:
            return None
        left[0] -= 1
        return ConnectionResetError() if status == 0 else answer(status, f"said {status}", **headers)

    return fault


STATUSES = {
    400: "did not understand the request",
    401: "does not accept the login .* token=",
    403: "forbids access .* token=",
    404: "knows no such file",
    410: "gone from the Hub",
    416: "cannot go on with the part",
    418: r"refused \(status 418\)",
    429: "takes no more requests .* wait",
    500: "trouble of its own .* later",
    502: "trouble of its own .* later",
    503: "trouble of its own .* later",
    504: "trouble of its own .* later",
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("on", [f"HEAD /{REPO}", "GET /storage"])
@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_a_sentence_of_its_own(hub: Any, denoiser: nn.Module, status: int, on: str):
    hub.fault = failing(status, on)
    text = refused(denoiser, OSError, f"{STATUSES[status]}")
    assert f"status {status}" in text and f"{WEIGHTS} of {REPO}" in text and "out of reach" not in text


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("on", ["HEAD", "GET /storage"])
@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_passing_trouble_is_asked_again_with_growing_pauses(
    hub: Any, denoiser: nn.Module, pauses: list[float], status: int, on: str, force: bool
):
    hub.fault = failing(status, on, times=2)
    assert loaded(denoiser, force_download=force) == 0.5
    assert pauses == sorted(pauses) and 1 <= len(pauses) <= 2


@pytest.mark.skipif(not CLIENT_READS_HEADERS, reason="this client asks again by itself and reads no Retry-After")
@pytest.mark.usefixtures("files")
def test_a_server_that_says_when_is_asked_then(hub: Any, denoiser: nn.Module, pauses: list[float]):
    hub.fault = failing(429, "GET /storage", times=1, Retry_After="7")
    assert loaded(denoiser) == 0.5
    assert max(pauses) >= 7
    pauses.clear()
    hub.fault = failing(503, "GET /storage", times=1, Retry_After=formatdate(time.time() + 30, usegmt=True))
    assert loaded(denoiser, force_download=True) == 0.5
    assert 25 < max(pauses) < 31


@pytest.mark.usefixtures("files")
def test_a_server_that_says_much_later_is_not_waited_for(hub: Any, denoiser: nn.Module, pauses: list[float]):
    hub.fault = failing(503, "GET /storage", Retry_After="86400")
    refused(denoiser, OSError, "trouble of its own")
    assert pauses == [] if CLIENT_READS_HEADERS else max(pauses, default=0) <= 8


@pytest.mark.usefixtures("files")
def test_a_connection_that_breaks_off_says_so_and_the_cache_helps(hub: Any, denoiser: nn.Module):
    hub.fault = failing(0, f"/{REPO}")
    refused(denoiser, OSError, "the connection broke off while")
    hub.fault = failing(0, "nothing")
    assert loaded(denoiser) == 0.5
    hub.fault = failing(0, f"/{REPO}")
    assert loaded(denoiser) == 0.5


def test_a_config_that_could_not_be_fetched_is_not_called_absent(hub: Any, denoiser: nn.Module, files: Any):
    from safetensors.torch import load, save

    hub.add_repo(REPO, {WEIGHTS: save(load(files[WEIGHTS])), CONFIG: files[CONFIG]})
    for status in (403, 429, 500, 404):
        hub.fault = failing(status, CONFIG)
        assert "carries no" not in refused(denoiser, OSError, rf"status {status}\) when asked for {CONFIG} of {REPO}")
    hub.fault = failing(0, "nothing")
    assert loaded(denoiser) == 0.5


# The disk


@pytest.mark.usefixtures("files", "hub")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk of .* is full: .* make room, or pass cache_dir="),
        (errno.EACCES, "may not be written to; pass another folder as cache_dir="),
        (errno.EROFS, "may not be written to; pass another folder as cache_dir="),
        (errno.EIO, "cannot be kept in .*: Input/output error"),
    ],
)
def test_a_disk_that_cannot_take_the_file_says_so(
    denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch, number: int, message: str
):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", refuse)
    refused(denoiser, OSError, message)


@pytest.mark.usefixtures("files", "hub")
@pytest.mark.parametrize("below", [False, True])
def test_a_cache_dir_that_is_a_file_says_so(denoiser: nn.Module, tmp_path: Path, below: bool):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "deeper" if below else tmp_path / "file"
    refused(denoiser, OSError, "is a file; pass a folder as cache_dir=", cache_dir=cache)


# Damage in the cache


def cached(name: str) -> Path:
    return next(Path(constants.HF_HUB_CACHE).rglob(f"snapshots/*/{name}"))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-100],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "another file": lambda content: b"<html>404</html>",
}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("linked", [True, False])
def test_a_damaged_cached_file_is_fetched_again_by_itself_once(
    hub: Any, denoiser: nn.Module, caplog: Any, case: str, linked: bool
):
    if case == "one bit" and not linked:
        pytest.skip("a cache without links does not keep what would tell")
    assert loaded(denoiser) == 0.5
    path = cached(WEIGHTS)
    content = DAMAGE[case](path.read_bytes())
    target = path.resolve()
    if not linked:
        path.unlink()
        target = path
    target.write_bytes(content)
    hub.requests.clear()
    with caplog.at_level(logging.WARNING, "diffusers_softrepa"):
        assert loaded(denoiser) == 0.5
    assert sum(request.startswith("GET /storage") for request in hub.requests) == 1
    assert "damaged" in caplog.text and "fetched again" in caplog.text


def test_what_is_damaged_on_the_hub_too_is_fetched_no_third_time(hub: Any, denoiser: nn.Module, files: Any):
    hub.commit(REPO, {WEIGHTS: files[WEIGHTS][:-100]})
    refused(denoiser, ValueError, "is no complete safetensors file")
    assert sum(request.startswith("GET /storage") for request in hub.requests) == 1  # it is what the Hub announced


# Addresses


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/alice/tokens",
        "https://huggingface.co/alice/tokens/",
        "https://hf.co/alice/tokens/tree/main",
        f"https://huggingface.co/alice/tokens/blob/main/{WEIGHTS}",
        f"https://huggingface.co/alice/tokens/resolve/main/{WEIGHTS}?download=true",
        "hf://alice/tokens",
    ],
)
def test_a_pasted_address_is_understood(denoiser: nn.Module, hub: Any, address: str):
    assert loaded(denoiser, address) == 0.5


def test_an_address_says_revision_folder_and_file():
    def parts(address: str, **given: Any) -> tuple[Any, ...]:
        repo, options = located(address, HubOptions(**given))
        return repo, options.revision, options.subfolder, options.weight_name

    base = "https://huggingface.co/u/n"
    assert parts("u/n", revision="v1") == ("u/n", "v1", None, None)
    assert parts(f"{base}/tree/v1.0/a/b") == ("u/n", "v1.0", "a/b", None)
    assert parts(f"{base}/blob/a%2Fbranch/x.safetensors") == ("u/n", "a/branch", None, "x.safetensors")
    assert parts(f"{base}/tree/refs%2Fpr%2F1/x") == ("u/n", "refs/pr/1", "x", None)
    assert parts(f"{base}/tree/refs/pr/1/x") == ("u/n", "refs/pr/1", "x", None)
    assert parts(f"{base}/tree/main/a", subfolder="transformer") == ("u/n", "main", "a/transformer", None)
    assert parts("hf://u/n/a/x.safetensors") == ("u/n", None, "a", "x.safetensors")
    with pytest.raises(ValueError, match="says revision='main', but revision='v2' was given"):
        parts(f"{base}/tree/main", revision="v2")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://example.org/user/name", "is no address of a model on the Hub"),
        ("https://huggingface.co/datasets/user/name", "is no address of a model"),
        ("https://huggingface.co/user", "is no address of a model"),
        ("https://huggingface.co/user/name/discussions/1", "is no address of a file or folder"),
        ("ftp://huggingface.co/user/name", "is no address of a model"),
        ("https://me:secret@example.org/user/name?sig=secret", "is no address of a model"),
    ],
)
def test_an_address_of_something_else_says_what_to_give(denoiser: nn.Module, hub: Any, address: str, message: str):
    assert "secret" not in refused(denoiser, ValueError, message, address)
    assert hub.requests == []


def test_a_repository_with_a_path_behind_it_says_how_to_split_it(denoiser: nn.Module, hub: Any):
    text = refused(denoiser, OSError, "check the path", "alice/tokens/x.safetensors")
    assert "write 'alice/tokens', weight_name='x.safetensors'" in text
    text = refused(denoiser, OSError, "neither a folder or file here", "alice/tokens/deep/er")
    assert "'alice/tokens' write subfolder='deep/er'" in text
    assert hub.requests == []


# Tokens


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("token", ["hf_secret123\n", " hf_secret123 ", "hf_secret123\r\n", "Bearer hf_secret123"])
def test_a_token_is_stripped_and_never_shown(hub: Any, denoiser: nn.Module, folder: Path, token: str):
    assert checked_token(token) == "hf_secret123"
    assert "secret123" not in repr(HubOptions(token=token))
    calls = [
        lambda: load_softrepa(denoiser, REPO, token=token),
        lambda: push_folder(folder, REPO, [WEIGHTS], token=token),
        lambda: check_login(token),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert "secret123" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("token", ["hf_secret 123", "hf_secret\n123", "hf_sécret123", "hf_secret\x00123"])
def test_a_token_that_cannot_be_one_is_refused_unseen(hub: Any, denoiser: nn.Module, token: str):
    assert "cret" not in refused(denoiser, ValueError, "characters inside it that no Hub token has", token=token)
    assert hub.requests == []


@pytest.mark.usefixtures("files")
def test_a_token_that_the_server_repeats_is_not_shown(hub: Any, denoiser: nn.Module):
    hub.fault = lambda _: answer(403, "no right for hf_alice, nor for hf_ABCDEFGHIJKLMNOPQRST \x1b[31m")
    text = refused(denoiser, OSError, "forbids access", token="hf_alice")
    assert "hf_alice" not in text and "ABCDEF" not in text


# Pushing


@pytest.mark.parametrize("status", [429, 503])
def test_a_push_waits_for_a_passing_trouble(hub: Any, folder: Path, pauses: list[float], status: int):
    hub.fault = failing(status, "/commit/", times=1)
    push_folder(folder, REPO, [WEIGHTS, CONFIG, CARD], token="hf_alice")
    assert set(hub.files(REPO)) == {WEIGHTS, CONFIG, CARD}
    assert pauses


@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_a_link_in_place_of_a_file_is_not_pushed(hub: Any, folder: Path, tmp_path: Path, name: str):
    (tmp_path / "secret").write_text("SECRET")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="is no file of that folder but a link or missing, and is not uploaded"):
        push_folder(folder, REPO, [WEIGHTS, CONFIG, CARD], token="hf_alice")
    assert REPO not in hub.repos


def test_no_picture_outside_the_folder_is_pushed_whatever_the_card_names(hub: Any, folder: Path, tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "p.png").write_bytes(b"SECRET")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    (folder / ".hidden.png").write_bytes(b"SECRET")
    (folder / "in.png").write_bytes(b"mine")
    named = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "sub/p.png", ".hidden.png", "in.png"]
    named += ["sub/../../secret.png", "%2e%2e/secret.png", "file:///etc/passwd", "x" * 5000 + ".png", "a\0.png"]
    card = (folder / CARD).read_text() + "".join(f"![a]({name})\n" for name in named)
    (folder / CARD).write_text(card.replace("---\n", "---\nwidget:\n- text: '![a](secret.png)'\n", 1))
    push_folder(folder, REPO, [WEIGHTS, CONFIG, CARD], token="hf_alice")
    pictures = {name: content for name, content in hub.files(REPO).items() if name.endswith(".png")}
    assert pictures == {"in.png": b"mine"}


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 4), (60.0, 1)])
def test_a_call_that_the_client_repeated_for_long_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], seconds: float, calls: int
):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = []

    def call() -> None:
        made.append(now[0])
        now[0] += seconds
        raise ConnectionResetError

    monkeypatch.setattr(our_hub, "transport_fault", lambda _: "broken off")
    with pytest.raises(ConnectionResetError):
        our_hub._tried(call)
    assert len(made) == calls


def test_the_pauses_grow():
    assert list(our_hub.RETRY_PAUSES) == sorted(set(our_hub.RETRY_PAUSES))


WRONG_TYPES: list[tuple[str, Any]] = [
    *[(name, value) for name in ("revision", "subfolder", "weight_name") for value in (3, b"x", ["a"], Path("a"), {})],
    *[("token", value) for value in (b"hf_secret", 3, ["hf_secret"], Path("hf_secret"))],
    *[("cache_dir", value) for value in (3, b"x", ["a"], True)],
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=repr)
def test_an_option_of_a_wrong_type_is_refused_before_anything_is_asked_for(
    denoiser: nn.Module, hub: Any, files: dict[str, bytes], name: str, value: Any
):
    text = refused(denoiser, TypeError, f"^{name} must be a", **{name: value})
    assert "secret" not in text and hub.requests == []


@pytest.mark.parametrize(
    "source", [3, b"alice/tokens", None, ["a", "b"], object(), torch.zeros(2)], ids=lambda s: type(s).__name__
)
def test_a_source_of_a_wrong_type_is_refused(denoiser: nn.Module, source: Any):
    refused(denoiser, TypeError, "is loaded from a Hub repository id, a path or a state dict, but source is", source)


@pytest.mark.parametrize("revision", [3, b"main", ["main"]])
def test_nothing_is_pushed_to_a_revision_of_a_wrong_type(hub: Any, folder: Path, revision: Any):
    with pytest.raises(TypeError, match="revision must be a string or None, but is"):
        push_folder(folder, REPO, [WEIGHTS], revision=revision)
    assert hub.requests == []


def test_an_answer_that_is_not_json_is_no_matter_of_the_login():
    with pytest.raises(ValueError, match="Expecting value") as caught:
        json.loads("<html>")
    assert push_advice(caught.value) == "make sure that no login page, proxy or firewall answers in place of the Hub"
    assert push_advice(ValueError("another")).startswith("log in with")
