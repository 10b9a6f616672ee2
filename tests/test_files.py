"""Files are written whole or not at all, and JSON from elsewhere is read strictly: one kind of error, one line."""

import errno
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from diffusers_softrepa.files import (
    UnreadableJSON,
    check_places,
    move_into_place,
    parse_json,
    read_json,
    read_json_lines,
    whole_file,
    write_whole,
)
from diffusers_softrepa.quoting import one_line, quoted


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# Writing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("half")])
def test_a_write_that_breaks_off_leaves_the_old_file_alone(tmp_path: Path, error: BaseException):
    path = tmp_path / "file.json"
    write_whole(path, "old")
    with pytest.raises(type(error)), whole_file(path) as file:
        file.write(b"new, but only ha")
        raise error
    assert os.listdir(tmp_path) == ["file.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_leaves_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match=r"No space left on device: .*file\.json") as caught:
        write_whole(tmp_path / "file.json", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_call_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    write_whole(tmp_path / "file", b"x")
    assert done == (["sync", "name", "sync"] if os.name == "posix" else ["sync", "name"])
    done.clear()
    write_whole(tmp_path / "file", b"y", durable=False)
    assert done == ["name"]


def test_the_longest_name_that_a_disk_takes_can_be_written(tmp_path: Path):
    write_whole(tmp_path / ("x" * 255), b"y")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"y"


def test_a_link_in_the_place_is_replaced_and_what_it_names_stays(tmp_path: Path):
    (tmp_path / "target").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "mine")
    assert (tmp_path / "target").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "mine" and not (tmp_path / "link").is_symlink()


def test_places_that_can_be_written_pass_whether_or_not_they_exist(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    check_places(tmp_path, ["file", "new"], ["folder", "other"])
    check_places(tmp_path / "new" / "below", ["file"], ["folder"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("folder", "files", "folders", "message"),
    [
        ("file", [], [], "the place to write to must be a folder, but .*file is a file"),
        ("file/below", [], [], "the place to write to must be a folder, but .*file is a file"),
        ("dangling", [], [], "must be a folder, but .*dangling is a link to nothing"),
        ("n" * 300, [], [], "the place to write to cannot be '/.*n': File name too long"),
        ("", ["n" * 300], [], "the name of a file cannot be .*: File name too long"),
        ("", ["nul\0"], [], "the name of a file cannot be .*: .*null"),
        ("half a \ud83d", [], [], "the place to write to cannot be .*: .*surrogates not allowed"),
        ("", ["folder"], [], "folder must be a file, but is a folder; move it away, or name another folder"),
        ("", ["link"], [], "link must be a file, but is a folder"),
        ("", ["pipe"], [], "pipe must be a file, but is a device or pipe"),
        ("", [], ["file"], "file must be a folder, but is a file"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_places_that_cannot_be_written_are_named(
    tmp_path: Path, folder: str, files: list[str], folders: list[str], message: str
):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=message):
        check_places(tmp_path / folder, files, folders)


@pytest.mark.parametrize("folder", [None, 5, b"bytes", ["list"]])
def test_a_place_that_is_no_path_is_named(folder: Any):
    with pytest.raises(TypeError, match="the place to write to must be a path, but is"):
        check_places(folder)
    with pytest.raises(ValueError, match="must be a folder, but its name is empty"):
        check_places("")


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"output_dir must be writable, but .* is read-only"):
        check_places(tmp_path / "new", what="output_dir")


def test_a_folder_moves_into_place_in_one_step(tmp_path: Path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "file").touch()
    move_into_place(tmp_path / "partial", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"]


# Reading

UNREADABLE = {
    "nothing": (b"", "is not JSON: Expecting value at column 1"),
    "a word": (b"\n\n nope", "is not JSON: .* at line 3, column 2"),
    "cut off": (b'{"a": [1, 2', "is not JSON"),
    "more behind it": (b"{} {}", "is not JSON: Extra data"),
    "nested too deep": (b"[" * 100_000 + b"]" * 100_000, "is nested more than 64 levels deep"),
    "nested too deep in objects": (b'{"a":' * 100_000, "is nested more than 64 levels deep"),
    "open for ever": (b"[" * 2_000_000, "is nested more than 64 levels deep"),
    "too many digits": (b'{"a": ' + b"9" * 100_000 + b"}", "holds a number of 100000 digits"),
    "too many digits after the point": (b"0." + b"1" * 100, "holds a number of 102 digits"),
    "beyond float64": (b"[1e999]", "holds the number 1e999, which is too large"),
    "NaN": (b"[NaN]", "holds NaN, which is no number of JSON"),
    "Infinity": (b"[-Infinity]", "holds -Infinity"),
    "a key twice": (b'{"a": 1, "a": 2}', "holds the key 'a' twice"),
    "Latin-1": ('{"a": "ä"}'.encode("latin-1"), "is not UTF-8 text: byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "half a character": (rb'{"a": ["\ud83d"]}', "holds half of a character"),
    "half a character in a key": (rb'{"\udc00": 1}', "holds half of a character"),
    "a control character": (b'"a\x00b"', "is not JSON: Invalid control character"),
    "too long": (b" " * (64 << 20) + b"{}", "is longer than 67,108,864 bytes"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_json_says_which_file_and_why_in_one_line(tmp_path: Path, case: str):
    content, message = UNREADABLE[case]
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(UnreadableJSON, match=rf"some\.json {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ['{"a": [1, -2.5e3, true, null, "ä \\ud83d\\ude00 [[[["]}', "[]", '"\\\\"', "7"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_json_is_read_as_the_standard_library_reads_it(tmp_path: Path, text: str, mark: bytes):
    (tmp_path / "some.json").write_bytes(mark + text.encode())
    assert read_json(tmp_path / "some.json") == json.loads(text)


def test_brackets_in_texts_are_no_nesting():
    text = json.dumps(["[" * 1000, '\\"[[[' * 1000, {"{" * 1000: 1}])
    assert parse_json(text, "it") == json.loads(text)


def test_numbers_that_are_not_finite_are_read_where_asked_for():
    assert parse_json("[NaN, Infinity, 1e999]", "it", allow_nonfinite=True)[1:] == [float("inf")] * 2


def test_what_python_writes_comes_back():
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kinds = [None, True, draw.randint(-(10**18), 10**18), draw.gauss(0, 1e30), "".join(map(chr, range(1, 300)))]
        if depth and draw.random() < 0.7:
            entries = [value(depth - 1) for _ in range(draw.randint(0, 4))]
            return entries if draw.random() < 0.5 else {f"{i}\n": entry for i, entry in enumerate(entries)}
        return draw.choice(kinds)

    for _ in range(200):
        made = value(5)
        assert parse_json(json.dumps(made, ensure_ascii=draw.random() < 0.5).encode(), "it") == made


def test_reading_takes_time_in_proportion_to_the_text():
    for piece in ('"', '\\"', '"\\', "[", "{", "]", "9", "1 ", "\\u"):
        start = time.perf_counter()
        with pytest.raises(UnreadableJSON):
            parse_json(piece * (1_000_000 // len(piece)), "it")
        assert time.perf_counter() - start < 5  # a quadratic pattern would take hours


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_what_is_no_file_is_an_os_error_at_once(tmp_path: Path, kind: str):
    path = tmp_path / "some.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(OSError, match=r"some\.json"):
        read_json(path)
    with pytest.raises(OSError, match=r"some\.json"):
        list(read_json_lines(path))


def test_lines_are_read_with_their_numbers_and_a_wrong_one_is_named(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_bytes('\ufeff{"a": "\u2028"}\r\n\n  \n[2]\n{bad}\n'.encode())
    lines = read_json_lines(path)
    assert [next(lines), next(lines)] == [(1, {"a": "\u2028"}), (4, [2])]
    with pytest.raises(UnreadableJSON, match=r"line 5 of .*log\.jsonl is not JSON"):
        next(lines)


def test_half_a_line_of_a_killed_writer_is_left_out_where_asked_for(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_json_lines(path, torn_end=True)) == [(1, {"step": 1})]
    with pytest.raises(UnreadableJSON, match="line 2 of"):
        list(read_json_lines(path))
    path.write_text('{"step": 1}\n{"step": 2, "lo\n')  # has its end, so nobody was killed there
    with pytest.raises(UnreadableJSON, match="line 2 of"):
        list(read_json_lines(path, torn_end=True))


# Foreign text in messages


class Raising:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD = {
    "long": "x" * 10**6,
    "colours": "a\n\x1b[31mb\u202e",
    "deep": nested(100_000),
    "digits": 10**9000,
    "many": list(range(10**6)),
    "raising": Raising(),
    "surrogate": "\ud83d",
    "bytes": b"\n",
}


@pytest.mark.parametrize("case", ODD)
def test_any_value_is_shown_as_one_short_printable_line(case: str):
    for text in (quoted(ODD[case], 60), one_line(quoted(ODD[case]), 60)):
        assert 0 < len(text) <= 60 and text.isprintable()


def test_short_values_are_shown_as_they_are():
    assert quoted("a b") == "'a b'" and quoted(1.5) == "1.5" and quoted(None) == "None" and quoted([1]) == "[1]"
    assert one_line("no\n  such thing") == "no such thing"
