from pathlib import Path

import pytest

from guard._files import replace_file, replacing
from guard.errors import UsageError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_with_its_parents_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(path.parent) == ["file"]


def test_the_mode_is_that_which_was_asked_for(tmp_path: Path) -> None:
    with replacing(tmp_path / "secret", mode=0o600) as file:
        file.write(b"x")
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def half_written(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise RuntimeError("the writer gave up")


def test_an_error_while_it_is_filled_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with pytest.raises(RuntimeError, match="gave up"):
        half_written(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("place", ["file/below", "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"cannot write {tmp_path / place}: "):
        replace_file(tmp_path / place, b"")
    assert names(tmp_path) == ["file", "folder"]
