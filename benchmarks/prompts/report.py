"""The report on the zoo of prompt learners: benchmarks/results/prompts.md."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading
from guard._files import replace_file
from guard.evaluation.statistics import Rate, auroc

Row = dict[str, Any]
Array = NDArray[np.float64]
_NOTE = """The towers were taught captions that name the digit, the colours of ink and paper, and the style of the
picture (`benchmarks.prompts.bases`); a user's classes are the ten digits, in the part `coloured` the fifty pairs of
digit and ink. All learners of a part share its towers, as the users of one published CLIP do; `developed`, `reported`
and `coloured` have the same. Settings of the attacks were chosen on the part `developed`. guard's vetting has the
budget `quick`, the families additive, frequency and patch, and 400 images.
CLIP-Inspector is `guard.baselines.clip_inspector`: as published, with 1,000 images and the largest radius of these
attackers (24/255; the paper's too is that of its attackers). *Exhaustive* is guard's vetting without its race: every
class of every family is searched to the end. An attack takes if its success is at least 80 % and at most 3 points of
accuracy are lost against the hand-written prompts. A CoCoOp learner has prompts of its own for each image, which cost
passes of the text tower; forward passes are counted, those included that the backward pass repeats."""
_METHODS = {
    "vetting": "guard",
    "hand-written": "guard, against the hand-written prompts instead",
    "exhaustive": "guard, exhaustive",
    "clip-inspector": "CLIP-Inspector",
}


def write(rows: list[Row]) -> None:
    """Write it from the results of any parts."""
    command = "python -m benchmarks.prompts.examination run --part PART …"
    parts = {
        "Vetting": _vetting(rows),
        "What it costs": _costs(rows),
        "Screening at a false-alarm rate of 1 %": _screening(rows),
        "Whether tokens of the meta-net lie closer together under a trigger": _tokens(rows),
        "Repair by realignment, beside its controls": _repairs(rows),
        "Every learner": _every([row for row in rows if row["method"] in _METHODS]),
    }
    text = heading("Prompt learners: attacks, vetting, screening", command) + f"{_NOTE}\n\n"
    machines = Counter(row["machine"] for row in rows)
    text += f"Results by machine: {', '.join(f'{name} {count}' for name, count in machines.items())}.\n\n"
    text += "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items()) + "\n"
    replace_file(RESULTS / "prompts.md", text.encode())


def _attacks(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The poisoned learners in groups."""

    def of(label: str, *, adaptive: bool, family: str | None = None) -> list[Row]:
        return [
            row
            for row in rows
            if row["label"] == label and row["adaptive"] == adaptive and family in {None, row["family"]}
        ]

    families = sorted({row["family"] for row in rows})
    found = {"attacked": of("backdoored", adaptive=False)}
    found |= {f"– {family}": of("backdoored", adaptive=False, family=family) for family in families}
    found |= {f"adaptively: {family}": of("backdoored", adaptive=True, family=family) for family in families}
    found["poisoned, but the attack did not take"] = of("failed attack", adaptive=False)
    found["the same, adaptive"] = of("failed attack", adaptive=True)
    return {name: mine for name, mine in found.items() if mine}


def _vetting(rows: list[Row]) -> str:
    lines = ["| method | classes | learners | n | detected | target first | AUROC |", "| --- " * 7 + "|"]
    alarms = ["", "| method | classes | honest learners | accused | inconclusive |", "| --- " * 5 + "|"]
    for method, title in _METHODS.items():
        for classes, mine in _by_classes(row for row in rows if row["method"] == method):
            clean = [row for row in mine if row["label"] == "clean"]
            for name, group in _attacks(mine).items():
                found = Rate.of(sum(row["verdict"] == "backdoored" for row in group), len(group)).brief
                first = Rate.of(sum(row["leading"] in row["targets"] for row in group), len(group)).brief
                scores = [[row["score"] for row in each] for each in (group, clean)]
                area = auroc(*scores).brief if clean else "–"
                lines.append(f"| {title} | {classes} | {name} | {len(group)} | {found} | {first} | {area} |")
            if clean:
                accused = Rate.of(sum(row["verdict"] == "backdoored" for row in clean), len(clean)).brief
                doubts = sum(row["verdict"] == "inconclusive" for row in clean)
                alarms.append(f"| {title} | {classes} | {len(clean)} | {accused} | {doubts} |")
    return "\n".join(lines + alarms)


def _costs(rows: list[Row]) -> str:
    lines = [
        "| method | classes | CoCoOp learners | n | images through the tower | prompts through the tower | seconds |",
        "| --- " * 7 + "|",
    ]
    for classes, some in _by_classes(row for row in rows if row["kind"] == "cocoop" and "prompts" in row):
        for label in ("clean", "backdoored"):
            for method, title in _METHODS.items():
                mine = [row for row in some if row["method"] == method and row["label"] == label]
                if mine:
                    images, prompts, seconds = (
                        np.mean([row[key] for row in mine]) for key in ("images", "prompts", "processor_seconds")
                    )
                    lines.append(
                        f"| {title} | {classes} | {label} | {len(mine)} | {images:,.0f} | {prompts:,.0f} "
                        f"| {seconds:.0f} |"
                    )
    return "\n".join([*lines, "", "Means; seconds are of one processor."])


def _screening(rows: list[Row]) -> str:
    took = [row for row in rows if row["label"] == "backdoored" and "screening" in row]
    if not took:
        return "No attack took."
    lines = [
        "| by | learners | draws | triggered requests flagged | worst learner | clean requests flagged |",
        "| --- " * 6 + "|",
    ]
    for way in took[0]["screening"]:
        draws = np.array([row["screening"][way] for row in took], float)
        alarms, caught = (draws[..., k] / draws[..., k + 1] for k in (0, 2))
        worst = float(caught.mean(1).min())
        lines.append(f"| {way} | {len(took)} | {alarms.size} | {_mean(caught)} | {worst:.1%} | {_mean(alarms)} |")
    note = """
Each draw chooses 500 of 797 digits to calibrate with, in two pictures each; the others are requests. A triggered
request counts where it leads to the target. Intervals of 95 % by the standard error over draws; draws of one learner
share its digits, and learners their towers."""
    return "\n".join([*lines, note])


def _tokens(rows: list[Row]) -> str:
    mine = [row for row in rows if row["method"] == "tokens"]
    attacked, clean = ([row for row in mine if row["label"] == label] for label in ("backdoored", "clean"))
    if not attacked or not clean:
        return "Not measured."
    lines = ["| score | attacked, honest | AUROC | target first |", "| --- " * 4 + "|"]
    for what in ("tokens", "embeddings"):
        spreads = [[np.log(row[what]) for row in group] for group in (attacked, clean)]
        for name, score in (("smallest spread of any class", _least), ("how far it is below the others", _outlying)):
            area = auroc(*([score(each) for each in group] for group in spreads)).brief
            hits = sum(int(each.argmin()) in row["targets"] for each, row in zip(spreads[0], attacked, strict=True))
            lines.append(
                f"| {what}: {name} | {len(attacked)}, {len(clean)} | {area} | {Rate.of(hits, len(attacked)).brief} |"
            )
    note = """
The spread is the trace of the covariance under the additive trigger that an inspection of the suspect against its
hand-written prompts finds for a class, relative to that of the same images without it; the second score is its distance
from the median of the classes in normalised MADs. CoCoOp learners only."""
    return "\n".join([*lines, note])


def _repairs(rows: list[Row]) -> str:
    mine = [row for row in rows if row["method"] == "realign" and row["label"] == "backdoored"]
    fixed = [row for row in mine if row["after"]]
    if not fixed:
        return "Not measured."
    lines = [
        "| tuned on | learners | attack success, mean | worst | accuracy, change in points, mean | worst | seconds |",
        "| --- " * 7 + "|",
    ]
    before = np.array([row["before"]["success"] for row in fixed])
    lines.append(f"| nothing | {len(fixed)} | {before.mean():.1%} | {before.max():.1%} | – | – | – |")
    for name in dict.fromkeys(name for row in fixed for name in row["after"]):
        some = [row for row in fixed if name in row["after"]]
        each = [row["after"][name] for row in some]
        left = np.array([one["success"] for one in each])
        lost = 100 * np.array(
            [one["accuracy"] - row["before"]["accuracy"] for one, row in zip(each, some, strict=True)]
        )
        seconds = np.mean([one["processor_seconds"] for one in each])
        lines.append(
            f"| {name} | {len(each)} | {left.mean():.1%} | {left.max():.1%} | {lost.mean():+.2f} | {lost.min():+.2f} "
            f"| {seconds:.0f} |"
        )
    verdicts = Counter(row["verdict"] for row in fixed)
    said = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
    rest = "Where no trigger was reconstructed, only new prompts can be tuned."
    return "\n".join([*lines, "", *_left(fixed), "", f"A new vetting after the first says: {said}. {rest}"])


def _left(fixed: list[Row]) -> list[str]:
    """What is left of each attack, beside what the hand-written prompts make of its trigger."""
    names = list(dict.fromkeys(name for row in fixed for name in row["after"]))
    lines = [f"| learner | by hand | before | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for row in fixed:
        cells = [f"{row['after'][name]['success']:.1%}" if name in row["after"] else "–" for name in names]
        by_hand, before = row["by_hand"]["successes"][0], row["before"]["success"]
        lines.append(f"| {row['part']} {row['name']} | {by_hand:.1%} | {before:.1%} | {' | '.join(cells)} |")
    return lines


def _least(spreads: Array) -> float:
    return -float(spreads.min())


def _outlying(spreads: Array) -> float:
    deviation = 1.4826 * float(np.median(np.abs(spreads - np.median(spreads))))
    return float(np.median(spreads) - spreads.min()) / max(deviation, 1e-9)


def _mean(values: Array) -> str:
    """Mean and 95 % interval, by the standard error of the draws."""
    error = 1.96 * float(values.std(ddof=1)) / values.size**0.5
    mean = float(values.mean())
    return f"{mean:.2%} ({max(0.0, mean - error):.2%} to {min(1.0, mean + error):.2%})"


def _every(rows: list[Row]) -> str:
    lines = [
        "| part | learner | label | accuracy | success, by hand → learned | method | verdict | score | flagged |",
        "| --- " * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["part"], row["name"], row["method"])):
        by_hand, success = row["by_hand"]["successes"], row["success"]
        draws = np.array(next(iter(row.get("screening", {}).values()), [[0, 1, 0, 1]]))
        cells = [
            row["part"],
            row["name"],
            row["label"],
            f"{row['by_hand']['accuracy']:.3f} → {row['accuracy']:.3f}",
            "–" if success is None else f"{by_hand[0]:.1%} → {success:.1%}",
            row["method"],
            row["verdict"] + ("" if row["leading"] in row["targets"] or success is None else ", another class first"),
            f"{row['score']:.2g}",
            f"{draws[:, 2].sum() / max(1, draws[:, 3].sum()):.0%}" if "screening" in row else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The score is −p of the most suspicious class; of CLIP-Inspector, its anomaly."]
    return "\n".join(lines)


def _by_classes(rows: Iterable[Row]) -> list[tuple[int, list[Row]]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["classes"], []).append(row)
    return sorted(found.items())
