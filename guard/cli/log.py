"""`guard log`."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli import options
from guard.cli.console import Console
from guard.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guard.evidence import EvidenceLog, Record, RecordFilter

LISTED = 50
_POLL_SECONDS = 0.5
_HEAD = (
    "id", "time", "model", "decision", "class", "reference", "decided by", "p-value", "second look", "request", "image",
    "text",
)  # fmt: skip


@click.command()
@click.argument("path", type=options.PATH)
@click.option(
    "--since",
    metavar="TIME",
    help="Only records from this time on. The time is in RFC 3339 form, or says how long ago it was: 15m, 1h or 2d.",
)
@click.option(
    "--until",
    metavar="TIME",
    help="Only records before this time. The time is in RFC 3339 form, or says how long ago it was: 15m, 1h or 2d.",
)
@click.option("--model", metavar="NAME", help="Only records of the model with this name.")
@click.option("--decision", help="Only records with this decision, such as flag.")
@click.option(
    "--class",
    "predicted",
    metavar="NAME",
    help="Only records of images for which the model predicted this class.",
)
@click.option(
    "--decided-by", metavar="SCORE", help="Only records that this score decided, such as divergence or k-distance."
)
@click.option("--trigger", metavar="ID", help="Only records of images that match the trigger with this ID.")
@click.option("--request", "request_id", metavar="ID", help="Only records of the request with this ID.")
@click.option("--p-value", type=click.FloatRange(0, 1), help="Only records with a p-value of at most this.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"Maximum number of records, beginning with the newest.  [default: {LISTED} to list, all to export]",
)
@click.option(
    "--offset",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of records to skip, beginning with the newest.",
)
@click.option(
    "--follow",
    is_flag=True,
    help="List the newest records, then each new record until Ctrl-C. With --json, each line is one JSON document.",
)
@click.option(
    "--export",
    "exported",
    type=options.PATH,
    metavar="FILE",
    help="Write the records to this .csv, .jsonl or .parquet file instead of listing them.",
)
@click.option(
    "--show",
    type=int,
    metavar="RECORD",
    help="Write an HTML page with the details and the pictures of this record, instead of listing records.",
)
@click.option("--out", type=options.PATH, help="HTML file that --show writes.  [default: record-RECORD.html]")
@click.option(
    "--profile",
    type=options.PATH,
    help="Profile of the model, from which --show takes a picture of the trigger.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["guard", "ocsf"]),
    default="guard",
    show_default=True,
    help="Form of the records that --export FILE.jsonl and --follow --json write: guard has the fields of the log; "
    "ocsf is a Detection Finding of the Open Cybersecurity Schema Framework, for SIEM systems.",
)
@options.as_json
def log(
    path: Path,
    limit: int | None,
    offset: int,
    exported: Path | None,
    show: int | None,
    out: Path | None,
    profile: Path | None,
    form: str,
    *,
    follow: bool,
    as_json: bool,
    **conditions: Any,  # noqa: ANN401 - click's values for the filter
) -> None:
    """List, export or show the flagged requests in the evidence log PATH of a sidecar.

    PATH is the file of the log, or the folder that guard serve has as --state-dir. The sidecar may be running. Times
    are in UTC.
    """
    from guard.evidence import EVIDENCE_FILE, EvidenceLog, Record, RecordFilter, detection_finding, export

    filtered = any(value is not None for value in conditions.values())
    if show is not None and (exported is not None or limit is not None or offset or follow or filtered):
        raise UsageError("--show takes one record, and cannot be combined with filters, --follow or --export")
    if follow and (exported is not None or offset or conditions["until"] is not None):
        raise UsageError("--follow cannot be combined with --export, --offset or --until")
    if show is None and (out is not None or profile is not None):
        raise UsageError("--out and --profile need --show")
    jsonl = exported is not None and exported.suffix.lower() == ".jsonl"
    if form == "ocsf" and not jsonl and not (follow and as_json):
        raise UsageError("--format ocsf needs --export FILE.jsonl, or --follow with --json")
    document = detection_finding if form == "ocsf" else Record.document
    console, wanted = Console(as_json=as_json), RecordFilter(**conditions)
    opened = EvidenceLog(path / EVIDENCE_FILE if path.is_dir() else path)
    if show is not None:
        _show(opened.get(show), out or Path(f"record-{show}.html"), profile, console)
    elif exported is not None:
        count = export(opened.records(wanted, limit=limit, offset=offset), exported, document=document)
        console.result({"exported": count, "file": str(exported)}, f"{count} records: {exported}")
    elif follow:
        # Ctrl-C is the way to end it.
        with suppress(KeyboardInterrupt):
            _follow(opened, wanted, limit or LISTED, document if as_json else None)
    else:
        _list(opened, wanted, limit or LISTED, offset, console)


def _show(record: "Record", out: Path, profile: Path | None, console: Console) -> None:
    from guard._files import replacing
    from guard.evidence import record_page
    from guard.profiles import Profile

    page = record_page(record, None if profile is None else Profile.open(profile))
    with replacing(out, mode=0o600) as file:
        file.write(page.encode())
    console.result({**record.document(), "page": str(out)}, f"page: {out}")


def _list(opened: "EvidenceLog", wanted: "RecordFilter", limit: int, offset: int, console: Console) -> None:
    count, records = opened.count(wanted), list(opened.records(wanted, limit=limit, offset=offset))
    text = _table(records)
    if len(records) < count:
        text += f"\n{len(records)} of {count} records; --limit and --offset select others"
    console.result({"count": count, "records": [record.document() for record in records]}, text)


def _follow(
    opened: "EvidenceLog", wanted: "RecordFilter", limit: int, document: "Callable[[Record], dict[str, Any]] | None"
) -> None:
    """Print the newest records, and each further record when it is written: as JSON if there is a form for it."""
    records, last = list(opened.records(wanted, limit=limit))[::-1], 0
    widths = _widths(records)
    if document is None:
        click.echo(_line(_HEAD, widths))
    while True:
        for record in records:
            click.echo(json.dumps(document(record), ensure_ascii=False) if document else _line(_cells(record), widths))
            last = record.id
        if not records:
            time.sleep(_POLL_SECONDS)
            if opened.newest < last:
                # The log was replaced by a new one.
                last = 0
        records = opened.after(last, wanted)


def _table(records: "Sequence[Record]") -> str:
    if not records:
        return "no records"
    widths = _widths(records)
    return "\n".join([_line(_HEAD, widths), *(_line(_cells(record), widths) for record in records)])


def _cells(record: "Record") -> tuple[str, ...]:
    # A log of an older guard names the trigger that matches best, and not what decided.
    decided_by = record.decided_by or record.trigger
    return (
        str(record.id),
        record.time,
        *(_short(text) for text in (record.model, record.decision, record.predicted, record.reference, decided_by)),
        "–" if record.p_value is None else f"{record.p_value:.2g}",
        _short(record.second_look),
        _short(record.request_id),
        str(record.image),
        _short(record.text),
    )


def _widths(records: "Sequence[Record]") -> list[int]:
    return [max(map(len, column)) for column in zip(_HEAD, *map(_cells, records), strict=True)]


def _line(cells: "Sequence[str]", widths: "Sequence[int]") -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _short(text: str) -> str:
    """The text of a cell, shortened; JSON and page contain the whole text."""
    return text if len(text) <= 24 else f"{text[:23]}…"
