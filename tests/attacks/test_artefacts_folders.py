"""Folders of images as people keep them: what is below a folder is what its user sees there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from guard.classifiers import ImageFolder, Preprocessing, images
from guard.errors import ImageError


def fill(folder: Path, count: int = 5) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (4, 4)).save(folder / f"{index}.png")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two classes that lie elsewhere."""
    fill(tmp_path / "store" / "cat")
    fill(tmp_path / "store" / "dog")
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def linked_classes(root: Path, store: Path) -> None:
    for name in ("cat", "dog"):
        (root / name).symlink_to(store / name)


def one_linked_class(root: Path, store: Path) -> None:
    fill(root / "cat")
    (root / "dog").symlink_to(store / "dog")


def linked_files(root: Path, store: Path) -> None:
    for path in store.rglob("*.png"):
        (root / path.parent.name).mkdir(exist_ok=True)
        (root / path.parent.name / path.name).symlink_to(path)


def a_volume_of_kubernetes(root: Path, _: Path) -> None:
    data = root / "..2026_11_27_10_00_00.123"
    fill(data / "cat")
    fill(data / "dog")
    (root / "..data").symlink_to(data.name)
    for name in ("cat", "dog"):
        (root / name).symlink_to(f"..data/{name}")


def hidden_folders(root: Path, _: Path) -> None:
    fill(root / "cat")
    fill(root / "dog")
    fill(root / ".ipynb_checkpoints", 1)
    fill(root / "cat" / ".ipynb_checkpoints", 1)
    fill(root / ".Trash-1000" / "files", 2)
    fill(root / ".thumbnails" / "large", 2)
    Image.new("RGB", (4, 4)).save(root / "cat" / "._0.png")


def folders_of_systems(root: Path, _: Path) -> None:
    fill(root / "cat")
    fill(root / "dog" / "deeper")
    fill(root / "cat" / "@eaDir", 2)
    fill(root / "__MACOSX" / "cat", 2)


def a_link_to_the_folder_above(root: Path, _: Path) -> None:
    fill(root / "cat")
    fill(root / "dog")
    (root / "cat" / "again").symlink_to(root)


def a_circle_of_links(root: Path, store: Path) -> None:
    linked_classes(root, store)
    (store / "cat" / "other").symlink_to(store / "cat")


@pytest.mark.parametrize(
    "make",
    [
        linked_classes,
        one_linked_class,
        linked_files,
        a_volume_of_kubernetes,
        hidden_folders,
        folders_of_systems,
        a_link_to_the_folder_above,
        a_circle_of_links,
    ],
)
@pytest.mark.parametrize("through_a_link", [False, True])
def test_every_image_counts_once_and_no_folder_is_made_a_class(
    tmp_path: Path, root: Path, store: Path, make: Callable[[Path, Path], None], *, through_a_link: bool
) -> None:
    make(root, store)
    if through_a_link:
        (tmp_path / ".hidden").symlink_to(root)
        root = tmp_path / ".hidden"
    folder = ImageFolder.scan(root)
    assert len(folder) == 10
    assert folder.classes() == ("cat", "dog")
    assert folder.labels(folder.classes()) == (0,) * 5 + (1,) * 5
    assert folder.pixels(Preprocessing(4, (0.5,) * 3, (0.5,) * 3)).shape == (10, 3, 4, 4)


def test_two_classes_that_are_one_folder_both_have_its_images(root: Path, store: Path) -> None:
    (root / "cat").symlink_to(store / "cat")
    (root / "tiger").symlink_to(store / "cat")
    assert ImageFolder.scan(root).labels(("cat", "tiger")) == (0,) * 5 + (1,) * 5


def nowhere(path: Path) -> None:
    path.symlink_to("/no/such/place")


def itself(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(("make", "name"), [(nowhere, "dog"), (nowhere, "x.png"), (itself, "dog"), (pipe, "x.png")])
def test_what_leads_nowhere_is_an_error(root: Path, make: Callable[[Path], None], name: str) -> None:
    fill(root / "cat")
    make(root / name)
    with pytest.raises(ImageError, match=rf"{name.replace('.', '[.]')} is a link that leads nowhere or cannot"):
        ImageFolder.scan(root)


def test_a_folder_that_cannot_be_read_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root / "cat")
    fill(root / "dog")
    real = os.scandir

    def refusing(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return real(path)

    # Not by its permissions: whoever runs the tests may be allowed everything.
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ImageError, match=r"cannot read the folder .*dog: Permission denied"):
        ImageFolder.scan(root)


def test_links_that_multiply_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_FOLDERS", 1000)
    for index in range(20):  # a million ways to the last of 20 folders
        (root / str(index)).mkdir()
        for name in ("a", "b"):
            if index:
                (root / str(index - 1) / name).symlink_to(root / str(index))
    with pytest.raises(ImageError, match="more than 1000 folders"):
        ImageFolder.scan(root)


def test_an_image_of_absurd_size_is_refused_before_it_is_read(root: Path) -> None:
    with (root / "x.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match=r"x\.png is larger than"):
        ImageFolder.scan(root).pixels(Preprocessing(4, (0.5,) * 3, (0.5,) * 3))
