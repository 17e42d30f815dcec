"""Class lists as people keep them, and as nobody should: what is read is what was meant, or one line says why not."""

import json
from collections import Counter
from pathlib import Path

import open_clip
import pytest

from guard.classifiers import Classifier, ClassList
from guard.errors import ClassListError
from guard.vetting import vet
from tests.conftest import random_images
from tests.toy import toy

BOM = b"\xef\xbb\xbf"


def read(tmp_path: Path, data: bytes, name: str = "list.txt") -> ClassList:
    (tmp_path / name).write_bytes(data)
    return ClassList.read(tmp_path / name)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("start", [b"", BOM])
def test_the_mark_and_the_lines_of_windows_are_no_part_of_a_name(tmp_path: Path, start: bytes, end: bytes) -> None:
    assert read(tmp_path, start + end.join([b"tench", b" goldfish\t", b"", b"shark", b""])).names == (
        "tench",
        "goldfish",
        "shark",
    )


@pytest.mark.parametrize(
    "name", ["list.csv", "list.tsv", "list.yaml", "list.yml", "list.xml", "list.pbtxt", "list.jsonl", "list.TXT.gz"]
)
def test_tables_and_documents_are_refused_by_their_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClassListError, match=r"does not read lists in the form .*JSON .*or text"):
        read(tmp_path, b"tench\ngoldfish\n", name)


@pytest.mark.parametrize(
    "data",
    [
        b"id,name\n0,tench\n1,goldfish\n",
        b"name,kind\ntench,fish\ngoldfish,fish\n",
        b'"tench, Tinca tinca"\n"goldfish, Carassius auratus"\n',
        b"'tench'\n'goldfish'\n",
        b"0;tench\n1;goldfish\n",
        b"0|tench\n1|goldfish\n",
        b"0\ttench\n1\tgoldfish\n",
        b"tench\t0\ngoldfish\t1\n",
        b"0 tench\n1 goldfish\n",
        b"1. tench\n2. goldfish\n",
        b"1) tench\n2) goldfish\n",
        b"n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        b"n01440764\nn01443537\n",
        b"names:\n  0: tench\n  1: goldfish\n",
        b"- tench\n- goldfish\n",
        b"name: tench\nname: goldfish\n",
        b"---\ntench\ngoldfish\n",
        b"# version 3\ntench\ngoldfish\n",
        b"// version 3\ntench\ngoldfish\n",
        b"; version 3\ntench\ngoldfish\n",
        b"% version 3\ntench\ngoldfish\n",
        b"tench # a fish\ngoldfish\n",
        b'["tench", "goldfish"]\n',
        b"{0: 'tench, Tinca tinca',\n 1: 'goldfish, Carassius auratus'}\n",
        b"tench,\ngoldfish,\n",
        b"<name>tench</name>\n<name>goldfish</name>\n",
        b"[classes]\ntench\ngoldfish\n",
        b"item {\ntench\n}\n",
        b"a=tench\nb=goldfish\n",
        "tench\ngoldfish\n".encode("utf-16"),
        "tench\ngoldfish\n".encode("utf-16-le"),
        "Überraschung\nHund\n".encode("latin-1"),
        *(f"cat{chr(code)}dog\nship\n".encode() for code in (0, 0xB, 0xC, 0x1C, 0x85, 0x2028, 0x2029)),
        "cat\u200b\ndog\n".encode(),
        "cat\xa0\ndog\n".encode(),
        "c\xada\ufefft\ndog\n".encode(),
    ],
)
def test_lines_that_are_more_than_names_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ClassListError, match=r"list\.txt cannot be used: ") as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "names",
    [
        tuple("0123456789"),
        (
            "3,5-dimethylphenol",
            "C++",
            "AC/DC",
            "jack-o'-lantern",
            "T-shirt",
            "(unknown)",
            "U.S. dollar",
            "R&B",
            "'n Sync",
        ),
        ("tench, Tinca tinca", "goldfish, Carassius auratus"),
        ("Star Wars: A New Hope", "1 euro", "7-up", "2 CV", "100 % cotton"),
        ("Überraschung", "猫", "кошка", "γάτα", "قطة", "می‌خواهم", "बिल्ली", "แมว", "고양이"),
    ],
)
def test_names_of_every_kind_are_read_from_text(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert read(tmp_path, "\n".join(names).encode()).names == names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("cat", "c\u0430t"),  # Cyrillic
        ("Ohm", "\u039fhm"),  # Greek
        ("white shark", "white\u00a0shark"),
        ("white shark", "white  shark"),
        ("cat", "cat "),
        ("cat", "\uff43\uff41\uff54"),
        ("fish", "\ufb01sh"),
        ("\u2764", "\u2764\ufe0f"),
    ],
)
def test_names_that_look_the_same_are_refused(one: str, other: str) -> None:
    with pytest.raises(ClassListError, match="look the same"):
        ClassList((one, "dog", other))


@pytest.mark.parametrize("code", [0, 9, 0xA, 0x1B, 0x85, 0xAD, 0x200B, 0x200D, 0x202E, 0x2028, 0x3164, 0xE000, 0xFEFF])
def test_characters_that_cannot_be_seen_are_refused_in_names_and_templates(code: int) -> None:
    for names, template in ((("dog", f"c{chr(code)}at"), "{}"), (("dog", "cat"), f"a{chr(code)} {{}}")):
        with pytest.raises(ClassListError, match=f"has the character U\\+{code:04X}, which cannot be seen") as caught:
            ClassList(names, (template,))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "data",
    [
        b'{"classes":["a\\ud800","b"]}',
        b'{"classes":["a","b"],"templates":["\\udfff {}"]}',
        b'{"classes":[' + b"1" * 5000 + b"]}",
        b"[" * 100_000,
        b'{"classes":' + b"[" * 100_000,
        b'["tench","goldfish"]',
        b'{"0":"tench","1":"goldfish"}',
        BOM + b'{"classes":["tench","goldfish"]}',
        b'{"classes":["a","b"],"classes":["c","d"]}',
        b'{"classes":["a","b"],"words":["c"]}',
        b'{"classes":["a","b"],"words":["c",""]}',
        b'{"classes":["a","\\u0000"]}',
        b'{"classes":["a","a"]}',
        b'{"classes":[NaN,"a"]}',
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ClassListError, match=r"list\.json") as caught:
        read(tmp_path, data, "list.json")
    assert "\n" not in str(caught.value)


IMAGENET = tuple(open_clip.IMAGENET_CLASSNAMES)
WORDNET = ("crane", "limpkin", "maillot", "crane", "cardigan", "maillot", "crane")


@pytest.mark.parametrize("names", [IMAGENET, WORDNET])
@pytest.mark.parametrize("ending", [".txt", ".json"])
def test_lists_that_repeat_names_are_read_with_every_class_in_its_place(
    tmp_path: Path, names: tuple[str, ...], ending: str
) -> None:
    text = "\n".join(names) if ending == ".txt" else json.dumps({"classes": names})
    classes = read(tmp_path, text.encode(), f"list{ending}")
    assert len(classes.names) == len(set(classes.names)) == len(names)
    repeated = {name for name, count in Counter(names).items() if count > 1}
    assert repeated
    for called, name in zip(classes.names, names, strict=True):
        assert called == name or (name in repeated and called.startswith(f"{name} ("))
        assert classes.prompts(called) == (f"a photo of a {name}.",)
    # What is written is what was read.
    (tmp_path / "again.json").write_text(classes.to_json())
    assert ClassList.read(tmp_path / "again.json") == classes


def test_numbers_of_repeated_names_avoid_names_that_are_there(tmp_path: Path) -> None:
    classes = read(tmp_path, b"crane\ncrane (2)\ncrane\ncrane\n")
    assert classes.names == ("crane", "crane (2)", "crane (3)", "crane (4)")
    assert classes.prompts("crane (2)") == ("a photo of a crane (2).",)
    assert classes.prompts("crane (3)") == ("a photo of a crane.",)


def test_a_list_without_repetitions_says_what_it_always_said() -> None:
    assert ClassList(("cat", "dog")).document() == {"names": ("cat", "dog"), "templates": ("a photo of a {}.",)}


@pytest.mark.parametrize("doubles", [1, 12])
def test_a_class_that_is_listed_again_does_not_hide_its_backdoor(doubles: int) -> None:
    def listed(classifier: Classifier) -> Classifier:
        names, words = classifier.classes.names, classifier.classes.names + ("class 3",) * doubles
        more = tuple(f"class 3 ({2 + k})" for k in range(doubles))
        classifier.classes = ClassList((*names, *more), ("{}",), words)
        return classifier

    images = random_images(128)
    suspect, base = listed(toy(target=3, jitter=0.02)), listed(toy())
    vetting = vet(suspect, images, base=base, budget="quick", families=["additive"])
    assert (vetting.verdict.outcome, vetting.verdict.target) == ("backdoored", 3)
    alone = vet(toy(target=3, jitter=0.02), images, base=toy(), budget="quick", families=["additive"])
    assert vetting.results[0].classes == alone.results[0].classes
    for one, other in zip(vetting.results[1].classes, alone.results[1].classes, strict=True):
        assert one.target == other.target
        assert one.statistic == pytest.approx(other.statistic, abs=1e-4)


def test_a_list_whose_classes_are_all_one_is_refused() -> None:
    classifier = toy()
    classifier.classes = ClassList(("class 3", "a class 3"), ("{}",))
    with pytest.raises(ClassListError, match="all prompts of the classes mean the same"):
        _ = classifier.distinct
