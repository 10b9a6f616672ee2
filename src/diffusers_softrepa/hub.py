"""The Hub, both ways: one file down, one folder up, and every failure as a sentence that says what to do.

What the Hub's client does itself is left to it: it asks again for what it could not reach, with a growing pause,
before it falls back to its cache. A download that the server refuses for a moment it gives up at once; that is asked
for again here.
"""

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .card import pictures_of, refreshed, words_by_hand
from .compat import HUB_RETRIES, transport_fault
from .quoting import one_line, quoted

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
UNKNOWN_REPO = "user/this-adapter"  # stands for the repository in a card that is written before it is known

RETRY_PAUSES = (1.0, 2.0, 4.0)  # seconds before each further try
LONGEST_PAUSE = 60.0  # seconds; a server that asks for more is not waited for

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of a trouble that may be over in a moment
_RETRIED_DOWNLOADS = tuple(status for status in HUB_RETRIES if status < 500)  # by the client; not after other answers
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubOptions:
    """Where to look and how: the Hub keywords of `load_lora_weights`.

    Attributes:
        weight_name: File to load instead of `adapter_model.safetensors`.
        subfolder: Folder inside the repository or the local folder.
        revision: Branch, tag or commit.
        token: Access token; True or None for the stored one, False for none. White space around it is dropped.
        local_files_only: Look in the cache alone.
        cache_dir: Cache folder.
        force_download: Fetch even what the cache has.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: The token has characters that no token has.
    """

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False

    def __post_init__(self) -> None:
        for name in ("weight_name", "subfolder", "revision"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise TypeError(f"{name} must be a text or None, but is {quoted(value)}")
        object.__setattr__(self, "token", checked_token(self.token))


def checked_token(token: str | bool | None) -> str | bool | None:
    """Returns a Hub token without the white space that copying leaves around it; None for an empty one.

    Raises:
        TypeError: It is neither a text, a truth value, nor None.
        ValueError: It has characters that no token has. It is not shown.
    """
    if not isinstance(token, str | bool | None):
        raise TypeError(f"token must be a text, True, False or None, but is a {type(token).__name__}")
    if not isinstance(token, str):
        return token
    token = token.strip().removeprefix("Bearer ").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(
            "the token has characters inside it that no Hub token has, such as spaces or line ends; copy it again "
            "from your Hub settings"
        )
    return token or None


def located(source: str, options: HubOptions) -> tuple[str, HubOptions]:
    """Returns a source as a path or repository id, with what a pasted address of the Hub says put into the options.

    Args:
        source: A path, a repository id, or an address such as `https://huggingface.co/user/name/tree/main/folder`.
        options: What was asked for beside it; a `subfolder` is looked for inside the address's folder.

    Raises:
        ValueError: The address is no model's on the Hub, or says something else than the options.
    """
    url = urlsplit(source) if "://" in source[:8] else None
    if url is None:
        return source, options
    ours = (*_HOSTS, urlsplit(constants.ENDPOINT).netloc)
    parts = [unquote(part) for part in f"{url.netloc if url.scheme == 'hf' else ''}/{url.path}".split("/") if part]
    shown = one_line(f"{url.scheme}://{url.hostname}{url.path}", 160)  # without a password or a signature
    fits = url.scheme == "hf" or (url.scheme in ("http", "https") and url.netloc in ours)
    if not fits or len(parts) < 2 or parts[0] in ("datasets", "spaces", "api"):
        raise ValueError(
            f"{shown} is no address of a model on the Hub; give 'user/name', and revision=, subfolder= and "
            "weight_name= for what is inside it"
        )
    repo_id, rest, revision = "/".join(parts[:2]), parts[2:], None
    if rest and url.scheme != "hf":
        if rest[0] not in ("tree", "blob", "resolve", "raw") or len(rest) < 2:
            raise ValueError(
                f"{shown} is no address of a file or folder; for the repository write {repo_id!r}, and revision=, "
                "subfolder= and weight_name= for what is inside it"
            )
        refs = 3 if rest[1] == "refs" else 1
        revision, rest = "/".join(rest[1 : 1 + refs]), rest[1 + refs :]
    weight_name = rest.pop() if rest and "." in rest[-1] and Path(rest[-1]).suffix in _FILE_SUFFIXES else None
    folder = "/".join([*rest, *([options.subfolder] if options.subfolder else [])])
    for name, told in (("revision", revision), ("weight_name", weight_name)):
        given = getattr(options, name)
        if told is not None and given is not None and given != told:
            raise ValueError(f"{shown} says {name}={told!r}, but {name}={quoted(given)} was given; leave one out")
    return repo_id, replace(
        options,
        revision=revision or options.revision,
        weight_name=weight_name or options.weight_name,
        subfolder=folder or None,
    )


def fetch(repo_id: str, filename: str, options: HubOptions) -> Path:
    """Returns the local path of a file of a Hub repository, downloaded unless the cache has it whole.

    A file whose content is not what the Hub announced is fetched once more.

    Raises:
        OSError: It cannot be had; the Hub's own error is the cause.
        ValueError: The file's name leads out of the repository, or its content is damaged.
    """
    if options.force_download and options.local_files_only:
        raise ValueError("'force_download=True' and 'local_files_only=True' at the same time ask for both and neither")
    inside = f"{options.subfolder or ''}/{filename}".replace("\\", "/").split("/")
    if ".." in inside or filename.startswith("/"):
        raise ValueError(
            f"subfolder= and weight_name= name a file inside the repository, but {quoted('/'.join(inside))} leads out"
        )
    path, again = _fetched(repo_id, filename, options), options.force_download
    if _is_whole(path) is not False:
        return path
    if not (again or options.local_files_only or constants.HF_HUB_OFFLINE):
        logger.warning("%s of %s is damaged in the cache and is fetched again", filename, repo_id)
        path, again = _fetched(repo_id, filename, replace(options, force_download=True)), True
    if _is_whole(path) is False:
        raise ValueError(
            f"{one_line(path)} is not what the Hub announced: it is damaged; "
            + ("it arrived so; try again from another network" if again else "load it again while online")
        )
    return path


def may_be_fetched_again(path: Path, source: str, options: HubOptions) -> bool:
    """Whether an unreadable file came from the Hub in a form that cannot be checked, and could be had again."""
    if options.force_download or options.local_files_only or constants.HF_HUB_OFFLINE or Path(source).exists():
        return False
    return _is_whole(path) is None


def is_missing(error: OSError) -> bool:
    """Whether `fetch` failed because the repository is there and the file is not in it."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def is_absent(source: str | os.PathLike[str], options: HubOptions) -> bool:
    """Whether a folder or a repository that can be read has no such subfolder with an adapter."""
    if Path(source).is_dir():
        return not (Path(source) / (options.subfolder or "")).is_dir()
    source, options = located(os.fspath(source), options)
    try:
        fetch(source, options.weight_name or "adapter_model.safetensors", options)
    except OSError as error:
        if not is_missing(error):
            raise
        return True
    return False


def _fetched(repo_id: str, filename: str, options: HubOptions) -> Path:
    def download(*, cached: bool = options.local_files_only) -> str:
        return hf_hub_download(
            repo_id,
            filename,
            subfolder=options.subfolder,
            revision=options.revision,
            token=options.token,
            local_files_only=cached,
            cache_dir=None if options.cache_dir is None else os.fspath(options.cache_dir),
            force_download=options.force_download,
            library_name="diffusers-softrepa",
        )

    try:
        return Path(_tried(download, already=_RETRIED_DOWNLOADS))
    except Exception as error:  # the client, its transport and the cache's disk raise many kinds
        # With force_download the client hides what went wrong behind a ValueError that names nothing.
        cause = error.__cause__ if type(error) is ValueError and isinstance(error.__cause__, Exception) else error
        if transport_fault(cause) in ("no connection", "broken off") and not options.force_download:
            try:  # the client itself looks into its cache for some of these only
                return Path(download(cached=True))
            except (OSError, ValueError):
                logger.debug("%s of %s is not in the cache either", filename, repo_id)
        raise OSError(_redacted(_sentence(cause, repo_id, filename, options), options.token)) from cause


def _tried(call: Callable[[], _T], *, already: tuple[int, ...] = ()) -> _T:
    """Returns what a call of the Hub returns; a passing trouble is waited for, each time longer.

    Args:
        call: The call.
        already: Statuses after which the client itself has asked several times.
    """
    for pause in RETRY_PAUSES:
        try:
            return call()
        except Exception as error:
            wait = _wait(error, pause, already)
            if wait is None:
                raise
            logger.info("the Hub has a passing trouble; it is asked again in %.1f seconds", wait)
        time.sleep(wait)
    return call()


def _wait(error: Exception, pause: float, already: tuple[int, ...]) -> float | None:
    """Returns how many seconds to wait before another try; None if one would be of no use."""
    hidden = error.__cause__ if type(error) in (ValueError, LocalEntryNotFoundError) else None
    response = getattr(hidden or error, "response", None)
    if isinstance(error, LocalEntryNotFoundError):
        status = getattr(response, "status_code", 500)  # a client that asks again after 500 does so without an answer too
        if status in HUB_RETRIES or status not in _PASSING:
            return None
    if response is not None and hidden is None and response.status_code in already:
        return None
    if response is not None and response.status_code in _PASSING:
        wanted = _retry_after(response.headers.get("Retry-After"))
        return max(pause, wanted) if wanted <= LONGEST_PAUSE else None
    fault = transport_fault(hidden or error)
    if fault == "broken off" or (fault == "no connection" and hidden is not None):
        return pause
    return pause if str(error).startswith("Consistency check failed") else None


def _retry_after(header: str | None) -> float:
    """Returns the seconds that a server asks for, as a number or a date; 0 if it does not."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _is_whole(path: Path) -> bool | None:
    """Whether a file of the Hub's cache has the content under whose digest it is kept; None where that is not told.

    Large files are kept under their sha256, others under git's sha1, which mirrors of the Hub may make in another way.
    """
    announced = Path(os.path.realpath(path)).name
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", announced):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return None
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return True if digest.hexdigest() == announced else False if len(announced) == 64 else None


def _sentence(error: Exception, repo_id: str, filename: str, options: HubOptions) -> str:
    """Returns what happened and what to do about it."""
    name = f"{options.subfolder}/{filename}" if options.subfolder else filename
    what = one_line(f"{name} of {repo_id}", 200)
    if isinstance(error, HFValidationError):
        return (
            f"{quoted(repo_id)} is neither a folder or file here nor a Hub repository id of the form 'user/name'"
            f"{_how_to_split(repo_id)}"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"access to {repo_id} is gated: accept its terms on its Hub page, then pass token=... "
            "or log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id!r} is no folder or file here and no repository that the Hub shows you; check the spelling, "
            "and for a private one pass token=... or log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {quoted(options.revision)}; name one of its branches, tags or commits"
    hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return (
            f"{repo_id} has no file {one_line(name, 160)}; give weight_name= or subfolder= if the adapter is stored "
            "elsewhere in it"
        )
    root = hidden if isinstance(hidden, Exception) else error
    if isinstance(root, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if options.force_download:
            return f"force_download=True needs the Hub, which is out of reach; leave it out to use {repo_id} as cached"
        return (
            f"{what} is not in the cache and the Hub is out of reach (offline mode or local_files_only); download it "
            "once while online"
        )
    return _trouble(root, what, options)


def _trouble(error: Exception, what: str, options: HubOptions) -> str:
    """Returns what went wrong on the way to the Hub or back."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        told, advice = _ANSWERS.get(status, ("", ""))
        if status >= 500:
            told, advice = "the Hub has trouble of its own", "try again later"
        said = one_line(getattr(error, "server_message", None) or "", 160)
        return (
            f"{told or 'the Hub refused'} (status {status}) when asked for {what}{': ' + said if said else ''}; "
            f"{advice or 'check the repository on its Hub page'}"
        )
    if isinstance(error, FileMetadataError):
        return (
            f"the answer for {what} is not the Hub's: a login page, proxy or firewall stands between, or HF_ENDPOINT "
            "names another server"
        )
    fault = transport_fault(error)
    if fault == "proxy":
        return f"the proxy did not let {what} through; check HTTPS_PROXY and NO_PROXY"
    if fault == "timeout":
        return (
            f"the Hub did not answer in time when asked for {what}; try again later, or raise HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if fault == "no connection":
        return (
            f"{what} is not in the cache and the Hub is out of reach (no connection to {constants.ENDPOINT}); "
            "download it once while online"
        )
    if fault == "broken off":
        return f"the connection broke off while {what} was asked for; try again"
    if str(error).startswith("Consistency check failed"):
        return f"{what} did not arrive whole; try again"
    if isinstance(error, OSError) and error.errno is not None:
        return _disk_trouble(error, what, options)
    return (
        f"{what} could not be had: {type(error).__name__}: {one_line(error, 200)}; try again, or download it by hand"
    )


_ANSWERS: dict[int, tuple[str, str]] = {
    400: ("the Hub did not understand the request", "check revision=, subfolder= and weight_name="),
    401: ("the Hub does not accept the login", "pass another token=... or log in again with `hf auth login`"),
    403: ("the Hub forbids access", "pass a token=... that may read it, or log in with `hf auth login`"),
    404: ("the Hub knows no such file", "check the spelling on its Hub page"),
    407: ("the proxy wants a login", "check HTTPS_PROXY"),
    408: ("the Hub waited too long for the request", "try again later"),
    410: ("it is gone from the Hub", "ask whoever published it"),
    416: ("the Hub cannot go on with the part that is in the cache", "pass force_download=True"),
    429: (
        "the Hub takes no more requests from you for now, and was asked several times",
        "wait some minutes, or pass a token=..., which has a higher limit",
    ),
}
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".md", ".txt")


def _disk_trouble(error: OSError, what: str, options: HubOptions) -> str:
    folder = one_line(options.cache_dir or constants.HF_HUB_CACHE, 160)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return f"the disk of {folder} is full: {what} could not be written; make room, or pass cache_dir= on another"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{what} cannot be kept in {folder}, as that or a part of it is a file; pass a folder as cache_dir="
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what} cannot be kept in {folder}, which may not be written to; pass another folder as cache_dir="
    return f"{what} cannot be kept in {folder}: {error.strerror}; pass another folder as cache_dir="


def _how_to_split(repo_id: str) -> str:
    """Returns what to write for a repository with something of its inside behind it."""
    user, name, *rest = [*repo_id.strip("/").split("/"), ""]
    whole = "/".join(rest).rstrip("/")
    if not whole or not user or user.startswith((".", "~")):
        return ""
    return one_line(f"; for what is in the repository {user + '/' + name!r} write subfolder={whole!r} beside it", 200)


def _redacted(text: str, token: str | bool | None) -> str:
    """Returns a text without Hub tokens: the one that was given, the stored one, and whatever else looks like one."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and len(secret) > 3:
            text = text.replace(secret, "<token>")
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", "<token>", text)


def check_login(token: str | bool | None = None) -> None:
    """Asks the Hub whether it knows the token, before hours are spent on what could not be pushed.

    Raises:
        OSError: It does not, or cannot be asked; its own error is the cause.
    """
    token = checked_token(token)
    try:
        _tried(lambda: HfApi(library_name="diffusers-softrepa").whoami(token=token))
    except Exception as error:  # the client and its transport raise many kinds
        raise OSError(
            f"pushing needs a Hub login, but: {_redacted(one_line(error, 400), token)}; log in with `hf auth login`, "
            "pass a token, or do without push_to_hub and push the folder later"
        ) from error


def push_folder(
    directory: Path,
    repo_id: str,
    filenames: list[str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads files of a folder to a Hub repository, created if there is none.

    Of a model card that the repository already has only the sections that this package wrote are brought up to date;
    see `card`. A new one names the repository. Pictures that the folder's card shows go with it. A link is never
    followed: what it names lies elsewhere and was not meant to be shared.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        OSError: The Hub refused, or one of the files is a link; the Hub's own error is the cause.
    """
    token = checked_token(token)
    for name in filenames:
        if not _is_own(directory, name):
            raise OSError(
                f"{one_line(directory / name)} is no file of that folder but a link or missing, and is not uploaded; "
                "save the adapter again"
            )
    api = HfApi(token=token, library_name="diffusers-softrepa")
    try:
        repo_id = _tried(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, directory / name) for name in filenames if name != CARD_NAME]
        if CARD_NAME in filenames:
            card = (directory / CARD_NAME).read_bytes().decode(errors="surrogateescape")
            card = card.replace(UNKNOWN_REPO, repo_id)
            shown = [name for name in pictures_of(card) if name not in filenames and _is_own(directory, name)]
            operations += [CommitOperationAdd(name, directory / name) for name in shown]
            existing = _pushed_card(api, repo_id, revision)
            if existing is not None and words_by_hand(card) not in ("", words_by_hand(existing)):
                logger.warning(
                    "the words in %s differ from those of %s on the Hub, which stay as they are there; edit the card "
                    "on the Hub, or push the file with `hf upload`",
                    directory / CARD_NAME,
                    repo_id,
                )
            card = card if existing is None else refreshed(existing, card)
            content = card.encode(errors="surrogateescape")
            if not _is_text(content):
                logger.warning("the card of %s is not UTF-8 text and stays as it is; write it anew", repo_id)
            elif card != existing:
                operations.append(CommitOperationAdd(CARD_NAME, content))
        commit = _tried(
            lambda: api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message or "Upload SoftREPA adapter",
                create_pr=create_pr,
                revision=revision,
            )
        )
    except Exception as error:  # the client and its transport raise many kinds
        raise OSError(
            f"the adapter is saved in {one_line(directory)}, but the Hub did not take it as {quoted(repo_id)}: "
            f"{_redacted(one_line(error, 600), token)}; {_push_advice(error)}, and push again"
        ) from error
    return commit.pr_url or commit.commit_url


def _push_advice(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _PASSING or (status is None and not isinstance(error, HFValidationError | ValueError)):
        return "wait until the Hub can be reached and has no trouble"
    return "log in with `hf auth login` or pass a token that may write there"


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_own(directory: Path, name: str) -> bool:
    """Whether a file lies in the folder itself: neither it nor a folder on the way to it is a link."""
    try:
        path = directory / name
        return path.is_file() and path.resolve() == directory.resolve() / name
    except (OSError, ValueError):  # a name that no file can have
        return False


def _pushed_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Returns the card that a repository has; None for none."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
    return path.read_bytes().decode(errors="surrogateescape")
