"""Laws of folders: however images and captions are kept, the same examples come out; what is unclear is said."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from diffusers_softrepa.files import UnreadableText, read_lines
from diffusers_softrepa.training.data.dataset import open_examples
from diffusers_softrepa.training.data.image import Framing, decode, fetch
from diffusers_softrepa.training.data.loader import PairLoader

COUNT = 3
NAMES = [f"{number}.png" for number in range(COUNT)]
CAPTIONS = [f"a shade of red, number {number}" for number in range(COUNT)]


def images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (6, 4), (10 * number, 0, 0)).save(folder / name)
    return folder


def sidecars(folder: Path, suffix: str = ".txt", end: str = "\n") -> None:
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (images(folder) / name).with_suffix(suffix).write_bytes(f"{caption}{end}".encode())


def csv(path: Path, heading: str = "file_name,text", prefix: str = "", sign: str = ",") -> None:
    rows = [f'{prefix}{name}{sign}"{caption}"' for name, caption in zip(NAMES, CAPTIONS, strict=True)]
    path.write_text("\n".join([heading, *rows]) + "\n")


def rows(file: str = "file_name", text: str = "text") -> list[dict[str, str]]:
    return [{file: name, text: caption} for name, caption in zip(NAMES, CAPTIONS, strict=True)]


def parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows()), path)


LAYOUTS = {
    "txt beside": lambda d: sidecars(d),
    "caption beside": lambda d: sidecars(d, ".caption"),
    "upper case": lambda d: sidecars(d, ".TXT"),
    "lines of Windows": lambda d: sidecars(d, end="\r\n"),
    "name and suffix": lambda d: sidecars(d, ".png.txt"),
    "sub-folder": lambda d: sidecars(d / "some" / "where"),
    "kohya": lambda d: sidecars(d / "1_red"),
    "split": lambda d: (sidecars(d / "train"), sidecars(d / "test", end=" of the test")),
    "split with tables": lambda d: (images(d / "train"), csv(d / "train" / "metadata.csv"), images(d / "test")),
    "hidden files": lambda d: (sidecars(d), (d / ".DS_Store").write_bytes(b"\xff"), images(d / ".thumbs")),
    "metadata.csv": lambda d: (images(d), csv(d / "metadata.csv")),
    "other columns": lambda d: (images(d), csv(d / "metadata.csv", "Image,Prompt")),
    "semicolons": lambda d: (images(d), csv(d / "metadata.csv", "image;caption", sign=";")),
    "tsv": lambda d: (images(d), csv(d / "metadata.tsv", "image\tcaption", sign="\t")),
    "byte order mark": lambda d: (
        images(d),
        csv(d / "metadata.csv"),
        (d / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + (d / "metadata.csv").read_bytes()),
    ),
    "an index of pandas": lambda d: (images(d), csv(d / "metadata.csv", ",file_name,text", prefix="0,")),
    "a blank line above the heading": lambda d: (
        images(d),
        csv(d / "metadata.csv"),
        (d / "metadata.csv").write_bytes(b"\n \n" + (d / "metadata.csv").read_bytes()),
    ),
    "spaces behind commas": lambda d: (images(d), csv(d / "metadata.csv", "file_name, text", sign=", ")),
    "links to folders": lambda d: (
        sidecars(d.with_name("elsewhere")),
        (d / "photos").symlink_to(d.with_name("elsewhere"), target_is_directory=True),
        (d.with_name("elsewhere") / "back").symlink_to(d, target_is_directory=True),
        (d.with_name("elsewhere") / "itself").symlink_to(d.with_name("elsewhere"), target_is_directory=True),
    ),
    "images/ and a table": lambda d: (images(d / "images"), csv(d / "captions.csv", "image,caption")),
    "paths of another machine": lambda d: (images(d / "a"), csv(d / "list.csv", "path,text", prefix="C:\\me\\")),
    "metadata.jsonl": lambda d: (images(d), (d / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows())))),
    "metadata.parquet": lambda d: (images(d), parquet(d / "metadata.parquet")),
    "metadata.json": lambda d: (images(d), (d / "metadata.json").write_text(json.dumps(rows("image", "caption")))),
    "captions by file": lambda d: (
        images(d),
        (d / "captions.json").write_text(json.dumps(dict(zip(NAMES, CAPTIONS, strict=True)))),
    ),
    "a table in each sub-folder": lambda d: (
        images(d / "a"),
        (d / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows()))),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_however_a_folder_is_laid_out_the_examples_are_the_same(layout: str, tmp_path: Path):
    LAYOUTS[layout](tmp_path)
    examples = open_examples(str(tmp_path))
    assert examples.count == COUNT
    read = [examples[number] for number in range(COUNT)]
    assert [example.captions for example in read] == [(caption,) for caption in CAPTIONS]
    assert [decode(fetch(example.image)).getpixel((0, 0))[0] for example in read] == [0, 10, 20]
    assert list(examples.captions()) == CAPTIONS


def test_images_that_no_table_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    LAYOUTS["a table in each sub-folder"](tmp_path)
    assert open_examples(tmp_path).count == COUNT and not caplog.records
    sidecars(tmp_path / "b")
    assert open_examples(tmp_path).count == COUNT
    assert "3 of 6 images are left out, because no row of a table names them: b/0.png, b/1.png" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_folder_may_lie_among_the_data(layout: str, tmp_path: Path):
    data, output = tmp_path / "photos", tmp_path / "photos" / "runs" / "first"
    data.mkdir()
    LAYOUTS[layout](data)
    sidecars(output / "images", end=", as drawn\n")
    csv(output / "table.csv")
    for exclude in (output, str(data / "runs" / ".." / "runs" / "first")):
        examples = open_examples(data, exclude=exclude)
        assert examples.count == COUNT and list(examples.captions()) == CAPTIONS
    with pytest.raises(ValueError, match=r"photos is the folder of the data and of the output too, .* output_dir"):
        open_examples(data, exclude=data)


def test_a_split_that_a_folder_does_not_have_is_not_the_whole_of_it(tmp_path: Path):
    for split in ("train", "test"):
        sidecars(tmp_path / split, end=f", {split}")
    assert list(open_examples(tmp_path, split="test").captions()) == [f"{caption}, test" for caption in CAPTIONS]
    with pytest.raises(ValueError, match="has no split 'validation', which is a sub-folder"):
        open_examples(tmp_path, split="validation")


def test_a_table_is_a_data_set_too(tmp_path: Path):
    images(tmp_path)
    csv(tmp_path / "mine.csv", "photo,words")
    examples = open_examples(tmp_path / "mine.csv", image_column="photo", caption_column="words")
    assert list(examples.captions()) == CAPTIONS


def test_each_line_of_a_caption_file_is_a_caption_and_only_a_newline_ends_one(tmp_path: Path):
    images(tmp_path)
    for name in NAMES:
        (tmp_path / name).with_suffix(".txt").write_text("one\u2028still one\x0b\x85\n\n two \n", encoding="utf-8")
    assert open_examples(tmp_path)[0].captions == ("one\u2028still one", "two")


def epoch(examples, **framing) -> list[str]:
    loader = PairLoader(examples, Framing(16, multiple_of=16, **framing), batch_size=1, num_workers=0)
    found = [example.caption for batch in loader for example in batch]
    assert len(found) == len(loader)
    return found


def test_the_number_of_a_kohya_folder_repeats_its_images(tmp_path: Path):
    sidecars(tmp_path / "4_red")
    images(tmp_path / "2_blue cat")
    found = epoch(open_examples(tmp_path))
    assert {text: found.count(text) for text in set(found)} == {"blue cat": 2 * COUNT, **dict.fromkeys(CAPTIONS, 4)}


def test_a_date_before_the_name_of_a_folder_is_no_number_of_repeats(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    for name in ("20240131_summer", "2024_winter", "3_red"):
        sidecars(tmp_path / name)
    assert [weight for _, weight in open_examples(tmp_path).weights] == [1.0, 3.0]
    assert "3_red: each of 3 images comes 3 times in an epoch" in caplog.text


def test_folders_are_mixed_by_their_weights(tmp_path: Path):
    sidecars(tmp_path / "one")
    sidecars(tmp_path / "two", end=", again")
    found = epoch(open_examples({str(tmp_path / "one"): 2, tmp_path / "two": 1}))
    assert sorted(found) == sorted([*CAPTIONS, *CAPTIONS, *(f"{caption}, again" for caption in CAPTIONS)])
    as_text = json.dumps({str(tmp_path / "one"): 2, str(tmp_path / "two"): 1})
    assert epoch(open_examples(as_text)) == found
    assert open_examples([tmp_path / "one", tmp_path / "two"]).count == 2 * COUNT
    for wrong in (0, -1, float("nan"), True, "2", 1e9):
        with pytest.raises(ValueError, match="each data set needs a weight, a positive number up to 1000"):
            open_examples({tmp_path / "one": wrong})


def test_a_weight_that_is_no_whole_number_takes_all_images_in_turn(tmp_path: Path):
    sidecars(tmp_path)
    loader = PairLoader(open_examples({tmp_path: 4 / 3}), Framing(16, multiple_of=16), batch_size=1, num_workers=0)
    epochs = [[example.caption for batch in loader for example in batch] for _ in range(COUNT)]
    assert [len(found) for found in epochs] == [4, 4, 4] == [len(loader)] * 3
    assert sorted(caption for found in epochs for caption in found) == sorted(4 * CAPTIONS)


def test_an_image_without_caption_is_broken_and_the_rest_is_read(tmp_path: Path):
    sidecars(tmp_path)
    (tmp_path / "1.txt").write_text(" \n")
    loader = PairLoader(
        open_examples(tmp_path), Framing(16, multiple_of=16), batch_size=COUNT, num_workers=0, max_broken=1
    )
    (batch,) = loader
    assert {example.caption for example in batch} == {CAPTIONS[0], CAPTIONS[2]}


def test_half_a_character_makes_a_caption_none(tmp_path: Path):
    images(tmp_path)
    table = rows()
    table[1]["text"] = "a cat \ud83d"
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    examples = open_examples(tmp_path)
    assert [examples[number].captions for number in range(COUNT)] == [(CAPTIONS[0],), (), (CAPTIONS[2],)]


def test_what_is_not_recognised_is_shown_with_an_example_that_works(tmp_path: Path):
    images(tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"images but no captions .* 3 \.png, 1 \.csv .*0\.png.*0\.txt for 0\.png"):
        open_examples(tmp_path)
    (tmp_path / "0.txt").write_text("a cat on a mat")  # the example
    assert list(open_examples(tmp_path).captions()) == ["a cat on a mat"]


def test_a_folder_of_texts_alone_is_not_taken_for_data(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"no images that can be recognised: found 1 \.txt \(a\.txt\)"):
        open_examples(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"file_name,text\n0.png,a cat\n1.png,\xe9t\xe9\n",
            "line 3 of .*metadata.csv is not UTF-8 text; save the file",
        ),
        ("file_name,text\n0.png,a cat\n".encode("utf-16"), "line 1 of .*metadata.csv is not UTF-8 text"),
        (b"file_name,text\n0.png,a cat, a dog\n", "line 2 of .*metadata.csv has more fields than the heading"),
        (b"number,text\n0,a cat\n", "every row of .*metadata.csv must name an image file, .* but line 2 is"),
        (b"file_name,text\n7.png,a cat\n", r"names 1 of 1 files that do not exist: 7.png \(line 2\)"),
        (b"file_name,text,\n0.png,a cat, a dog\n", "line 2 of .*metadata.csv has more fields than the heading"),
        (b'file_name,text\n0.png,"a cat\n', "line 2 of .*metadata.csv cannot be read: unexpected end of data"),
        (b"file_name,text,text\n0.png,a cat,a dog\n", "the heading of .*metadata.csv has the column 'text' twice"),
        (b"file_name,text\n", "the training data is empty"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_its_line(text: bytes, message: str, tmp_path: Path):
    images(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_examples(tmp_path)


def test_a_caption_file_in_another_encoding_is_named_with_its_line(tmp_path: Path):
    sidecars(tmp_path)
    (tmp_path / "1.txt").write_bytes("a cat\nété".encode("latin-1"))
    with pytest.raises(UnreadableText, match=r"line 2 of .*1\.txt is not UTF-8 text"):
        open_examples(tmp_path)


def test_lines_are_read_with_and_without_a_byte_order_mark(tmp_path: Path):
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + "é\r\n\x0c\u2028\n\nlast".encode())
        assert read_lines(tmp_path / "a.txt") == ["é", "\x0c\u2028", "", "last"]


def test_a_path_that_is_not_there_is_refused_without_asking_the_hub(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        open_examples(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["photos", "user/photos"])
def test_a_name_that_is_neither_folder_nor_data_set_is_named_as_both(name: str, monkeypatch: pytest.MonkeyPatch):
    def absent(*_args: Any, **_settings: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(ValueError, match=rf"there is no folder {name}, and no data set .* \(Dataset .* doesn't exist"):
        open_examples(name)
