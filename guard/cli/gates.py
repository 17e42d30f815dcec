"""Results in the forms that CI systems read: SARIF 2.1.0 and JUnit XML. Exit codes do not depend on them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from xml.etree.ElementTree import Element, SubElement, tostring

import click

from guard import __version__
from guard._files import replace_file
from guard.cli import options

if TYPE_CHECKING:
    from guard.certificates import Admission
    from guard.vetting import Verdict

Command = TypeVar("Command", bound=Callable[..., Any])
Kind = Literal["pass", "fail", "open"]
"""As in SARIF: `open` is what could not be decided."""
_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_RULES = {
    "guard/backdoor-vetting": "The model shows no evidence of a backdoor.",
    "guard/certificate": "The model is certified in a way that the trust policy accepts.",
}


@dataclass(frozen=True)
class Gate:
    """One result.

    Attributes:
        rule: What was checked: a key of `_RULES`.
        kind: The result.
        message: One sentence.
        model: The model, as the user named it.
    """

    rule: str
    kind: Kind
    message: str
    model: str


def outputs(command: Command) -> Command:
    """The options `--sarif` and `--junit`."""
    for name, what in (("--junit", "JUnit XML"), ("--sarif", "SARIF 2.1.0")):
        command = click.option(
            name, type=options.PATH, help=f"Also write the result to this file, as {what} for a CI system."
        )(command)
    return command


def of_verdict(verdict: "Verdict", model: str) -> Gate:
    """The result of a vetting."""
    kinds: dict[str, Kind] = {"no evidence": "pass", "backdoored": "fail", "inconclusive": "open"}
    reasons = "; ".join(verdict.reasons)
    return Gate("guard/backdoor-vetting", kinds[verdict.outcome], f"verdict: {verdict.outcome}: {reasons}", model)


def of_admission(admission: "Admission") -> Gate:
    """The decision about a certificate."""
    kind: Kind = "pass" if admission.admitted else "open" if code_of_admission(admission) == 3 else "fail"
    return Gate("guard/certificate", kind, str(admission), admission.source)


def code_of_admission(admission: "Admission") -> int:
    """The exit code of `guard verify`."""
    if admission.admitted:
        return 0
    return 3 if (admission.rule, admission.verdict) == ("verdicts", "inconclusive") else 1


def write(sarif: Path | None, junit: Path | None, gate: Gate) -> None:
    """Write the files that were asked for.

    Raises:
        UsageError: A file cannot be written.
    """
    if sarif is not None:
        replace_file(sarif, json.dumps(_sarif(gate), indent=1, ensure_ascii=False).encode() + b"\n")
    if junit is not None:
        replace_file(junit, _junit(gate))


def _sarif(gate: Gate) -> dict[str, Any]:
    driver = {
        "name": "guard",
        "version": __version__,
        "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in _RULES.items()],
    }
    result = {
        "ruleId": gate.rule,
        "kind": gate.kind,
        # A level is only said of what failed; see section 3.27.10 of the standard.
        "level": "error" if gate.kind == "fail" else "none",
        "message": {"text": gate.message},
        "locations": [{"logicalLocations": [{"fullyQualifiedName": gate.model, "kind": "resource"}]}],
    }
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": [result]}]}


def _junit(gate: Gate) -> bytes:
    failed = int(gate.kind != "pass")
    suite = Element("testsuite", name="guard", tests="1", failures=str(failed), errors="0")
    case = SubElement(suite, "testcase", classname=gate.rule, name=_printable(gate.model))
    if failed:
        kind = {"fail": "refused", "open": "inconclusive"}[gate.kind]
        SubElement(case, "failure", type=kind, message=_printable(gate.message))
    return bytes(tostring(suite, encoding="utf-8", xml_declaration=True)) + b"\n"


def _printable(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
