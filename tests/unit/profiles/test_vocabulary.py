from pathlib import Path

import pytest
import torch

from guard import profiles
from guard.classifiers import Classifier
from guard.errors import ClassListError
from guard.profiles.vocabulary import MAX_TEXTS, nearest
from tests.conftest import CLASSES


def test_a_file_is_one_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes("\ufeffwolf\r\n\n  sea lion \nwolf\n".encode())
    assert profiles.read_vocabulary(tmp_path / "words") == ("wolf", "sea lion")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00", "is not valid UTF-8"),
        (b"wolf\n" + b"w" * 201, "line 2 of the vocabulary .* is longer than 200"),
        ("\n".join(map(str, range(MAX_TEXTS + 1))).encode(), "20001 texts, more than the limit of 20000"),
        (b"w\n" * 2**21 + b"w", "is larger than"),
    ],
    ids=["nothing", "blank", "binary", "long line", "many lines", "large"],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "words").write_bytes(data)
    with pytest.raises(ClassListError, match=reason):
        profiles.read_vocabulary(tmp_path / "words")


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ClassListError, match=r"there is no vocabulary|cannot read"):
            profiles.read_vocabulary(path)


def test_the_class_of_a_feature_is_nearest_and_cosines_fall(classifier: Classifier) -> None:
    first, second = nearest(classifier, [classifier.head[1], -classifier.head[4]], ())
    assert first[0].text == "dog"
    assert first[0].cosine == pytest.approx(1, abs=1e-3)
    assert len(first) == len(second) == 5
    for found in (first, second):
        assert [item.cosine for item in found] == sorted((item.cosine for item in found), reverse=True)
    assert "frog" not in {item.text for item in second}


def test_a_text_is_encoded_with_all_templates_as_a_class_is(classifier: Classifier) -> None:
    prompts = classifier.encode_texts(["a photo of a wolf.", "a wolf."]).mean(0)
    feature = torch.nn.functional.normalize(prompts, dim=0)
    ((found, *_),) = nearest(classifier, [feature], ["otter", "wolf", "cat"])
    assert found.text == "wolf"
    assert found.cosine == pytest.approx(1, abs=1e-3)


def test_a_text_that_is_a_class_is_listed_once(classifier: Classifier) -> None:
    plain, repeated = (nearest(classifier, [classifier.head[0]], words) for words in ((), CLASSES.names))
    assert plain == repeated
