"""Laws of data sets: however one is stored, the same examples come out; what is wrong is said before training."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from diffusers_softrepa.training import ContrastiveFlowMatchingArguments, check_run
from diffusers_softrepa.training.data.dataset import LONGEST_CAPTION, open_examples
from diffusers_softrepa.training.data.image import content_id, decode, fetch

COUNT = 7
IMAGES = [Image.new("RGB", (6, 4), (10 * number, 0, 0)) for number in range(COUNT)]
CAPTIONS = [[f"a shade of red, number {number}", f"red {number}"] for number in range(COUNT)]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_folder(folder, rows=None):
    for number, image in enumerate(IMAGES):
        image.save(folder / f"{number}.png")
    rows = rows or [{"file_name": f"{number}.png", "text": CAPTIONS[number]} for number in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def write_shards(folder, captions=lambda number: ("json", {"captions": CAPTIONS[number]})):
    for shard, numbers in (("a", range(4)), ("b", range(4, COUNT))):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in numbers:
                extension, text = captions(number)
                text = text if isinstance(text, str) else json.dumps(text)
                for name, data in ((f"{number:04}.png", png(IMAGES[number])), (f"{number:04}.{extension}", text)):
                    data = data if isinstance(data, bytes) else data.encode()
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def table():
    rows = [{"image": {"bytes": png(IMAGES[n]), "path": None}, "text": CAPTIONS[n]} for n in range(COUNT)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


class Pairs:
    """A map-style data set of pairs, as torchvision's captions are."""

    def __len__(self):
        return COUNT

    def __getitem__(self, number):
        return IMAGES[number], CAPTIONS[number]


def read_all(examples, block_size=3):
    blocks = list(examples.blocks(block_size=block_size))
    assert [block.start for block in blocks] == [sum(len(b.examples) for b in blocks[:n]) for n in range(len(blocks))]
    read = [block.examples[place] for block in blocks for place in range(len(block.examples))]
    assert [example.number for example in read] == list(range(len(read)))
    return read


SOURCES = {
    "rows": lambda folder: open_examples([{"image": IMAGES[n], "text": CAPTIONS[n]} for n in range(COUNT)]),
    "pairs": lambda folder: open_examples(Pairs()),
    "table": lambda folder: open_examples(table()),
    "formatted table": lambda folder: open_examples(table().with_format("numpy")),
    "transformed table": lambda folder: open_examples(table().with_transform(lambda batch: batch)),
    "stream": lambda folder: open_examples(table().to_iterable_dataset(num_shards=2)),
    "generator": lambda folder: open_examples(
        datasets.IterableDataset.from_generator(
            lambda: ({"image": IMAGES[number], "text": CAPTIONS[number]} for number in range(COUNT))
        )
    ),
    "folder": lambda folder: open_examples(write_folder(folder)),
    "folder, several columns": lambda folder: open_examples(
        write_folder(
            folder, [{"file_name": f"{n}.png", "a": CAPTIONS[n][0], "b": CAPTIONS[n][1]} for n in range(COUNT)]
        ),
        caption_column=["a", "b"],
    ),
    "shards": lambda folder: open_examples(write_shards(folder), caption_column="json.captions"),
    "shards, prepared": lambda folder: open_examples(
        str(write_shards(folder) / "*.tar"), caption_column="json.captions", streaming=False
    ),
    "list of shards": lambda folder: open_examples(
        [write_shards(folder) / "a.tar", folder / "b.tar"], caption_column="json.captions"
    ),
    "saved table": lambda folder: (table().save_to_disk(folder / "saved"), open_examples(folder / "saved"))[1],
    "parquet": lambda folder: (table().to_parquet(folder / "train.parquet"), open_examples(folder))[1],
    "parquet stream": lambda folder: (
        table().to_parquet(folder / "train.parquet"),
        open_examples(str(folder), streaming=True),
    )[1],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("source", SOURCES)
def test_however_a_data_set_is_stored_the_examples_are_the_same(source, tmp_path):
    examples = SOURCES[source](tmp_path)
    read = read_all(examples)
    assert [list(example.captions) for example in read] == CAPTIONS
    assert [decode(fetch(example.image)).tobytes() for example in read] == [image.tobytes() for image in IMAGES]
    assert len({content_id(fetch(example.image)) for example in read}) == COUNT
    assert all(example.negative_captions == () for example in read)
    assert list(examples.captions()) == [text for texts in CAPTIONS for text in texts]
    assert examples.count in (None, COUNT)
    assert read_all(examples)[3].captions == read[3].captions  # once more


@pytest.mark.parametrize("source", ["table", "stream", "shards", "parquet stream"])
def test_images_are_not_decoded_by_the_data_set(source, tmp_path):
    assert all(isinstance(example.image["bytes"], bytes) for example in read_all(SOURCES[source](tmp_path)))


def test_text_shards_are_read_by_their_extension(tmp_path):
    write_shards(tmp_path, lambda number: ("txt", f" {CAPTIONS[number][0]}\n"))
    examples = open_examples(tmp_path)
    assert [example.captions for example in read_all(examples)] == [(texts[0],) for texts in CAPTIONS]
    assert "0003.png" in read_all(examples)[3].name


def test_a_seed_draws_the_order_of_the_shards_of_a_stream():
    examples = open_examples(table().to_iterable_dataset(num_shards=COUNT))
    orders = [[block.examples[0].captions for block in examples.blocks(block_size=1, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(map(tuple, CAPTIONS))


def test_hard_negatives_come_from_the_column_that_is_named_and_from_no_other():
    rows = [{"image": IMAGES[0], "text": "red", "negative_captions": ["green", "blue", ""]}]
    assert read_all(open_examples(rows))[0].negative_captions == ()
    examples = open_examples(rows, negative_caption_column="negative_captions")
    assert read_all(examples)[0].negative_captions == ("green", "blue")
    assert list(examples.captions()) == ["red", "green", "blue"]


def test_empty_captions_are_left_out_and_the_others_stripped():
    rows = [{"image": IMAGES[0], "text": ["", None, " red\n", "  "]}, {"image": IMAGES[1], "text": None}]
    assert [example.captions for example in read_all(open_examples(rows))] == [("red",), ()]


def test_captions_and_negatives_longer_than_text_encoders_read_are_cut():
    long = "a red cat, " * 10_000
    rows = [{"image": RED, "text": [long, "red"], "no": f"  {long}"}]
    (example,) = read_all(open_examples(rows, negative_caption_column="no"))
    assert example.captions == (long[:LONGEST_CAPTION], "red")
    assert example.negative_captions == (long[:LONGEST_CAPTION],)
    assert LONGEST_CAPTION >= 16 * 1024  # of 1,024 tokens, the most that a family reads, few have 16 characters


def test_every_caption_is_named_once_for_the_text_cache():
    rows = [{"image": image, "text": ["red", f"{n}"]} for n, image in enumerate(IMAGES)]
    assert list(open_examples(rows).captions()) == ["red", *map(str, range(COUNT))]


def test_too_many_images_without_a_caption_are_told_before_a_model_is_loaded():
    table = [{"image": pixels, "text": f"a cat {n}" if n % 3 else " "} for n in range(9) for pixels in [b"x"]]
    args = ContrastiveFlowMatchingArguments(resolution=16, report_to="none", max_broken=0.3)
    assert open_examples(table).without_caption() == ["example 0", "example 3", "example 6"]
    assert check_run(args, table)[0].count == 9
    args.max_broken = 0.2
    with pytest.raises(
        ValueError, match=r"3 of 9 images have no caption .* max_broken=0\.2, such as example 0; write"
    ):
        check_run(args, table)


def test_what_a_data_set_cannot_read_is_handed_on_as_its_error():
    class Damaged(Pairs):
        def __getitem__(self, number):
            if number == 2:
                raise OSError("bad sector")
            return super().__getitem__(number)

    example = read_all(open_examples(Damaged()))[2]
    assert isinstance(example.image, OSError) and example.captions == () and example.name == "example 2"


def test_separators_inside_a_caption_do_not_end_a_line_of_metadata(tmp_path):
    write_folder(tmp_path)
    rows = [{"file_name": "0.png", "text": "one\u2028two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert read_all(open_examples(tmp_path))[0].captions == ("one\u2028two",)


RED = Image.new("RGB", (4, 4), "red")


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "the training data is empty"),
        (datasets.Dataset.from_dict({"image": [], "text": []}), {}, ValueError, "the training data is empty"),
        (
            [{"image": RED, "label": 1}],
            {},
            ValueError,
            r"no caption column of a usual name; its columns are \['image'",
        ),
        ([{"photo": RED, "text": "a"}], {}, ValueError, r"no image column .* choose with image_column=\.\.\."),
        ([{"image": RED, "text": "a", "caption": "b"}], {}, ValueError, "several caption columns"),
        (
            [{"image": RED, "text": "a"}],
            {"caption_column": "prompt"},
            ValueError,
            "has no column 'prompt'; its columns",
        ),
        ([{"image": RED, "text": "a"}], {"negative_caption_column": "no"}, ValueError, "has no column 'no'"),
        ([{"image": RED, "text": "a"}, {"image": RED}], {}, ValueError, "example 1 has no column 'text', only"),
        ([{"image": RED, "text": 3}], {}, TypeError, "captions must be strings .* column 'text' of example 0 holds 3"),
        ([{"image": RED, "text": "a"}, {"image": RED, "text": ["a", 1]}], {}, TypeError, "of example 1 holds"),
        ([{"image": 3, "text": "a"}], {}, TypeError, "images must be bytes, paths"),
        (["a", "b"], {}, TypeError, "examples must be dicts of columns or pairs"),
        (iter([]), {}, TypeError, "training data must be a data set, a path, a name, or a list of dicts"),
        (datasets.DatasetDict(train=table(), test=table()), {}, TypeError, r"give one split .* data\['train'\]"),
        ("/nowhere/*.tar", {}, ValueError, r"no webdataset shard is at /nowhere/\*.tar"),
    ],
)
def test_bad_input_is_refused_at_once(data, options, error, message):
    with pytest.raises(error, match=message):
        open_examples(data, **options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"file_name": "0.png", "text": "a"}', "{"], "line 2 of .*metadata.jsonl is not JSON"),
        (['{"text": "a"}'], r"every row of .* must name an image file, as \{\"file_name\": .* but line 1 is"),
        (["[1]"], "must name an image file, as .* does, but line 1 is"),
        (
            [json.dumps({"file_name": f"{n}.png", "text": "a"}) for n in range(0, 2 * COUNT, 2)],
            r"names 3 of 7 files that do not exist: 8.png \(line 5\), 10.png",
        ),
        ([""], "the training data is empty"),
    ],
)
def test_bad_metadata_is_refused_at_once(lines, message, tmp_path):
    write_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        open_examples(tmp_path)


def test_a_tar_beside_images_is_not_taken_for_their_place(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a cat")
    (tmp_path / "backup.tar").write_bytes(b"")
    assert list(open_examples(tmp_path).captions()) == ["a cat"]
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"one of 1 shards, from .*backup\.tar on, is no whole tar file"):
        open_examples(tmp_path)


def test_a_stored_split_that_is_not_there_is_named(tmp_path):
    rows = datasets.Dataset.from_list([{"image": {"bytes": b"x", "path": None}, "text": "a cat"}])
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "stored"))
    with pytest.raises(ValueError, match="has no split 'test', only train; name one of them"):
        open_examples(tmp_path / "stored", split="test")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is empty; put images and a metadata.jsonl there"):
        open_examples(Path(tmp_path))


def test_a_data_set_whose_first_image_is_broken_opens():
    rows = [{"image": {"bytes": b"broken", "path": None}, "text": "a"}, {"image": {"bytes": png(RED)}, "text": "b"}]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert open_examples(data).count == 2
    assert len(read_all(open_examples(data.to_iterable_dataset()))) == 2
