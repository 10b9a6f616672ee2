"""Turns errors of the Hub client into one sentence that says what happened and what to do."""

import errno
import json
import re

from huggingface_hub import constants, get_token
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

from .compat import transport_fault
from .hub_options import HubOptions
from .quoting import one_line, quoted

PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of a trouble that may be over in a moment


def download_sentence(error: Exception, repo_id: str, filename: str, options: HubOptions) -> str:
    """Returns the message for an error of a download: what happened and what to do."""
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
    """Returns the message for an error of the connection, of the server or of the cache's disk."""
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
    """Returns a hint for `user/repo/folder`, which must be given as a repository id and a subfolder."""
    user, name, *rest = [*repo_id.strip("/").split("/"), ""]
    whole = "/".join(rest).rstrip("/")
    if not whole or not user or user.startswith((".", "~")):
        return ""
    return one_line(f"; for what is in the repository {user + '/' + name!r} write subfolder={whole!r} beside it", 200)


def push_advice(error: Exception) -> str:
    """Returns what to do after a failed upload, as the end of a sentence."""
    if isinstance(error, json.JSONDecodeError):  # as the answer to a request of the Hub's API
        return "make sure that no login page, proxy or firewall answers in place of the Hub"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in PASSING or (status is None and not isinstance(error, HFValidationError | ValueError)):
        return "wait until the Hub can be reached and has no trouble"
    return "log in with `hf auth login` or pass a token that may write there"


def redacted(text: str, token: str | bool | None) -> str:
    """Returns a text without Hub tokens: the given one, the stored one, and any word of their form."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and len(secret) > 3:
            text = text.replace(secret, "<token>")
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", "<token>", text)
