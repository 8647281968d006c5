"""Files that are there whole or not at all, whatever the disk says."""

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qprobe import files


def test_a_file_appears_with_its_folder_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    files.write_whole(path, b"first")
    files.write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_and_the_older_file_as_it_was(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"older")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    for path in (old, new):
        with pytest.raises(OSError, match="No space left"):
            files.write_whole(path, b"content")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"older"


def test_the_content_is_on_the_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    synced = []

    def fsync(descriptor: int) -> None:
        assert not path.exists()
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(path, b"content")
    assert synced == [7]


def test_a_file_in_the_place_of_a_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="part could not be written"):
        files.write_whole(tmp_path / "file" / "part", b"")


def test_temporary_files_of_dead_processes_alone_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead = tmp_path / f".part-1.parquet.{platform.node()}.{dead.pid}.tmp"
    kept = {
        tmp_path / f".part-1.parquet.{platform.node()}.{os.getpid()}.tmp",  # alive
        tmp_path / f".part-1.parquet.another-machine.{dead.pid}.tmp",  # nobody here knows whether it lives
        tmp_path / "part-1.parquet",
    }
    for path in (of_dead, *kept):
        path.write_bytes(b"")
    files.remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("kind", ["plain", "gz", "bz2", "zst"])
def test_packed_files_are_read_whatever_their_name(kind: str, tmp_path: Path) -> None:
    import bz2
    import gzip

    import pyarrow as pa

    text = "\ufeffone\nzwei \u00e4\n"
    raw = text.encode()
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(raw)
    all_kinds = {"plain": raw, "gz": gzip.compress(raw), "bz2": bz2.compress(raw), "zst": out.getvalue().to_pybytes()}
    packed = all_kinds[kind]
    (tmp_path / "file").write_bytes(packed)
    assert files.read_text(tmp_path / "file") == "one\nzwei \u00e4\n"
    if kind != "plain":
        (tmp_path / "file").write_bytes(packed[: len(packed) - 9])
        with pytest.raises(ValueError, match="damaged"):
            files.read_text(tmp_path / "file")


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="but a folder"):
        files.read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        files.read_text(tmp_path / "none")
