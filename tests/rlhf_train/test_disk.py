"""Files that are whole or as they were, and the room there is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_train.disk import read_json, rename, room, size_of, sync, sync_files, write_json
from tests.limits import small_files

VALUES: list[Any] = [{"a": 1 / 3, "b": [None, True]}, [], None, "Größe 雪"]


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_read(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\0\0\0\0", b"\xff\xfe"])
def test_a_torn_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    assert read_json(tmp_path / "file.json") is None


def test_none_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_json(tmp_path / "other.json") is None
    assert read_json(tmp_path / "file" / "below.json") is None


def test_a_link_that_another_run_shares_is_left_to_it(tmp_path: Path) -> None:
    write_json(tmp_path / "theirs.json", 1)
    os.link(tmp_path / "theirs.json", tmp_path / "ours.json")
    write_json(tmp_path / "ours.json", 2)
    assert (read_json(tmp_path / "theirs.json"), read_json(tmp_path / "ours.json")) == (1, 2)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", "before")
    with small_files(1000), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "file.json", "after" * 1000)
    assert read_json(tmp_path / "file.json") == "before"


def test_a_folder_takes_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "file").write_text("1", encoding="utf-8")
    sync_files(tmp_path / "folder.partial")
    rename(tmp_path / "folder.partial", tmp_path / "folder")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["folder", "folder/file"]
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "folder.partial")


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(bytes(1000))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(234))
    assert size_of(tmp_path / "a") == 1234
    assert size_of(tmp_path / "none") == 0


def test_room(tmp_path: Path) -> None:
    free, inodes = room(tmp_path)
    assert 0 < free < 10**16 and (inodes is None or inodes > 0)
    assert room(Path("/proc"))[1] is None  # which counts none
    with pytest.raises(FileNotFoundError):
        room(tmp_path / "none")
