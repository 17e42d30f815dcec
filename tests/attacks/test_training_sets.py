"""Damaged and hostile training sets: reported by name, never written to the disk, never out of their folder."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from guard.errors import DataError, GuardError
from guard.scan import Columns, Pair, Skipped, find_shards, sources
from guard.scan.given import store_given
from guard.scan.tar import TarError, members
from tests.unit.scan.conftest import add, png

PNG = png(np.zeros((3, 4, 4), np.uint8))


def archive(path: Path, entries: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as made:
        for name, data in entries:
            add(made, name, data)
    return path


def read(path: Path, columns: Columns | None = None) -> tuple[list[Pair], list[Skipped]]:
    (shard,) = find_shards(path, columns)
    items = list(shard.read())
    return [item for item in items if isinstance(item, Pair)], [item for item in items if isinstance(item, Skipped)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(tmp_path: Path, form: int) -> None:
    names = ["a.png", "folder/b.txt", "x" * 90 + ".png", "d/" + "y" * 80 + "/" + "z" * 70 + ".png"]
    path = archive(tmp_path / "a.tar", [(name, os.urandom(600 + len(name))) for name in names], form)
    with path.open("rb") as file:
        found = [(member.name, member.data) for member in members(file, path.stat().st_size, 10_000)]
    with tarfile.open(path) as opened:
        expected = [(member.name, opened.extractfile(member).read()) for member in opened]  # type: ignore[union-attr]
    assert found == expected


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as made:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("evil.png")
            member.type, member.linkname = kind, "/etc/passwd"
            made.addfile(member)
        add(made, "../../escape.png", PNG)
    pairs, skipped = read(path)
    assert [pair.key for pair in pairs] == ["../../escape"]
    assert not skipped
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_damaged_header_ends_the_shard_and_names_it(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("1.png", PNG), ("2.png", PNG), ("3.png", PNG)])
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 255
    path.write_bytes(data)
    pairs, skipped = read(path)
    assert [pair.key for pair in pairs] == []
    assert skipped == [Skipped("a.tar", None, "a header has a wrong checksum")]


def test_a_cut_shard_gives_what_is_whole(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("1.png", PNG), ("2.png", PNG), ("3.png", os.urandom(5000))])
    path.write_bytes(path.read_bytes()[: 4 * 512 + 512 + 700])
    pairs, skipped = read(path)
    assert [pair.key for pair in pairs] == ["1"]
    assert skipped[-1].key is None
    assert "ends within" in skipped[-1].reason


@pytest.mark.parametrize("claim", [b"77777777777", b"\x80" + b"\xff" * 11, b"-0000000001", b"abcdefghijk"])
def test_a_claimed_size_costs_nothing(tmp_path: Path, claim: bytes) -> None:
    path = archive(tmp_path / "a.tar", [("1.png", PNG)])
    data = bytearray(path.read_bytes())
    data[124 : 124 + len(claim)] = claim
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(TarError):
        list(members(file, len(data), 1000))


def test_a_large_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 1000)
    path = archive(tmp_path / "a.tar", [("1.png", bytes(5000)), ("2.png", PNG)])
    pairs, (skipped,) = read(path)
    assert [pair.key for pair in pairs] == ["2"]
    assert (skipped.key, skipped.reason) == ("1.png", "it has 5000 bytes, more than 1000")


def test_an_extended_header_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
        member = tarfile.TarInfo("1.png")
        member.pax_headers = {"comment": "x" * (2 * 2**20)}
        made.addfile(member)
    _, (skipped,) = read(path)
    assert "an extended header has" in skipped.reason


def test_captions_that_are_no_text_or_no_document(tmp_path: Path) -> None:
    entries = [("1.png", PNG), ("1.txt", b"\xff\xfe\x1b[31mred"), ("2.png", PNG), ("2.json", b"[" * 100_000),
               ("3.png", PNG), ("3.json", json.dumps({"caption": "x" * 9000}).encode()),
               ("4.txt", b"alone")]  # fmt: skip
    pairs, skipped = read(archive(tmp_path / "a.tar", entries))
    assert [len(pair.caption) for pair in pairs] == [10, 0, sources.MAX_CAPTION]
    assert all(pair.caption.isprintable() for pair in pairs)
    assert [item.key for item in skipped] == ["4"]


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside.png", "link.png", "", "missing.png", "folder", "a\0b"])
def test_a_table_cannot_name_what_lies_outside(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "good.png").write_bytes(PNG)
    pq.write_table(pa.table({"image": [name, "good.png"], "caption": ["a", "b"]}), folder / "t.parquet")
    pairs, (skipped,) = read(folder / "t.parquet")
    assert [pair.caption for pair in pairs] == ["b"]
    assert skipped.key == "0"
    (folder / "t.csv").write_text(f'image,caption\n"{name}",a\ngood.png,b\n')
    pairs, skipped_rows = read(folder / "t.csv")
    assert [pair.caption for pair in pairs] == ["b"]
    assert len(skipped_rows) == 1


def test_tables_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + os.urandom(200) + b"PAR1")
    (tmp_path / "b.csv").write_text("file,caption\na.png,x\n")
    (tmp_path / "c.csv").write_text('image,caption\n"' + "x" * 200_000)
    for name, reason in (("a.parquet", "is not Parquet"), ("b.csv", "no column 'image'"), ("c.csv", "is damaged")):
        _, (skipped,) = read(tmp_path / name)
        assert reason in skipped.reason
    (tmp_path / "d.csv").write_text("file,text\na.png,x\n")
    (tmp_path / "a.png").write_bytes(PNG)
    pairs, _ = read(tmp_path / "d.csv", Columns("file", "text"))
    assert [pair.caption for pair in pairs] == ["x"]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.npy", b"\x93NUMPY\x01\x00", "is not a NumPy file"),
        ("b.npy", None, "embeddings are floats"),
        ("c.npy", None, "not finite"),
        ("d.safetensors", b"\xff" * 64, "is not a safetensors file"),
        ("e.parquet", b"PAR1", "is not Parquet"),
        ("f.pickle", b"", "no file of embeddings"),
    ],
)
def test_files_of_embeddings_that_are_none(tmp_path: Path, name: str, data: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    else:
        values = np.zeros((4, 2, 2)) if name == "b.npy" else np.full((4, 2), np.nan)
        np.save(path, values)
    with pytest.raises(GuardError, match=reason):
        store_given(path, tmp_path / "out")


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="is not a NumPy file of numbers"):
        store_given(tmp_path / "a.npy", tmp_path / "out")
