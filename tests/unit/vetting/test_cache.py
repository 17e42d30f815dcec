from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from guard.vetting.cache import Entry, SearchCache

ENTRIES: list[Entry] = [
    ({"target": 3, "norm": 0.1 + 0.2, "reached": True, "reference_model": None}, {"mask": torch.rand(1, 4, 4)}),
    (
        {"target": 5, "norm": 2.0, "reference_model": 0.5},
        {"share": torch.tensor(1.0), "mask": torch.rand(4, 4).T[None]},
    ),
    ({"target": 7}, {}),
]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    SearchCache(tmp_path / "new" / "searches").save("a", ENTRIES)
    loaded = SearchCache(tmp_path / "new" / "searches").load("a")
    assert loaded is not None
    for (numbers, tensors), (expected, held) in zip(loaded, ENTRIES, strict=True):
        assert numbers == expected
        assert same(tensors, held)
        assert list(tensors) == list(held)  # names of later searches depend on the order
    assert [path.name for path in (tmp_path / "new" / "searches").iterdir()] == ["a.safetensors"]


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    cache = SearchCache(tmp_path)
    cache.save("a", ENTRIES)
    assert cache.load("b") is None
    assert not (tmp_path / "b.safetensors").exists()
    assert SearchCache(tmp_path / "nowhere").load("a") is None
    assert not (tmp_path / "nowhere").exists()


def test_a_file_without_the_order_of_its_tensors_is_read(tmp_path: Path) -> None:
    tensors = {"0.share": torch.tensor(1.0), "0.mask": torch.rand(1, 4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"results": '[{"target": 3}]'})
    ((numbers, loaded),) = SearchCache(tmp_path).load("a") or []
    assert numbers == {"target": 3}
    assert loaded.keys() == {"share", "mask"}


@pytest.mark.parametrize("keep", [0, 7, 50, -1])
def test_a_damaged_file_is_none_and_can_be_saved_again(tmp_path: Path, keep: int) -> None:
    cache, file = SearchCache(tmp_path), tmp_path / "a.safetensors"
    cache.save("a", ENTRIES)
    file.write_bytes(file.read_bytes()[:keep])
    assert cache.load("a") is None
    cache.save("a", ENTRIES[:1])
    assert [numbers for numbers, _ in cache.load("a") or []] == [ENTRIES[0][0]]
