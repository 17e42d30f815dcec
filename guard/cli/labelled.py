"""Folders of images whose sub-folders are named like the classes of a model."""

from typing import TYPE_CHECKING

from guard.errors import ImageError, UsageError

if TYPE_CHECKING:
    from guard.classifiers import Classifier, ImageFolder


def ordered_folders(folder: "ImageFolder", classifier: "Classifier") -> list[str]:
    """The sub-folder of each class, in the order of the classes; underscores and capitals do not count.

    Raises:
        UsageError: A sub-folder or a class has no counterpart.
        ImageError: The images do not lie in sub-folders.
    """
    found = {_plain(key): key for key in folder.classes()}
    ordered = [found.pop(_plain(name), "") for name in classifier.classes.names]
    if found or "" in ordered:
        odd = next(iter(found.values()), None) or classifier.classes.names[ordered.index("")]
        raise UsageError(
            f"the sub-folders of {folder.root} must be named as the model's classes are; {odd!r} has no counterpart"
        )
    return ordered


def folders_if_named(folder: "ImageFolder", classifier: "Classifier") -> list[str] | None:
    """The same; None where no sub-folder is named like a class, so that the images have no labels.

    Raises:
        UsageError: Some sub-folders are named like classes, and others are not, or some classes have none.
    """
    try:
        found = {_plain(key) for key in folder.classes()}
    except ImageError:
        return None
    if found.isdisjoint(map(_plain, classifier.classes.names)):
        return None
    return ordered_folders(folder, classifier)


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()
