"""The report on the zoo of prompt learners: benchmarks/results/prompts.md."""

from collections.abc import Iterable
from typing import Any

from benchmarks._record import RESULTS, heading
from guard._files import replace_file
from guard.evaluation.statistics import Rate, auroc

_NOTE = """The towers were taught captions that name the digit, the colours of ink and paper, and the style of the
picture (`benchmarks.prompts.bases`); a user's classes are the ten digits. All learners share them, as the users of one
published CLIP do. Settings of the attacks were chosen on other learners (part `developed`). Vetting is guard's, with
the budget `quick`, the families additive, frequency and patch, and 400 images; nothing of it was chosen here. An attack
takes if its success is at least 80 % and at most 3 points of accuracy are lost against the hand-written prompts.
"""


def write(rows: list[dict[str, Any]], part: str, note: str) -> None:
    """Write it of a part of the zoo, with a note on what was measured."""
    command = f"python -m benchmarks.prompts.examination run --part {part}"
    text = heading("Prompt learners: attacks, vetting, screening", command) + f"{_NOTE}\n"
    parts = [note] * bool(note)
    for reference in dict.fromkeys(row["reference"] for row in rows):
        mine = [row for row in rows if row["reference"] == reference]
        parts.append(f"## Vetting against {_REFERENCES[reference]}\n\n{_vetting(mine)}")
    own = [row for row in rows if row["reference"] == "hand-written"]
    parts += [f"## Screening at a false-alarm rate of 1 %\n\n{_screening(own)}", f"## Every learner\n\n{_every(rows)}"]
    replace_file(RESULTS / "prompts.md", (text + "\n\n".join(parts) + "\n").encode())


_REFERENCES = {"hand-written": "the hand-written prompts", "fresh": "freshly tuned prompts"}


def _vetting(rows: list[dict[str, Any]]) -> str:
    clean = [row for row in rows if row["label"] == "clean"]
    lines = ["| learners | n | detected | target first | AUROC |", "| --- | --- | --- | --- | --- |"]
    groups = {
        "attacked": [row for row in rows if row["label"] == "backdoored" and not row["adaptive"]],
        "attacked adaptively": [row for row in rows if row["label"] == "backdoored" and row["adaptive"]],
        "poisoned, but the attack did not take": [row for row in rows if row["label"] == "failed attack"],
    }
    for name, mine in groups.items():
        if not mine:
            continue
        found = Rate.of(sum(row["verdict"] == "backdoored" for row in mine), len(mine)).brief
        first = Rate.of(sum(row["leading"] in row["targets"] for row in mine), len(mine)).brief
        area = auroc([-row["p_value"] for row in mine], [-row["p_value"] for row in clean]).brief if clean else "–"
        lines.append(f"| {name} | {len(mine)} | {found} | {first} | {area} |")
    if clean:
        alarms = Rate.of(sum(row["verdict"] == "backdoored" for row in clean), len(clean)).brief
        doubts = sum(row["verdict"] == "inconclusive" for row in clean)
        lines += ["", f"False alarms on clean learners: {alarms}; inconclusive: {doubts}."]
    passes = [row["passes"] for row in rows]
    seconds = [row["processor_seconds"] for row in rows]
    lines.append(
        f"Passes of images through the tower: {_mean(passes):,.0f} a learner; {_mean(seconds):.0f} s of one processor."
    )
    return "\n".join(lines)


def _screening(rows: list[dict[str, Any]]) -> str:
    took = [row for row in rows if row["label"] == "backdoored" and "screening" in row]
    if not took:
        return "No attack took."
    lines = ["| by | learners | triggered requests flagged | worst learner | clean requests flagged |"]
    lines.append("| --- " * 5 + "|")
    for way in took[0]["screening"]:
        found = [row["screening"][way] for row in took]
        detected, alarms = ([sum(each[part][k] for each in found) for k in (0, 1)] for part in _PARTS)
        worst = min(each["detected"][0] / max(1, each["detected"][1]) for each in found)
        rates = Rate.of(*detected).brief, f"{worst:.1%}", Rate.of(*alarms).brief
        lines.append(f"| {way} | {len(found)} | {' | '.join(rates)} |")
    lines += [
        "",
        "Intervals are of requests, and do not cover how learners differ. A triggered request counts where it leads to",
    ]
    lines[-1] += " the target."
    return "\n".join(lines)


_PARTS = ("detected", "false_alarms")


def _every(rows: list[dict[str, Any]]) -> str:
    lines = ["| learner | label | accuracy | success, by hand → learned | reference | verdict | p | passes | flagged |"]
    lines.append("| --- " * 9 + "|")
    for row in sorted(rows, key=lambda row: (row["name"], row["reference"])):
        by_hand, success = row["by_hand"]["successes"], row["success"]
        found = next(iter(row.get("screening", {}).values()), None)
        cells = [
            row["name"],
            row["label"],
            f"{row['by_hand']['accuracy']:.3f} → {row['accuracy']:.3f}",
            "–" if success is None else f"{by_hand[0]:.1%} → {success:.1%}",
            row["reference"],
            row["verdict"] + ("" if row["leading"] in row["targets"] or success is None else ", another class first"),
            f"{row['p_value']:.2g}",
            f"{row['passes']:,}",
            "–" if found is None else f"{found['detected'][0] / max(1, found['detected'][1]):.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
