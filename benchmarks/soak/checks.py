"""What must hold at the end, and how it is shown."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.soak.load import ANSWERED, Ended


@dataclass(frozen=True)
class Check:
    """A count, and the bounds that it must lie in.

    Attributes:
        what: Is counted.
        found: How many.
        least: At least.
        most: At most; None for `least`.
    """

    what: str
    found: int
    least: int = 0
    most: int | None = None

    @property
    def holds(self) -> bool:
        """Whether it lies there."""
        return self.least <= self.found <= (self.least if self.most is None else self.most)

    @property
    def row(self) -> str:
        """As a row of a table."""
        expected = f"{self.least:,}" + ("" if self.most in {None, self.least} else f" to {self.most:,}")
        return f"| {self.what} | {self.found:,} | {expected} | {'yes' if self.holds else '**no**'} |"


@dataclass(frozen=True)
class Part:
    """A part of the result.

    Attributes:
        lines: What was seen.
        checks: What must hold.
        errors: Some of what should not have happened.
    """

    lines: Sequence[str]
    checks: Sequence[Check]
    errors: Sequence[str]

    @property
    def text(self) -> str:
        """As Markdown."""
        table = [
            "| what | found | expected | holds |",
            "| --- | --- | --- | --- |",
            *(item.row for item in self.checks),
        ]
        return "\n".join([*self.lines, "", *table, *([""] if self.errors else []), *self.errors, ""])


def delivered(ended: Sequence[Ended], arrivals: Mapping[int, int], beforehand: Sequence[str] = ()) -> list[Check]:
    """How often messages reached the upstream server.

    Args:
        ended: All messages.
        arrivals: How often each number arrived.
        beforehand: Kinds that guard refuses without forwarding them.
    """
    once = [item for item in ended if item.outcome in ANSWERED]
    return [
        Check("answered, and delivered upstream other than once", sum(arrivals.get(i.number, 0) != 1 for i in once)),
        Check("delivered upstream more than once", sum(count > 1 for count in arrivals.values())),
        Check("refused beforehand, and delivered", sum(i.number in arrivals for i in ended if i.kind in beforehand)),
        Check("delivered upstream, and never sent", len(arrivals.keys() - {item.number for item in ended})),
    ]


def noted(ended: Sequence[Ended], evidence: Sequence[tuple[int, int]], dropped: int = 0) -> list[Check]:
    """What is in the evidence log.

    Args:
        ended: All messages.
        evidence: Number and row of each record.
        dropped: Records that the sidecar counted as lost.
    """

    def flagged(items: Sequence[Ended]) -> set[tuple[int, int]]:
        return {(item.number, row) for item in items for row, flag in enumerate(item.flags) if flag}

    known, possible = flagged([item for item in ended if item.outcome in ANSWERED]), flagged(ended)
    return [
        Check("flagged images that the evidence log lacks", len(known - set(evidence)), 0, dropped),
        Check("images in it twice", sum(count > 1 for count in Counter(evidence).values())),
        Check("images in it that are not to be flagged", len(set(evidence) - possible)),
    ]
