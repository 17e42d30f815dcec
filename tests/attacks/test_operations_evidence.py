"""What leaves the evidence log: exports without formulas, pages that run nothing, and logs that cannot be written."""

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.errors import DamagedLogError, EvidenceError
from guard.evidence import EvidenceLog, EvidenceWriter, Record, export, record_page
from guard.profiles import Profile
from guard.protocol.inference_pb2 import ModelInferRequest
from guard.sidecar.decisions.watch import input_digest

WAIT = 30.0
FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
HOSTILE = (
    '=HYPERLINK("http://x")',
    "a;=cmd|'/c calc'!A1",
    "a; =1",
    'a;"=1"',
    'a;""=1',
    "a,=1",
    "a, =1",
    "a|=1",
    "a;;=1",
    "a;\u3000＝1",
    ';=1;+2;-3;@SUM(A1)"',
    '"=1',
    '";=1',
    "a;'=1",
)
SCRIPT = "</title></svg>--><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_no_cell_of_an_export_begins_a_formula_whatever_the_separator(
    tmp_path: Path, text: str, separator: str
) -> None:
    scores = {f"score{text}": -1.5, "other": 2.0}
    item = Record(
        text, text, text, 0, "flag", "tag", predicted=text, explanation=text, scores=scores, input_digest=text
    )
    export([item, item], tmp_path / "out.csv")
    data = (tmp_path / "out.csv").read_text()
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        for row in csv.reader(io.StringIO(data, newline=""), delimiter=separator, quoting=quoting):
            for cell in row:
                begin = cell.strip().strip('"').strip()
                number = begin.replace("-", "", 1).replace(".", "", 1).isdigit()
                assert number or not begin.startswith(FORMULAS), cell


def test_what_is_no_formula_is_exported_as_it_is(tmp_path: Path) -> None:
    export([Record("a-b = c + d; e", "m", "d", 0, "flag", "tag")], tmp_path / "out.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))
    assert row["request_id"] == "a-b = c + d; e"


class Reader(HTMLParser):
    """Collects the elements and the attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


def assert_nothing_runs(page: str) -> None:
    found = Reader(page)
    policy = next(value or "" for name, value in found.attributes if name == "content" and "default-src" in str(value))
    assert {part.strip() for part in policy.split(";")} == {
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"
    }  # fmt: skip
    assert not found.tags & {"script", "iframe", "object", "embed", "form", "base", "link", "foreignobject"}
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        if name in {"src", "href", "xlink:href"}:
            assert str(value).startswith(("data:image/", "#")), value


def test_the_page_of_a_record_runs_nothing() -> None:
    names = ("trace_id", "predicted", "trigger", "target", "second_look", "explanation")
    more: dict[str, Any] = {**dict.fromkeys(names, SCRIPT), "scores": {SCRIPT: 2.0}, "thresholds": {SCRIPT: 1.0}}
    assert_nothing_runs(record_page(Record(SCRIPT, SCRIPT, SCRIPT, 0, SCRIPT, SCRIPT, **more)))


def test_the_report_of_a_vetting_runs_nothing(profile: Profile) -> None:
    from guard import report
    from guard.report import Section

    document = profile.document
    classes = replace(
        document.model.classes, names=tuple(f"{SCRIPT} {n}" for n, _ in enumerate(document.model.classes.names))
    )
    hostile = replace(
        profile, document=replace(document, model=replace(document.model, classes=classes, source=SCRIPT))
    )
    scores = {SCRIPT: np.arange(5.0)}
    page = report.render(
        hostile, report.examples(hostile), scores=scores, sections=[Section(SCRIPT, [(SCRIPT, SCRIPT)])]
    )
    assert_nothing_runs(page)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder with a log, as it lies on a volume after its sidecar has stopped."""
    folder = tmp_path / "volume"
    folder.mkdir()
    writer = EvidenceWriter(folder / "evidence.sqlite")
    writer.record(Record("kept", "m", "d", 0, "flag", "tag"))
    assert writer.close(WAIT)
    return folder


@pytest.fixture
def mounted_for_reading(volume: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root may write to every folder but not to a file system that is mounted for reading."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    return volume


def test_a_log_on_a_volume_for_reading_is_read_and_nothing_is_made_beside_it(mounted_for_reading: Path) -> None:
    log = EvidenceLog(mounted_for_reading / "evidence.sqlite")
    assert [each.request_id for each in log.records()] == ["kept"]
    assert [each.name for each in mounted_for_reading.iterdir()] == ["evidence.sqlite"]


def test_an_empty_write_ahead_log_is_no_obstacle(mounted_for_reading: Path) -> None:
    (mounted_for_reading / "evidence.sqlite-wal").touch()
    assert EvidenceLog(mounted_for_reading / "evidence.sqlite").count() == 1


def test_records_in_the_write_ahead_log_are_not_passed_over_in_silence(volume: Path) -> None:
    """As another user, in a folder that this one cannot write."""
    program = (
        "import sys; from pathlib import Path; import guard.evidence as e; print(e.EvidenceLog(Path(sys.argv[1])))"
    )
    path = volume / "evidence.sqlite"
    (volume / "evidence.sqlite-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(60))
    volume.chmod(0o555)
    for file in volume.iterdir():
        file.chmod(0o444)
    if os.geteuid() == 0 and shutil.which("unshare"):
        command = [
            "unshare",
            "--user",
            "--map-user=12345",
            "--map-group=12345",
            sys.executable,
            "-c",
            program,
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "unshare failed" in done.stderr or "Permission denied" in done.stderr:
            pytest.skip("no user namespaces, or a folder on the way that others cannot enter")
        assert "write-ahead log" in done.stderr or done.returncode == 0
        assert "move it away" not in done.stderr


def test_a_log_that_cannot_be_read_is_not_called_damaged(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EvidenceError, match=r"cannot read the evidence log .*: Permission denied") as caught:
        EvidenceLog(volume / "evidence.sqlite")
    assert not isinstance(caught.value, DamagedLogError)


@pytest.mark.parametrize("name", ["image", "renamed", ""])
def test_the_digest_is_of_the_input_that_was_read_whatever_its_name(name: str) -> None:
    files = [b"first", b"the second"]
    message = ModelInferRequest()
    message.inputs.add(name=name, datatype="BYTES", shape=[2]).contents.bytes_contents.extend(files)
    assert [input_digest(message, row, "image") for row in (0, 1)] == [hashlib.sha256(f).hexdigest() for f in files]
