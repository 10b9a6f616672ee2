"""From what a user points at to rows: folders with metadata, webdataset shards, `datasets` on the disk or the Hub."""

from __future__ import annotations

import json
from glob import glob
from pathlib import Path
from typing import Any

import datasets


def load_rows(data: Any, split: str, streaming: bool | None) -> Any:
    """What was given, as a list of dicts, a map-style data set or an `IterableDataset`; see `open_examples`.

    Raises:
        ValueError: The folder is empty, there is no shard, or metadata.jsonl is not as it should be.
        TypeError: It is something else.
    """
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"give one split of the data set, such as data[{next(iter(data))!r}]; it has {list(data)}")
    if isinstance(data, str | Path):
        return _load_from(str(data), split, streaming)
    if isinstance(data, list | tuple) and data and all(_is_shard(entry) for entry in data):
        return _load_shards([str(entry) for entry in data], streaming)
    if isinstance(data, datasets.IterableDataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return data
    raise TypeError(
        "training data must be a data set, a path, a name, or a list of dicts (see open_examples), but got "
        f"{type(data).__name__}; make one of a generator with datasets.IterableDataset.from_generator"
    )


def _load_from(source: str, split: str, streaming: bool | None) -> Any:
    folder = Path(source)
    if (folder / "metadata.jsonl").is_file():
        return _load_folder(folder)
    if source.endswith(".tar"):
        return _load_shards(source if "://" in source else sorted(glob(source)), streaming, source)
    if folder.is_dir():
        if shards := sorted(str(path) for path in folder.glob("*.tar")):
            return _load_shards(shards, streaming)
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if not any(folder.iterdir()):
            raise ValueError(f"{source} is empty; put images and a metadata.jsonl there")
    return datasets.load_dataset(source, split=split, streaming=bool(streaming))


def _is_shard(source: Any) -> bool:
    return isinstance(source, str | Path) and str(source).endswith(".tar")


def _load_shards(shards: str | list[str], streaming: bool | None, given: str = "") -> Any:
    if not shards:
        raise ValueError(f"no webdataset shard is at {given}")
    return datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=streaming is not False)


def _load_folder(folder: Path) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl, each with the path of its image."""
    rows, missing = [], []
    for number, line in enumerate((folder / "metadata.jsonl").read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {folder}/metadata.jsonl is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(
                f"every line of {folder}/metadata.jsonl must be a JSON object with a file_name, "
                f'such as {{"file_name": "cat.jpg", "text": "a cat"}}, but line {number} is {line:.80}'
            )
        path = folder / row["file_name"]
        missing += [] if path.is_file() else [f"{row['file_name']} (line {number})"]
        rows.append({**row, "image": path})
    if missing:
        raise ValueError(
            f"{folder}/metadata.jsonl names {len(missing)} of {len(rows)} files that do not exist: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return rows


def undecoded(rows: Any) -> Any:
    """Leaves decoding to us, where a broken image can be told from a broken data set."""
    if not is_plain(rows):
        return rows
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows.with_format(None)


def is_plain(rows: Any) -> bool:
    """Whether its columns are stored ones, not made by the user's `set_transform`."""
    if isinstance(rows, datasets.Dataset):
        return rows.format["type"] != "custom"
    return isinstance(rows, datasets.IterableDataset)
