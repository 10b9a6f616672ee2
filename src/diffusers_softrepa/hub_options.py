"""Options of a download from the Hub, access tokens, and addresses pasted from a browser."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from .quoting import one_line, quoted

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")
_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".md", ".txt")


@dataclass(frozen=True)
class HubOptions:
    """Options of a download from the Hub, with the names that `load_lora_weights` uses.

    Attributes:
        weight_name: File to load instead of `adapter_model.safetensors`.
        subfolder: Folder inside the repository or the local folder.
        revision: Branch, tag or commit.
        token: Access token; True or None for the stored one, False for none. Surrounding white space is removed.
        local_files_only: Use the cache only.
        cache_dir: Cache folder; None for the default one.
        force_download: Download files that are in the cache again.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: The token holds characters that cannot be part of a token.
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
                raise TypeError(f"{name} must be a string or None, but is {quoted(value)}")
        if not isinstance(self.cache_dir, str | os.PathLike | None):
            raise TypeError(f"cache_dir must be a path or None, but is {quoted(self.cache_dir)}")
        object.__setattr__(self, "token", checked_token(self.token))


def checked_token(token: str | bool | None) -> str | bool | None:
    """Returns a Hub token without surrounding white space; None for an empty one.

    Raises:
        TypeError: It is not a string, a bool or None.
        ValueError: It holds characters that cannot be part of a token. The message does not show the token.
    """
    if not isinstance(token, str | bool | None):
        raise TypeError(f"token must be a string, True, False or None, but is a {type(token).__name__}")
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
    """Returns a source as a path or repository id; the revision, folder and file of a Hub address become options.

    Args:
        source: A path, a repository id, or an address such as `https://huggingface.co/user/name/tree/main/folder`.
        options: The options given with it; a `subfolder` is relative to the folder of the address.

    Raises:
        ValueError: The address is not that of a model on the Hub, or contradicts the options.
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
