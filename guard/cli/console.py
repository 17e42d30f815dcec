"""The output of commands: results on standard output, everything else on standard error."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import click

from guard.diagnostics.findings import Finding


class Console:
    """Messages and progress on standard error; one result on standard output.

    Args:
        as_json: Whether the result is printed as JSON instead of text.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._last = ("", 0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the command started."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a message for the person who waits."""
        self._clear()
        click.echo(f"[{self.seconds:5.0f} s] {text}", err=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Update a line on a terminal; elsewhere, print one line for each step that was finished."""
        now = time.monotonic()
        if self._terminal and (done == total or now - self._last[1] > 0.1):
            click.echo(f"\r\x1b[K[{self.seconds:5.0f} s] {what}: {done}/{total}", err=True, nl=done == total)
            self._last = (what, now)
        elif not self._terminal and done == total and self._last[0] != what:
            self.say(f"{what}: {done}/{total}")
            self._last = (what, now)

    def _clear(self) -> None:
        if self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)

    def result(self, document: Any, text: str) -> None:  # noqa: ANN401 - any dataclass or dictionary
        """Print the result in the form that the user chose."""
        if is_dataclass(document) and not isinstance(document, type):
            document = asdict(document)
        click.echo(json.dumps(document, indent=2, ensure_ascii=False) if self._as_json else text)

    def findings(self, found: Sequence[Finding], summary: Mapping[str, bool]) -> None:
        """Print the findings, one on each line; as JSON, they follow a summary."""
        rows = [{"subject": each.subject, "status": each.status, "detail": each.detail} for each in found]
        width = max([11, *(len(each.subject) for each in found)])
        lines = [f"{each.status:7}  {each.subject:{width}}  {each.detail}" for each in found]
        self.result({**summary, "findings": rows}, "\n".join(lines))
