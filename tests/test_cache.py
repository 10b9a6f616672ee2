"""Laws of the cache: it holds the numbers and no more, whole or not at all, within its bound, under its settings."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_softrepa import files as files_module
from diffusers_softrepa.training.data import cache as cache_module
from diffusers_softrepa.training.data.cache import CacheTooLarge, TensorCache, estimate, model_fingerprint

NAMES = [f"a caption, number {number}" for number in range(10)]


def entry(name):
    generator = torch.Generator().manual_seed(NAMES.index(name))
    return {
        "hidden": torch.randn(7, 16, generator=generator).to(torch.bfloat16),
        "mask": torch.arange(7) < NAMES.index(name),
    }


def compute(names):
    return {name: entry(name) for name in names}


def files(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path, {"model": "tiny"})


def test_what_is_put_is_got(cache):
    assert cache.get(NAMES[0]) is None and NAMES[0] not in cache
    cache.put(NAMES[0], entry(NAMES[0]))
    assert NAMES[0] in cache
    assert_close(cache.get(NAMES[0]), entry(NAMES[0]))
    cache.put(NAMES[0], entry(NAMES[1]))
    assert_close(cache.get(NAMES[0]), entry(NAMES[1]))


def test_other_settings_are_another_cache(cache, tmp_path):
    cache.put(NAMES[0], entry(NAMES[0]))
    assert NAMES[0] in TensorCache(tmp_path, {"model": "tiny"})
    assert NAMES[0] not in TensorCache(tmp_path, {"model": "tiny", "dtype": torch.float16})
    assert '"model": "tiny"' in (cache.folder / "settings.json").read_text()


@pytest.mark.parametrize(
    "view",
    [
        lambda batch: batch[3],
        lambda batch: batch[:, :, 0, 0],
        lambda batch: batch[3].transpose(0, 2),
        lambda batch: batch[0, 0, 0, :1].expand(500),
    ],
    ids=["row", "column", "transposed", "expanded"],
)
def test_a_file_is_as_large_as_its_numbers(cache, view):
    stored = view(torch.randn(64, 4, 32, 32))
    cache.put("view", {"latents": stored, "again": stored})
    (file,) = files(cache.folder)
    assert 0 < file.stat().st_size - 2 * stored.numel() * 4 <= 256
    assert_close(cache.get("view"), {"latents": stored, "again": stored})


def test_a_got_tensor_holds_no_more_than_its_file(cache):
    cache.put("row", {"latents": torch.randn(64, 1000)[3]})
    assert cache.get("row")["latents"].untyped_storage().nbytes() <= files(cache.folder)[0].stat().st_size


def test_any_text_is_a_name(cache):
    for name in ("", "../up", "a/b\0c", "\N{GRINNING FACE}" * 500):
        cache.put(name, {"x": torch.ones(1)})
        assert name in cache
    assert all(file.parent.parent == cache.folder for file in files(cache.folder))


def test_fill_computes_what_is_missing_once_and_in_batches(cache):
    cache.put(NAMES[1], entry(NAMES[1]))
    asked = []
    written = cache.fill(NAMES + NAMES[:3], lambda names: asked.append(names) or compute(names), batch_size=4)
    assert (
        written == 9 and [len(names) for names in asked] == [4, 4, 1] and all(NAMES[1] not in names for names in asked)
    )
    assert cache.missing(NAMES) == [] and cache.missing(["new", NAMES[0], "new"]) == ["new"]
    for name in NAMES:
        assert_close(cache.get(name), entry(name))
    assert cache.fill(NAMES, pytest.fail, batch_size=4) == 0


def test_processes_share_the_filling(cache):
    assert [cache.fill(NAMES, compute, batch_size=4, rank=rank, world_size=3) for rank in range(3)] == [4, 3, 3]


def test_what_cannot_be_computed_is_left_out(cache):
    def without_the_first(names):
        return {name: entry(name) for name in names if name != NAMES[0]}

    assert cache.fill(NAMES, without_the_first, batch_size=3) == 9
    assert cache.missing(NAMES) == [NAMES[0]]


# The bound.


def test_the_estimate_is_announced_and_holds(cache, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cache.fill(NAMES, compute, batch_size=4)
    assert len(caplog.records) == 1
    assert "10 entries of 4.1 KB take 41 KB; 0 B are in" in caplog.text and "free" in caplog.text
    meta = {"hidden": torch.empty(7, 16, dtype=torch.bfloat16, device="meta"), "mask": torch.empty(7, device="meta")}
    used = sum(file.stat().st_blocks * 512 for file in files(tmp_path))
    assert estimate(meta, 10) == cache.num_bytes() == 40960
    assert used in (0, 40960)  # a file system may keep small files elsewhere


def test_the_bound_holds_when_the_cache_is_filled_step_by_step(tmp_path, monkeypatch):
    bounded, counted = TensorCache(tmp_path, {}, max_cache_bytes=5 * 4096), []
    count = bounded.num_bytes
    monkeypatch.setattr(TensorCache, "num_bytes", lambda cache: counted.append(cache) or count())
    for name in NAMES[:5]:
        bounded.fill([name], compute, batch_size=4)
    with pytest.raises(CacheTooLarge, match=r"the cache may take 20\.5 KB, but 1 entries"):
        bounded.fill(NAMES[5:6], compute, batch_size=4)
    assert bounded.fill(NAMES[:5], pytest.fail, batch_size=4) == 0
    assert len(counted) == 1  # not a look through the whole cache at every step


def test_a_cache_above_its_bound_is_refused_before_anything_is_written(tmp_path):
    bounded = TensorCache(tmp_path, {}, max_cache_bytes=40959)
    with pytest.raises(CacheTooLarge, match=r"may take 41 KB, but 10 entries .* raise max_cache_gigabytes, "):
        bounded.fill(NAMES, compute, batch_size=4)
    assert files(tmp_path) == []
    assert bounded.fill(NAMES[:9], compute, batch_size=4) == 9


def test_the_bound_counts_what_other_settings_left(cache, tmp_path):
    cache.fill(NAMES, compute, batch_size=4)
    with pytest.raises(CacheTooLarge, match="the cache may take 50 KB"):
        TensorCache(tmp_path, {"other": 1}, max_cache_bytes=50_000).fill(NAMES, compute, batch_size=4)


def test_a_cache_larger_than_the_free_disk_is_refused(cache, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 9000, 9000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheTooLarge, match=r"take 41 KB, but .* the disk has 9 KB free; choose another disk"):
        cache.fill(NAMES, compute, batch_size=4)
    assert files(cache.folder) == []


# Interruption and damage.


def test_a_full_disk_is_a_clear_error_and_leaves_whole_entries(cache, monkeypatch):
    cache.fill(NAMES[:2], compute, batch_size=1)

    @contextmanager
    def full(path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        Path(path).unlink()
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "whole_file", full)
        with pytest.raises(OSError, match=r"the disk is full: .* what is there stays") as caught:
            cache.fill(NAMES, compute, batch_size=1)
    assert caught.value.errno == errno.ENOSPC
    assert len(files(cache.folder)) == 2 and list(cache.folder.rglob("*.partial")) == []
    assert cache.fill(NAMES, compute, batch_size=4) == 8


FILL_FOREVER = """
import sys, torch
from diffusers_softrepa.training.data.cache import TensorCache
print("ready", flush=True)
def compute(names):
    return {name: {"x": torch.full((50_000,), float(name))} for name in names}
TensorCache(sys.argv[1], {"model": "tiny"}).fill(map(str, range(3000)), compute, batch_size=1)
"""


def test_killed_in_the_middle_it_holds_whole_entries_and_goes_on(cache, tmp_path):
    command = [sys.executable, "-c", FILL_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while len(files(tmp_path)) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    names = [str(number) for number in range(3000)]
    missing = cache.missing(names)
    whole = len(files(tmp_path))
    assert 20 <= whole < 3000 and len(missing) == 3000 - whole
    for name in set(names) - set(missing):
        assert torch.equal(cache.get(name)["x"], torch.full((50_000,), float(name)))
    asked = []
    cache.fill(
        names[: whole + 5],
        lambda batch: asked.extend(batch) or {name: {"x": torch.ones(1)} for name in batch},
        batch_size=9,
    )
    assert asked == missing[:5]


def test_a_damaged_file_counts_as_missing_and_is_made_anew(cache, caplog):
    cache.fill(NAMES, compute, batch_size=4)
    damaged = files(cache.folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    files(cache.folder)[1].write_bytes(b"")
    missing = cache.missing(NAMES)
    assert len(missing) == 2 and cache.get(missing[0]) is None
    assert "is damaged" in caplog.text and "counts as missing" in caplog.text
    assert cache.fill(NAMES, compute, batch_size=4) == 2
    assert_close(cache.get(missing[0]), entry(missing[0]))


def test_what_a_killed_process_left_is_removed_when_it_is_old(cache):
    (cache.folder / "ab").mkdir()
    old, new = cache.folder / "ab" / "old.partial", cache.folder / "ab" / "new.partial"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.fill(NAMES, compute, batch_size=4)
    assert not old.exists() and new.exists()


# Models.


def text_encoder(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=8, **sizes, **settings))


def test_a_fingerprint_is_that_of_the_model():
    encoder = text_encoder()
    same = model_fingerprint(encoder)
    assert same == model_fingerprint(text_encoder()) == model_fingerprint(encoder.eval())
    others = {
        "config": model_fingerprint(text_encoder(layer_norm_eps=1e-3)),
        "dtype": model_fingerprint(text_encoder().to(torch.bfloat16)),
        "class": model_fingerprint(nn.Linear(2, 2)),
    }
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.01)
    others["weights"] = model_fingerprint(encoder)
    assert len({same, *others.values()}) == 1 + len(others)


def test_a_fingerprint_of_weights_that_are_not_in_memory_is_that_of_the_config():
    with torch.device("meta"):
        assert model_fingerprint(text_encoder()) == model_fingerprint(text_encoder())


def test_an_entry_is_read_without_its_neighbours(cache):
    cache.fill(NAMES, compute, batch_size=4)
    for file in files(cache.folder):
        with safe_open(file, "pt") as opened:
            assert sorted(opened.keys()) == ["hidden", "mask"]
    assert len(files(cache.folder)) == len(NAMES)
