"""Laws of batches: they depend on seed, epoch and data alone, at every position and for any number of processes."""

import io
import logging
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffusers_softrepa.training.data import loader as loader_module
from diffusers_softrepa.training.data.cache import TensorCache
from diffusers_softrepa.training.data.dataset import open_examples
from diffusers_softrepa.training.data.image import Framing
from diffusers_softrepa.training.data.loader import PairLoader
from diffusers_softrepa.training.data.sampler import Slot, draw, draw_uniform

COUNT = 14
SQUARE = Framing(16, multiple_of=8, random_crop=True, flip=True)
BUCKETS = Framing(32, aspect_buckets=True, multiple_of=8, random_crop=True)
DRAWS = np.random.default_rng(0)


def png(height, width):
    file = io.BytesIO()
    Image.fromarray(DRAWS.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


SHAPES = [(20, 20), (18, 40), (40, 18), (22, 20)]
ROWS = [
    {
        "image": {"bytes": png(*SHAPES[number % 4]), "path": f"{number}.png"},
        "text": [f"{number} {k}" for k in range(3)],
        "negative_captions": [f"not {number}"] * (number % 3),
    }
    for number in range(COUNT)
]


def broken(*numbers):
    def cut(image):
        return {**image, "bytes": image["bytes"][:90]}

    return [{**row, "image": cut(row["image"])} if number in numbers else row for number, row in enumerate(ROWS)]


def stored(rows=ROWS):
    return open_examples(rows, negative_caption_column="negative_captions")


def streamed(rows=ROWS):
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    return open_examples(table.to_iterable_dataset(num_shards=2), negative_caption_column="negative_captions")


def loader(examples=None, framing=SQUARE, **options):
    options = {"batch_size": 3, "seed": 5, "num_workers": 0, "shuffle_buffer": 6, **options}
    return PairLoader(stored() if examples is None else examples, framing, **options)


KINDS = {
    "stored": loader,
    "stored, buckets": lambda **options: loader(framing=BUCKETS, **options),
    "stream": lambda **options: loader(streamed(), **options),
    "stream, buckets": lambda **options: loader(streamed(), BUCKETS, **options),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def numbers(batches):
    return [int(caption.split()[0]) for batch in batches for caption in captions(batch)]


def captions(batch):
    return [example.caption for example in batch]


def names(batch):
    return [example.name for example in batch]


def pixels(batch):
    return torch.stack([example.pixels for example in batch])


def image_ids(batch):
    return [example.image_id for example in batch]


def size(batch):
    (found,) = {example.size for example in batch}
    return found


def assert_equal(batches, others):
    for batch, other_batch in zip(batches, others, strict=True):
        for one, other in zip(batch, other_batch, strict=True):
            assert (one.caption, one.negative_captions, one.name) == (
                other.caption,
                other.negative_captions,
                other.name,
            )
            assert (one.size, one.image_id) == (other.size, other.image_id)
            assert torch.equal(one.pixels, other.pixels)


def test_draws_are_what_they_have_always_been():
    assert draw(1, 2, "caption") == 304941413041409988
    assert draw_uniform(1, 2, "crop") == draw_uniform(1, 2, "crop") != draw_uniform(1, 3, "crop")
    values = torch.tensor([draw_uniform(0, number) for number in range(1000)])
    assert 0 <= values.min() < 0.01 and 0.99 < values.max() < 1 and abs(values.mean() - 0.5) < 0.02


def test_a_batch_has_what_it_says():
    batch = next(iter(loader()))
    assert len(batch) == 3
    assert pixels(batch).shape == (3, 3, 16, 16) and pixels(batch).dtype == torch.float32 and size(batch) == (16, 16)
    assert pixels(batch).min() >= -1 and pixels(batch).max() <= 1
    for example, number in zip(batch, numbers([batch]), strict=True):
        assert example.latents is None and example.image is None
        assert example.caption in ROWS[number]["text"]
        assert list(example.negative_captions) == ROWS[number]["negative_captions"]
        assert example.name == f"example {number} ({number}.png)"
    assert all(0 <= identity < 2**63 for identity in image_ids(batch)) and len(set(image_ids(batch))) == 3


@every_kind
def test_the_same_seed_gives_the_same_batches_and_another_one_others(make):
    assert_equal(list(make()), list(make()))
    assert numbers(make()) != numbers(make(seed=6))


@every_kind
def test_threads_change_nothing(make):
    plain, threaded = make(), make(num_workers=3)
    for _ in range(2):
        assert_equal(list(plain), list(threaded))


@pytest.mark.parametrize(
    "make",
    [*KINDS.values(), lambda **options: loader(stored(broken(3, 7)), max_broken=2, **options)],
    ids=[*KINDS, "broken"],
)
def test_resumed_at_any_batch_the_rest_is_equal(make):
    whole = make()
    batches = [batch for _ in range(2) for batch in whole]
    for position in range(len(batches) + 1):
        interrupted, resumed = make(num_workers=2), make(num_workers=1)
        taken = 0
        while taken < position:
            for _ in interrupted:
                taken += 1
                if taken == position:
                    break
        resumed.load_state_dict(interrupted.state_dict())
        rest = [batch for _ in range(resumed.epoch, 2) for batch in resumed]
        assert_equal(rest, batches[position:])


@every_kind
def test_a_broken_off_epoch_goes_on_where_it_stood(make):
    interrupted = make(num_workers=2)
    batches = [next(iter(interrupted)), *interrupted]
    assert_equal(batches, list(make()))
    assert interrupted.epoch == 1 and interrupted.batches == 0


@every_kind
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_makes_the_same_global_batches(make, world_size):
    alone = make(batch_size=6 // world_size * world_size)
    ranks = [make(batch_size=6 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        batches = list(alone)
        shares = [list(rank) for rank in ranks]
        assert len(batches) > 0
        for batch, *parts in zip(batches, *shares, strict=True):
            assert captions(batch) == [caption for part in parts for caption in captions(part)]
            assert torch.equal(pixels(batch), torch.cat([pixels(part) for part in parts]))
            assert image_ids(batch) == [identity for part in parts for identity in image_ids(part)]


@every_kind
def test_every_image_is_in_an_epoch_once(make):
    for _ in range(2):
        assert sorted(numbers(make(batch_size=1))) == list(range(COUNT))
        dropped = numbers(make())
        assert len(set(dropped)) == len(dropped) >= COUNT - 3 * 2


@every_kind
def test_epochs_differ_in_order_and_caption(make):
    examples = make(batch_size=1)
    first, second = list(examples), list(examples)
    assert numbers(first) != numbers(second)
    drawn = [{int(text.split()[0]): text for batch in epoch for text in captions(batch)} for epoch in (first, second)]
    assert 0 < sum(drawn[0][number] != drawn[1][number] for number in range(COUNT)) < COUNT


@pytest.mark.parametrize("drawn", [{"random_crop": True}, {"flip": True}, {}], ids=["crop", "flip", "nothing"])
def test_crops_and_flips_are_drawn_anew_in_every_epoch(drawn):
    examples = loader(framing=Framing(16, multiple_of=8, **drawn), shuffle=False)
    (first, *_), (second, *_) = list(examples), list(examples)
    assert names(first) == names(second) and captions(first) != captions(second)
    assert torch.equal(pixels(first), pixels(second)) == (not drawn)


@pytest.mark.parametrize("framing", [SQUARE, BUCKETS], ids=["one size", "buckets"])
def test_in_stored_order_a_stream_gives_the_batches_of_a_table(framing):
    for batch_size in (1, 3):
        table, stream = (loader(make(), framing, shuffle=False, batch_size=batch_size) for make in (stored, streamed))
        for _ in range(2):
            assert_equal(list(table), list(stream))


def test_a_buffer_as_long_as_the_stream_mixes_all_of_it():
    stream = numbers(loader(streamed(), shuffle_buffer=100, batch_size=1))
    assert sorted(stream) == list(range(COUNT)) and max(stream[:7]) > 9 and min(stream[7:]) < 4


@pytest.mark.parametrize("kind", ["stored, buckets", "stream, buckets"])
def test_each_batch_is_of_one_bucket(kind):
    sizes = set()
    for batch in KINDS[kind]():
        assert pixels(batch).shape[-2:] == size(batch)
        assert size(batch) in BUCKETS.sizes
        for number in numbers([batch]):
            assert BUCKETS.sizes_of(SHAPES[number % 4]) == (size(batch),)
        sizes.add(size(batch))
    assert len(sizes) == 3


@every_kind
def test_the_length_is_the_number_of_batches(make):
    for options in ({}, {"batch_size": 1}, {"batch_size": 4}):
        examples = make(**options)
        if examples.order.size_counts is None:
            with pytest.raises(TypeError, match="the length of a stream shows at its end"):
                len(examples)
        else:
            assert len(examples) == len(list(examples))
            assert sum(examples.order.size_counts.values()) == COUNT


def test_the_table_of_buckets_is_announced_and_small_ones_warned_of(caplog):
    with caplog.at_level(logging.INFO):
        loader(framing=BUCKETS, batch_size=4)
    assert "aspect buckets, height x width: images: 24x40: 4, 32x32: 7, 40x24: 3" in caplog.text
    assert (
        "3 images are never used, because their aspect bucket holds fewer than a batch of 4: 40x24: 3" in caplog.text
    )


def test_skipped_batches_are_not_decoded(monkeypatch):
    decoded = []
    decode = loader_module.decode
    monkeypatch.setattr(loader_module, "decode", lambda image: decoded.append(image) or decode(image))
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "batches": 3})
    assert len(list(resumed)) == 1 and len(decoded) == 3


def test_a_position_saved_under_other_settings_is_refused():
    state = loader().state_dict()
    with pytest.raises(ValueError, match=r"saved under other settings .*'global_batch_size': \(3, 4\)"):
        loader(batch_size=4).load_state_dict(state)
    other = loader(batch_size=4, seed=9)
    other.load_state_dict({"epoch": 3, "batches": 0})
    assert (other.epoch, other.batches) == (3, 0)


# Broken examples.


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_whatever_replaces_an_example_is_tried_once_and_from_far_away_first(count):
    order = list(range(100, 100 + count))
    for place in range(count):
        candidates = list(Slot(None, order, place, (8, 8)).candidates())
        assert candidates[0] == order[place] and sorted(candidates) == order
        assert count == 1 or candidates[1] == order[(place + count // 2) % count]


@pytest.mark.parametrize("kind", ["stored", "stream"])
@pytest.mark.parametrize("framing", [SQUARE, BUCKETS], ids=["one size", "buckets"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_broken_image_is_replaced_counted_and_named_once(kind, framing, batch_size, caplog):
    make = {"stored": stored, "stream": streamed}[kind]
    options = {"max_broken": 2, "batch_size": batch_size}
    whole, damaged = (loader(make(rows), framing, **options) for rows in (ROWS, broken(3, 7)))
    for _ in range(2):
        batches, others = list(whole), list(damaged)
        assert len(damaged.broken.names) == len({3, 7} & set(numbers(batches))) >= 3 - batch_size
        for batch, other in zip(batches, others, strict=True):
            assert size(batch) == size(other) and len(batch) == len(other)
            for number, caption, replaced in zip(numbers([batch]), captions(batch), captions(other), strict=True):
                assert (caption == replaced) == (number not in (3, 7))
                assert replaced.split()[0] not in ("3", "7")
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == len(set(named))
    found = {message.partition("(")[2].partition(")")[0] for message in named}
    assert found == {"3.png", "7.png"} or (found < {"3.png", "7.png"} and batch_size > 1)
    assert all("is broken and skipped: it cannot be decoded" in message for message in named)


def test_a_broken_image_of_one_process_moves_no_row_of_another():
    alone = list(loader(stored(broken(3, 7)), batch_size=6, max_broken=2))
    ranks = [list(loader(stored(broken(3, 7)), rank=rank, world_size=2, max_broken=2)) for rank in range(2)]
    for batch, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(pixels(batch), torch.cat([pixels(part) for part in parts]))


def test_without_its_header_an_image_has_no_bucket_and_is_left_out():
    rows = [{**row, "image": {"bytes": b"?"}} if number == 4 else row for number, row in enumerate(ROWS)]
    for examples in (stored(rows), streamed(rows)):
        assert sorted(numbers(loader(examples, BUCKETS, max_broken=1, batch_size=1))) == [
            number for number in range(COUNT) if number != 4
        ]


def test_an_example_without_a_caption_is_broken(caplog):
    rows = [{**row, "text": [" "]} if number == 4 else row for number, row in enumerate(ROWS)]
    assert 4 not in numbers(loader(stored(rows), max_broken=1, batch_size=1))
    assert "example 4 is broken and skipped: it has no caption" in caplog.text.replace(" (4.png)", "")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [stored, streamed])
@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (2, 2), (0.01, 1), (0.5, 7)])
def test_more_broken_examples_than_allowed_are_an_error(limit, allowed, make, num_workers):
    options = {"max_broken": limit, "num_workers": num_workers, "shuffle_buffer": 100, "batch_size": 1}
    list(loader(make(broken(*range(allowed))), **options))
    with pytest.raises(ValueError, match=f"more than the {allowed} of max_broken={limit}; the last: example"):
        list(loader(make(broken(*range(allowed + 1))), **options))


def test_if_nothing_can_be_used_it_is_said():
    with pytest.raises(ValueError, match="none of 14 examples of size"):
        list(loader(stored(broken(*range(COUNT))), max_broken=1.0))


def test_wrong_types_in_the_middle_of_a_stream_are_an_error_and_not_a_skip():
    def rows():
        yield from ({"image": Image.new("RGB", (4, 4)), "text": text} for text in ("a", "b", 3))

    examples = open_examples(datasets.IterableDataset.from_generator(rows))
    with pytest.raises(TypeError, match="captions must be strings"):
        list(PairLoader(examples, SQUARE, batch_size=1, num_workers=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_broken": 1.5}, "max_broken must be a share"),
        ({"batch_size": 15}, "a batch of all processes holds 15 images of one size, but there are only 16x16: 14"),
        ({"batch_size": 8, "framing": BUCKETS}, "there are only 24x40: 4, 32x32: 7, 40x24: 3; use a smaller batch"),
    ],
)
def test_settings_that_make_no_batch_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


@pytest.mark.parametrize("framing", [SQUARE, BUCKETS], ids=["one size", "buckets"])
def test_a_stream_too_short_for_a_batch_is_an_error_and_not_an_endless_epoch(framing):
    with pytest.raises(ValueError, match="the stream ended before it filled a batch of 15"):
        list(loader(streamed(), framing, batch_size=15))


def test_no_thread_is_left_behind():
    before = set(threading.enumerate())
    examples = loader(num_workers=3)
    iterator = iter(examples)
    next(iterator)
    started = set(threading.enumerate()) - before  # other threads of the process may end in between
    assert started
    iterator.close()
    assert not [thread.name for thread in started if thread.is_alive()]


# Latents from a cache.


def encode(pixels):
    return {"mean": pixels.mean((2, 3)), "corner": pixels[:, :, :2, :2]}


@pytest.mark.parametrize("framing", [SQUARE, BUCKETS], ids=["one size", "buckets"])
def test_cached_latents_are_those_of_the_pixels_of_epoch_zero(framing, tmp_path, monkeypatch):
    cache = TensorCache(tmp_path, {"framing": framing.settings(5)})
    plain, cached = loader(framing=framing), loader(framing=framing, latents=cache)
    assert cached.fill_latents(encode) == COUNT
    assert cached.fill_latents(encode) == 0
    epochs = [list(plain), list(plain)]
    monkeypatch.setattr(loader_module, "decode", None)  # nothing is decoded
    for epoch in range(2):
        for batch, other in zip(epochs[epoch], cached, strict=True):
            assert (captions(batch), names(batch), size(batch)) == (captions(other), names(other), size(other))
            assert image_ids(batch) == image_ids(other)
            assert all(example.pixels is None for example in other)
            if epoch == 0:
                latents = {key: torch.stack([row.latents[key] for row in other]) for key in other[0].latents}
                assert_close(latents, encode(pixels(batch)))


def test_the_same_image_in_several_rows_is_encoded_once(tmp_path):
    rows = [{"image": ROWS[number % 3]["image"], "text": str(number)} for number in range(9)]
    assert loader(open_examples(rows), latents=TensorCache(tmp_path, {})).fill_latents(encode) == 3


def test_a_broken_image_is_left_out_of_the_cache_and_replaced_like_without_one(tmp_path):
    cache, examples = TensorCache(tmp_path, {}), stored(broken(3))
    plain, cached = (loader(examples, max_broken=1, latents=latents) for latents in (None, cache))
    assert cached.fill_latents(encode) == COUNT - 1
    assert [captions(batch) for batch in plain] == [captions(batch) for batch in cached]
    with pytest.raises(ValueError, match=r"1 of about 14 examples are broken, more than the 0"):
        loader(examples, max_broken=0, latents=TensorCache(tmp_path, {"other": 1})).fill_latents(encode)


def test_several_processes_fill_a_cache_together(tmp_path):
    caches = [TensorCache(tmp_path, {}) for _ in range(2)]
    counts = [
        loader(framing=BUCKETS, batch_size=1, latents=cache, rank=rank, world_size=2).fill_latents(encode)
        for rank, cache in enumerate(caches)
    ]
    assert sum(counts) == COUNT and min(counts) > 0
    assert len(list(loader(framing=BUCKETS, latents=caches[0], max_broken=0))) == len(loader(framing=BUCKETS))


def test_a_stream_has_no_cache_of_latents(tmp_path):
    with pytest.raises(ValueError, match="a cache of latents needs a data set of known length"):
        loader(streamed(), latents=TensorCache(tmp_path, {})).fill_latents(encode)
