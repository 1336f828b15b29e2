"""Files and JSON of others: what is no regular file of bounded size, or no JSON, is refused in words, at once."""

import io
import os
import socket
import time

import pytest

from lora_fx.sources.document import parse_json, read_json
from lora_fx.sources.regular import UnreadableError, is_inside, is_regular, open_regular, read_bytes, read_stream


def test_a_regular_file_is_read_and_so_is_a_link_to_one(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "file", 5) == read_bytes(str(tmp_path / "link"), 5) == b"12345"
    with open_regular(tmp_path / "file") as file:
        assert file.read(2) == b"12"
    assert is_regular(tmp_path / "link")


def odd_paths(folder):
    os.mkfifo(folder / "pipe")
    (folder / "nowhere").symlink_to("gone")
    (folder / "circle").symlink_to("circle")
    (folder / "to_pipe").symlink_to("pipe")
    (folder / "large").write_bytes(b"123456")
    return {
        "pipe": "is a pipe, not a file",
        "to_pipe": "is a pipe, not a file",
        ".": "is a directory, not a file",
        "/dev/zero": "is a device, not a file",
        "nowhere": "cannot be read: the link leads nowhere",
        "circle": f"cannot be read: {os.strerror(40)}",
        "gone": "cannot be read: no such file",
        "large": "has 6 bytes; at most 5 are read",
        "a" * 5000: f"cannot be read: {os.strerror(36)}",
        "a\0b": "is no path of a file",
        "a\ud800b": "is no path of a file",
        "large/file": f"cannot be read: {os.strerror(20)}",
    }


def test_whatever_else_a_path_leads_to_is_refused_at_once(tmp_path):
    start = time.monotonic()
    for name, words in odd_paths(tmp_path).items():
        path = os.path.join(tmp_path, name)
        with pytest.raises(UnreadableError) as caught:
            read_bytes(path, 5)
        assert str(caught.value) == words, name[:20]
        assert is_regular(path) == (name == "large")
    assert time.monotonic() - start < 5, "a pipe must not be waited for"


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        with pytest.raises(UnreadableError, match="is a socket, not a file"):
            read_bytes("s", 5)


def test_a_file_that_becomes_a_pipe_between_look_and_open_is_refused_too(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"1")
    looked_at = os.stat(tmp_path / "file")
    monkeypatch.setattr("lora_fx.sources.regular.os.stat", lambda path: looked_at)
    with pytest.raises(UnreadableError, match="is a pipe"):
        open_regular(tmp_path / "pipe")


def test_a_file_that_says_it_is_empty_is_read_no_further_than_the_bound():
    with pytest.raises(UnreadableError, match="has more than 10 bytes"):
        read_bytes("/proc/self/status", 10)
    with pytest.raises(UnreadableError, match="has more than 3 bytes"):
        read_stream(io.BytesIO(b"1234"), 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", r"is not UTF-8 text \(byte 0\)"),
        (b'{"a": }', "is not JSON: Expecting value in line 1, column 7"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"1" * 5000, "holds a number of thousands of digits"),
        (b'[{"a": 1, "b": 2, "a": 3}]', "holds the key 'a' twice"),
        (rb'{"a": "\ud800"}', "half a character"),
        (rb'{"\udfff": 1}', "half a character"),
        ('"\ud800"', "half a character"),
    ],
)
def test_what_is_no_json_is_refused_in_words(content, words):
    with pytest.raises(UnreadableError, match=words):
        parse_json(content)


def test_json_is_read_whole_with_surrogates_in_pairs(tmp_path):
    assert parse_json(rb'["\ud83d\ude00", 1e400]') == ["😀", float("inf")]
    (tmp_path / "a.json").write_bytes(b'{"a": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}


@pytest.mark.parametrize(
    "name", ["../a.json", "/a.json", "a/b.json", "..", ".a.json", "", "a\0.json", "c:a.json", "a\\b.json"]
)
def test_a_name_that_leads_out_of_the_folder_is_not_inside(name):
    assert not is_inside(name, ".json")


def test_a_name_of_a_file_beside_is_inside():
    assert is_inside("model-00001-of-00002.safetensors", ".safetensors")
    assert not is_inside("model.bin", ".safetensors")
