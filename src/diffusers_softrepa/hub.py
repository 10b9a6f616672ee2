"""Downloads files of an adapter from the Hub and uploads adapter folders, with one sentence for each failure.

huggingface_hub itself retries connections, with growing pauses, before it falls back to its cache. It does not retry a
download that the server refuses temporarily (429, 5xx); that is done here.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .card import images_of, refreshed, words_by_hand
from .compat import HUB_RETRIES, transport_fault
from .hub_errors import PASSING, download_sentence, push_advice, redacted
from .hub_options import HubOptions as HubOptions
from .hub_options import checked_token as checked_token
from .hub_options import located as located
from .quoting import one_line, quoted

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
UNKNOWN_REPO = "user/this-adapter"  # placeholder in a card that is written before the repository is known

RETRY_PAUSES = (1.0, 2.0, 4.0)  # seconds before each further try
LONGEST_PAUSE = 60.0  # seconds; if the server asks for a longer pause, the call fails at once
LONGEST_TRY = 30.0  # seconds; a call that fails after more was repeated by the client itself, and is not made again

_RETRIED_DOWNLOADS = tuple(status for status in HUB_RETRIES if status < 500)  # by the client, after a failed download
_T = TypeVar("_T")


def fetch(repo_id: str, filename: str, options: HubOptions) -> Path:
    """Returns the local path of a file of a Hub repository, downloaded unless it is in the cache undamaged.

    A file whose digest is not the one that the Hub announced is downloaded once more.

    Raises:
        OSError: The file cannot be downloaded; the error of huggingface_hub is the cause.
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
    """Whether an unreadable file was downloaded without a digest to check and can be downloaded again."""
    if options.force_download or options.local_files_only or constants.HF_HUB_OFFLINE or Path(source).exists():
        return False
    return _is_whole(path) is None


def is_missing(error: OSError) -> bool:
    """Whether `fetch` failed because the repository exists but the file is not in it."""
    cause = error.__cause__
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def is_absent(source: str | os.PathLike[str], options: HubOptions) -> bool:
    """Whether a readable folder or repository has no adapter in the subfolder of the options."""
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


def files_of(repo_id: str, options: HubOptions) -> list[str]:
    """Returns the names of the files in a folder of a Hub repository; none where they cannot be listed."""
    try:
        api = HfApi(token=options.token, library_name="diffusers-softrepa")
        paths = api.list_repo_files(repo_id, revision=options.revision)
    except Exception as error:  # it only improves a message
        logger.debug("the files of %s cannot be listed: %s", repo_id, type(error).__name__)
        return []
    folder = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    names = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
    return [name for name in names if "/" not in name]


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
        raise OSError(redacted(download_sentence(cause, repo_id, filename, options), options.token)) from cause


def _tried(call: Callable[[], _T], *, already: tuple[int, ...] = ()) -> _T:
    """Returns the result of a call of the Hub, which is repeated with growing pauses after temporary failures.

    Args:
        call: The call.
        already: Statuses after which huggingface_hub itself has retried.
    """
    for pause in RETRY_PAUSES:
        began = time.monotonic()
        try:
            return call()
        except Exception as error:
            wait = _wait(error, pause, already)
            if wait is None or time.monotonic() - began > LONGEST_TRY:
                raise
            logger.info("the Hub has a passing trouble; it is asked again in %.1f seconds", wait)
        time.sleep(wait)
    return call()


def _wait(error: Exception, pause: float, already: tuple[int, ...]) -> float | None:
    """Returns the seconds to wait before the next attempt; None if the failure is not temporary."""
    hidden = error.__cause__ if type(error) in (ValueError, LocalEntryNotFoundError) else None
    response = getattr(hidden or error, "response", None)
    if isinstance(error, LocalEntryNotFoundError):
        # A client that retries after status 500 also retries after a lost connection.
        status = getattr(response, "status_code", 500)
        if status in HUB_RETRIES or status not in PASSING:
            return None
    if response is not None and hidden is None and response.status_code in already:
        return None
    if response is not None and response.status_code in PASSING:
        wanted = _retry_after(response.headers.get("Retry-After"))
        return max(pause, wanted) if wanted <= LONGEST_PAUSE else None
    fault = transport_fault(hidden or error)
    if fault == "broken off" or (fault == "no connection" and hidden is not None):
        return pause
    return pause if str(error).startswith("Consistency check failed") else None


def _retry_after(header: str | None) -> float:
    """Returns the seconds in a `Retry-After` header, a number or a date; 0 without one."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _is_whole(path: Path) -> bool | None:
    """Whether a file of the Hub cache has the digest that is its name there; None if the name is not a digest.

    Large files are named by their sha256, others by git's sha1. A different sha1 gives None, as mirrors of the Hub may
    compute it in another way.
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


def check_login(token: str | bool | None = None) -> None:
    """Checks that the Hub accepts the token, before a long run whose result is to be pushed.

    Raises:
        OSError: The Hub does not accept the token or cannot be reached; the error of huggingface_hub is the cause.
    """
    token = checked_token(token)
    try:
        _tried(lambda: HfApi(library_name="diffusers-softrepa").whoami(token=token))
    except Exception as error:  # the client and its transport raise many kinds
        raise OSError(
            f"pushing needs a Hub login, but: {redacted(one_line(error, 400), token)}; log in with `hf auth login`, "
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

    If the repository already has a model card, only the sections that this package wrote are updated; see `card`. A
    new card names the repository. Images that the folder's card shows are uploaded with it. Symbolic links are not
    followed, as their targets lie outside the folder.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        TypeError: `token` or `revision` has the wrong type.
        OSError: The Hub refused, or one of the files is a link; the error of huggingface_hub is the cause.
    """
    token = checked_token(token)
    if not isinstance(revision, str | None):
        raise TypeError(f"revision must be a string or None, but is {quoted(revision)}")
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
            shown = [name for name in images_of(card) if name not in filenames and _is_own(directory, name)]
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
            f"{redacted(one_line(error, 600), token)}; {push_advice(error)}, and push again"
        ) from error
    return commit.pr_url or commit.commit_url


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
    """Returns the model card of a repository; None if it has none."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
    return path.read_bytes().decode(errors="surrogateescape")
