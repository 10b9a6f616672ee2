"""The Hub, both ways: one file down, one folder up, and every failure as a sentence that says what to do."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .card import pictures_of, refreshed, words_by_hand

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
UNKNOWN_REPO = "user/this-adapter"  # stands for the repository in a card that is written before it is known

_HUB_ERRORS = (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, HFValidationError)


@dataclass(frozen=True)
class HubOptions:
    """Where to look and how: the Hub keywords of `load_lora_weights`.

    Attributes:
        weight_name: File to load instead of `adapter_model.safetensors`.
        subfolder: Folder inside the repository or the local folder.
        revision: Branch, tag or commit.
        token: Access token; True or None for the stored one, False for none.
        local_files_only: Look in the cache alone.
        cache_dir: Cache folder.
        force_download: Fetch even what the cache has.
    """

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False


def fetch(repo_id: str, filename: str, options: HubOptions) -> Path:
    """Returns the local path of a file of a Hub repository, downloaded unless the cache has it.

    Raises:
        OSError: It cannot be had; the Hub's own error is the cause.
    """
    try:
        path = hf_hub_download(
            repo_id,
            filename,
            subfolder=options.subfolder,
            revision=options.revision,
            token=options.token,
            local_files_only=options.local_files_only,
            cache_dir=None if options.cache_dir is None else os.fspath(options.cache_dir),
            force_download=options.force_download,
            library_name="diffusers-softrepa",
        )
    except _HUB_ERRORS as error:
        raise OSError(_sentence(error, repo_id, filename, options)) from error
    except ValueError as error:
        cause = error.__cause__
        if not isinstance(cause, _HUB_ERRORS):
            raise
        # With force_download the client hides what went wrong behind a ValueError that names nothing.
        raise OSError(_sentence(cause, repo_id, filename, options)) from cause
    return Path(path)


def is_absent(source: str | os.PathLike[str], options: HubOptions) -> bool:
    """Whether a folder or a repository that can be read has no such subfolder with an adapter."""
    if Path(source).is_dir():
        return not (Path(source) / (options.subfolder or "")).is_dir()
    try:
        fetch(os.fspath(source), options.weight_name or "adapter_model.safetensors", options)
    except OSError as error:
        absent = isinstance(error.__cause__, EntryNotFoundError)
        if not absent or isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        return True
    return False


def _sentence(error: Exception, repo_id: str, filename: str, options: HubOptions) -> str:
    """Returns what happened and what to do about it."""
    name = f"{options.subfolder}/{filename}" if options.subfolder else filename
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is neither a folder or file here nor a Hub repository id of the form 'user/name'"
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
        return f"{repo_id} has no revision {options.revision!r}; name one of its branches, tags or commits"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        if options.force_download:
            return f"force_download=True needs the Hub, which is out of reach; leave it out to use {repo_id} as cached"
        return (
            f"{name} of {repo_id} is not in the cache and the Hub is out of reach (offline mode, local_files_only, "
            "or no connection); download it once while online"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"{repo_id} has no file {name}; give weight_name= or subfolder= if the adapter is stored elsewhere in it"
        )
    return (
        f"the Hub answered with an error when asked for {name} of {repo_id}: {_in_one_line(error)}; if it is about "
        "the token, pass another token=... or log in again with `hf auth login`"
    )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_login(token: str | bool | None = None) -> None:
    """Asks the Hub whether it knows the token, before hours are spent on what could not be pushed.

    Raises:
        OSError: It does not, or cannot be asked; its own error is the cause.
    """
    try:
        HfApi(library_name="diffusers-softrepa").whoami(token=token)
    except (*_HUB_ERRORS, OSError) as error:
        raise OSError(
            f"pushing needs a Hub login, but: {_in_one_line(error)}; log in with `hf auth login`, pass a token, or do "
            "without push_to_hub and push the folder later"
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
    see `card`. A new one names the repository. Pictures that the folder's card shows go with it.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        OSError: The Hub refused; its own error is the cause.
    """
    api = HfApi(token=token, library_name="diffusers-softrepa")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, directory / name) for name in filenames if name != CARD_NAME]
        if CARD_NAME in filenames:
            card = (directory / CARD_NAME).read_text(encoding="utf-8").replace(UNKNOWN_REPO, repo_id)
            shown = [name for name in pictures_of(card) if name not in filenames and (directory / name).is_file()]
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
            if card != existing:
                operations.append(CommitOperationAdd(CARD_NAME, card.encode(errors="surrogateescape")))
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload SoftREPA adapter",
            create_pr=create_pr,
            revision=revision,
        )
    except (*_HUB_ERRORS, OSError, RuntimeError, ValueError) as error:
        raise OSError(
            f"the adapter is saved in {directory}, but the Hub did not take it as {repo_id!r}: {_in_one_line(error)}; "
            "log in with `hf auth login` or pass a token that may write there, and push again"
        ) from error
    return commit.pr_url or commit.commit_url


def _pushed_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Returns the card that a repository has; None for none."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return None
    path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
    return path.read_bytes().decode(errors="surrogateescape")
