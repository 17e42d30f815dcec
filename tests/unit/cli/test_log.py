import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guard.cli import cli
from guard.errors import EvidenceError, GuardError, UsageError
from guard.evidence import EvidenceWriter, Record
from guard.profiles import Profile

Run = Callable[..., Result]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three records: two flagged, one with a thumbnail that is none and the name of a class that is markup."""
    writer = EvidenceWriter(tmp_path / "evidence.db", max_age_days=36_500)
    for item in (
        Record("r-1", "m", "d", 0, "flag", "tag", time="2026-05-01T00:00:00Z", p_value=0.0005, trigger="patch-1"),
        Record("r-2", "m", "d", 1, "unchecked", "tag", time="2026-05-02T00:00:00Z"),
        Record("=r-3\x1b[2J", "n", "d", 0, "flag", "tag", time="2026-05-03T00:00:00Z", predicted="<b>dog</b>"),
    ):
        assert writer.record(item)
    assert writer.close(30)
    return tmp_path / "evidence.db"


@pytest.fixture
def run(log: Path) -> Run:
    """Runs `guard log` on it."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(cli, ["log", str(log), *map(str, arguments)], catch_exceptions=True)

    return invoke


def listed(result: Result) -> list[int]:
    assert result.exit_code == 0, result.output
    return [item["id"] for item in json.loads(result.stdout)["records"]]


def test_it_lists_a_table_with_the_last_first(run: Run) -> None:
    lines = run().stdout.splitlines()
    assert lines[0].split() == [
        "id",
        "time",
        "model",
        "decision",
        "class",
        "reference",
        "decided",
        "by",
        "p-value",
        "second",
        "look",
        "request",
        "image",
        "text",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["3", "2", "1"]
    assert lines[3].split() == ["1", "2026-05-01T00:00:00.000Z", "m", "flag", "patch-1", "0.0005", "r-1", "0"]


def test_a_terminal_gets_no_control_characters(run: Run) -> None:
    assert "\x1b" not in run().stdout
    assert "\\u001b" not in run("--json").stdout


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ((), [3, 2, 1]),
        (("--since", "2026-05-02"), [3, 2]),
        (("--until", "2026-05-02T00:00:00Z"), [1]),
        (("--since", "1h"), []),
        (("--model", "n"), [3]),
        (("--decision", "flag"), [3, 1]),
        (("--class", "<b>dog</b>"), [3]),
        (("--trigger", "patch-1"), [1]),
        (("--request", "r-2"), [2]),
        (("--p-value", "0.001"), [1]),
        (("--limit", "1"), [3]),
        (("--limit", "1", "--offset", "1"), [2]),
    ],
)
def test_options_select(run: Run, options: tuple[str, ...], ids: list[int]) -> None:
    assert listed(run(*options, "--json")) == ids


def test_it_says_how_many_there_are(run: Run) -> None:
    assert "1 of 3 records" in run("--limit", 1).stdout
    assert json.loads(run("--limit", 1, "--json").stdout)["count"] == 3
    assert run("--model", "none").stdout == "no records\n"


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens while `guard log --follow` waits, by turns; at last somebody presses Ctrl-C."""
    steps: list[Callable[[], None]] = []

    def wait(_: float) -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    monkeypatch.setattr("time.sleep", wait)
    return steps


def write(log: Path, *names: str) -> None:
    writer = EvidenceWriter(log, max_age_days=36_500)
    assert all(writer.record(Record(name, "m", "d", 0, "flag", "tag")) for name in names)
    assert writer.close(30)


def test_it_follows_what_comes(run: Run, log: Path, meanwhile: list[Callable[[], None]]) -> None:
    meanwhile += [lambda: None, lambda: write(log, "r-4", "r-5"), lambda: write(log, "r-6")]
    result = run("--follow", "--decision", "flag", "--limit", 1)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("id  time")
    assert [line.split()[0] for line in lines[1:]] == ["3", "4", "5", "6"]


def test_it_follows_a_log_that_is_begun_anew_as_json(run: Run, log: Path, meanwhile: list[Callable[[], None]]) -> None:
    def anew() -> None:
        for file in log.parent.glob(f"{log.name}*"):
            file.unlink()
        write(log, "new")

    meanwhile += [anew]
    result = run("--follow", "--model", "m", "--json")
    assert [json.loads(line)["request_id"] for line in result.stdout.splitlines()] == ["r-1", "r-2", "new"]


@pytest.mark.parametrize(
    "other", [("--export", "x.csv"), ("--offset", 1), ("--until", "1h"), ("--show", 1)], ids=lambda other: other[0]
)
def test_what_does_not_go_with_following_is_refused(run: Run, other: tuple[object, ...]) -> None:
    result = run("--follow", *other)
    assert isinstance(result.exception, UsageError)
    assert "--follow" in str(result.exception)


def test_it_exports_what_was_selected(run: Run, tmp_path: Path) -> None:
    result = run("--decision", "flag", "--export", tmp_path / "x.csv", "--json")
    assert json.loads(result.stdout) == {"exported": 2, "file": str(tmp_path / "x.csv")}
    assert ",'=r-3\ufffd[2J," in (tmp_path / "x.csv").read_text()


def test_it_shows_one_record_as_a_page(run: Run, tmp_path: Path) -> None:
    result = run("--show", 3, "--out", tmp_path / "page.html", "--json")
    assert json.loads(result.stdout)["request_id"] == "=r-3\ufffd[2J"
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;dog&lt;/b&gt;" in page
    assert "<b>" not in page


def test_a_profile_adds_pictures(tmp_path: Path, profile: Profile, profile_directory: Path) -> None:
    writer = EvidenceWriter(tmp_path / "evidence.db")
    writer.record(Record("r", "m", profile.document.model.digest, 0, "flag", "tag", trigger="patch-1"))
    assert writer.close(30)
    out = tmp_path / "page.html"
    arguments = ["log", str(tmp_path / "evidence.db"), "--show", "1", "--out", str(out)]
    assert CliRunner().invoke(cli, [*arguments, "--profile", str(profile_directory)]).exit_code == 0
    assert "the card with it" in out.read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--show", "1", "--limit", "1"), UsageError, "--show takes one record"),
        (("--show", "1", "--model", "m"), UsageError, "--show takes one record"),
        (("--show", "1", "--export", "x.csv"), UsageError, "--show takes one record"),
        (("--out", "x.html"), UsageError, "need --show"),
        (("--profile", "p"), UsageError, "need --show"),
        (("--since", "soon"), UsageError, "is not a time"),
        (("--export", "x.xls"), UsageError, "must end in one of"),
        (("--show", "9"), EvidenceError, "has no record 9"),
    ],
)
def test_what_cannot_be_done_is_said(run: Run, options: tuple[str, ...], error: type[GuardError], message: str) -> None:
    result = run(*options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)


def test_a_log_that_is_not_there_is_said(run: Run, log: Path) -> None:
    log.unlink()
    assert isinstance(run().exception, EvidenceError)
