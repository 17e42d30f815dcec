"""What does a second opinion find without any reconstructed trigger, and at which rate of false alarms?

python -m benchmarks.second_opinion ZOO --measured FILE [--models PATTERN] [--references base,derived,student]
                                    [--vetting BUDGET] [--note TEXT]

For each backdoored model. Triggers are hidden: screening has density and the second opinion alone. With `--vetting`,
the triggers that vetting reconstructs against the base are added in a second pass. Each model is a line of FILE, and is
not measured again. Then benchmarks/results/second-opinion-NAME.md is written; with `--vetting`,
second-opinion-together-NAME.md.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._record import RESULTS, heading, read_rows
from benchmarks.screening import CORRUPTIONS, _changed
from guard.baselines import BdetClip, Lorex
from guard.classifiers import Classifier
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet
from guard.evaluation.statistics import Rate
from guard.evaluation.subject import EvaluationSettings, Subject
from guard.profiles.calibrating import ask
from guard.screening import DENSITY, OPINIONS, Detector, ReferenceAnswers, Screen, calibration, default_k
from guard.vetting import OPINION_REFERENCE, Budget, derive_reference, teach_student

ALPHAS = (0.01, 0.001)
MIXTURES = (0.3, 0.01)
KNOWING = "agreeing"
"""How the names of recipes begin whose attacker trains against the second opinion."""
Embeddings = NDArray[np.float32]
Found = list[int]


def main() -> None:
    """Run what is missing, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--references", default="base,derived,student")
    parser.add_argument("--vetting", choices=("quick", "standard", "thorough"))
    parser.add_argument("--note", default="")
    parser.add_argument("--only-measure", action="store_true", help="Write no result, because other processes go on.")
    arguments = parser.parse_args()
    path: Path = arguments.measured
    rows = read_rows(path)
    zoo = Zoo.read(arguments.zoo)
    for subject in subjects(zoo, arguments.models, arguments.vetting or "quick"):
        if subject.name in {row["model"] for row in rows}:
            continue
        rows.append(measure(subject, arguments.references.split(","), vetting=arguments.vetting is not None))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        sys.stderr.write(f"{subject.name}: {rows[-1]['references']}\n")
    if arguments.only_measure:
        return
    vetted = f" --vetting {arguments.vetting}" if arguments.vetting else ""
    command = f"python -m benchmarks.second_opinion {zoo.name}{vetted}"
    command += f" --models '{arguments.models}'" if arguments.models != "*" else ""
    case = "together-" if arguments.vetting else ""
    name = f"second-opinion-{case}{zoo.name}{f'-{zoo.seed}' if zoo.seed else ''}.md"
    title = f"Second opinions on the zoo {zoo.name} of seed {zoo.seed}"
    note = f"{arguments.note}\n\n" if arguments.note else ""
    (RESULTS / name).write_text(heading(title, command) + note + report(rows), encoding="utf-8")


def subjects(zoo: Zoo, pattern: str, budget: Budget) -> Iterable[Subject]:
    """The backdoored models that have a base and are finished."""
    for name in zoo.select(pattern):
        truth = zoo.truth(name)
        if truth is None or truth.label != "backdoored" or zoo.models[name].base is None:
            continue
        images = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=1000, seed=0)
        yield Subject(
            zoo, name, images, EvaluationSettings(budget=budget), searches=zoo.root / "evaluation" / ".searches"
        )


def measure(subject: Subject, references: Sequence[str], *, vetting: bool) -> dict[str, Any]:
    """Everything about one model."""
    classifier, pixels = subject.classifier, subject.pixels
    if pixels.calibration is None or pixels.requests is None or subject.truth is None or subject.base is None:
        raise ValueError(f"{subject.name} lacks images, truth or base")
    images, requests = pixels.calibration, pixels.requests
    stamped = torch.cat([attack.trigger.stamp(requests[attack.requests]) for attack in subject.attacks])
    parts = calibration.split(np.arange(len(images)), 0)
    embedded = classifier.embed(images).numpy()
    triggered = torch.cat([attack.embeddings for attack in subject.attacks]).numpy()
    clean = subject.requests.numpy()
    head = np.ascontiguousarray(classifier.head.float().cpu().numpy().T)
    predicted = classifier.predict(torch.from_numpy(triggered))
    targets = torch.cat([torch.full((len(a.embeddings),), a.target) for a in subject.attacks])
    row: dict[str, Any] = {
        "model": subject.name,
        "family": subject.truth.family,
        "recipe": subject.truth.recipe,
        "success": float((predicted == targets).float().mean()),
        "accuracy": subject.truth.accuracy,
        "references": {},
    }
    found: dict[str, dict[str, tuple[int, Embeddings]]] = {"hidden": {}}
    if vetting:
        reconstructed = subject.vetting(paired=True).triggers
        found["together"] = {
            each.id: (each.target, classifier.embed(each.trigger.stamp(images[parts.banks])).numpy())
            for each in reconstructed
        }
        row["found"] = len(reconstructed)
    changed = {name: _changed(requests, change) for name, change in CORRUPTIONS.items()}
    corrupted = {name: classifier.embed(each).numpy() for name, each in changed.items()}

    def detectors(bank: dict[str, tuple[int, Embeddings]], answers: ReferenceAnswers | None) -> list[list[Detector]]:
        k = default_k(len(parts.banks), head.shape[1])
        own = None if answers is None else answers[parts.banks]
        banks, _ = calibration.fit_banks(
            embedded[parts.banks], bank, head, k=k, answers=own, scale=classifier.logit_scale
        )
        screen = Screen(banks)
        scores = screen.score_samples(embedded[parts.threshold], None if answers is None else answers[parts.threshold])
        return [[Detector(screen, scores, alpha, near_only=near) for near in (False, True)] for alpha in ALPHAS]

    for case, bank in found.items():
        row[f"alone, {case}"] = [
            [int(each.score(part).flags.sum()) for part in (triggered, clean)] for each, _ in detectors(bank, None)
        ]
    row["count"] = [len(triggered), len(clean)]
    row["baselines"] = _baselines(subject, embedded[parts.banks], embedded[parts.threshold], clean, triggered)
    for kind in references:
        reference, seconds = _reference(kind, subject, images[parts.banks])
        answers, theirs, others = (ask(reference, each) for each in (images, stamped, requests))
        base_moves = float((torch.from_numpy(theirs.logits).argmax(1) == targets).float().mean())
        entry: dict[str, Any] = {"seconds": seconds, "moves": base_moves}
        entry["agreement"] = float((others.logits.argmax(1) == (clean @ head).argmax(1)).mean())
        for case, bank in found.items():
            made = detectors(bank, answers)
            entry[case] = [
                {mode: [_flagged(each, t, a) for t, a in ((triggered, theirs), (clean, others))]
                 for mode, each in zip(("all", "near"), pair, strict=True)}
                for pair in made
            ]  # fmt: skip
            if case == "hidden":
                entry["parts"] = _parts(made, (triggered, theirs), (clean, others))
                entry["corrupted"] = {
                    name: [_flagged(pair[0], corrupted[name], ask(reference, changed[name]))[:2] for pair in made]
                    for name in corrupted
                }
        row["references"][kind] = entry
    return row


def _reference(kind: str, subject: Subject, images: torch.Tensor) -> tuple[Classifier, float]:
    started = time.monotonic()
    if kind == "base":
        if subject.base is None:
            raise ValueError(f"{subject.name} has no base")
        return subject.base, 0.0
    if kind == "student":
        made = teach_student(subject.classifier, images)
    else:
        made = derive_reference(subject.classifier, images, OPINION_REFERENCE)[0]
    return made, time.monotonic() - started


def _flagged(detector: Detector, embeddings: Embeddings, answers: ReferenceAnswers) -> Found:
    """How many are flagged, of how many, and how many got a second opinion."""
    scores = detector.screen.score_samples(embeddings)
    rows = np.flatnonzero(detector.screen.near(scores)) if detector.near_only else np.arange(len(embeddings))
    if len(rows):
        scores = detector.screen.with_opinion(scores, answers[rows], rows)
    return [int(detector.judge(scores).flags.sum()), len(embeddings), len(rows)]


def _parts(
    made: list[list[Detector]],
    triggered: tuple[Embeddings, ReferenceAnswers],
    clean: tuple[Embeddings, ReferenceAnswers],
) -> dict[str, list[Found]]:
    """Each score by itself: how many are flagged at each false-alarm rate."""
    detector = made[0][0]
    found: dict[str, list[Found]] = {}
    scored = [detector.screen.score_samples(*each) for each in (triggered, clean)]
    for name in (DENSITY, *OPINIONS):
        values = [detector.part_p_values(each)[name] for each in scored]
        found[name] = [[int((each <= alpha + 1e-9).sum()) for each in values] for alpha in ALPHAS]
    return found


def _baselines(
    subject: Subject, bank: Embeddings, behind: Embeddings, clean: Embeddings, triggered: Embeddings
) -> dict[str, list[Found]]:
    """Scores of other methods, with thresholds from the same calibration images."""
    found: dict[str, list[Found]] = {}

    def record(name: str, score: Callable[[Embeddings], NDArray[np.floating]]) -> None:
        own = np.sort(score(behind))
        values = [score(triggered), score(clean)]
        found[name] = []
        for alpha in ALPHAS:
            value = own[-int(alpha * (len(own) + 1) + 1e-9)]
            found[name].append([int((each > value).sum()) for each in values])

    for share in MIXTURES:
        rows = max(2, round(share / (1 - share) * len(clean)))
        chosen = np.random.default_rng(0).permutation(len(triggered))[:rows]
        lorex = Lorex(bank, np.concatenate([clean, triggered[chosen]]))
        record(f"LoREx, {share:.0%} of the traffic triggered", lorex.score_samples)
    bdetclip = BdetClip(subject.classifier)
    record("BDetCLIP-like", lambda part: bdetclip.score_samples(torch.from_numpy(part)).numpy())
    return found


def _kinds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The kinds of reference models that some model was measured with."""
    return [kind for kind in ("base", "derived", "student") if any(kind in row["references"] for row in rows)]


def _screenings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What screening finds, with each reference model."""
    kinds = _kinds(rows)
    success = np.mean([row["success"] for row in rows])
    lines = [
        f"{len(rows)} backdoored models (mean attack success {success:.3f}). All triggered requests count, also those",
        "that do not reach the target. Shares are means over models, with 95 % intervals by bootstrap over the models.",
        "False alarms are pooled; their exact intervals take the requests of all models as independent.",
        "",
        "| screening | TPR at 1 % | TPR at 0.1 % | clean flagged at 1 % | at 0.1 % | asked, clean |",
        "| --- " * 6 + "|",
    ]
    for case in ("hidden", "together"):
        if f"alone, {case}" not in rows[0]:
            continue
        name = "density alone" if case == "hidden" else "density and match"
        lines.append(_line(name, [(row[f"alone, {case}"], row["count"], None) for row in rows]))
        for kind in kinds:
            have = [row for row in rows if kind in row["references"]]
            for mode in ("all", "near"):
                cells = []
                for row in have:
                    entry = row["references"][kind][case]
                    values = [[each[mode][0][0], each[mode][1][0]] for each in entry]
                    cells.append((values, row["count"], entry[0][mode][1][2] / row["count"][1]))
                what = "triggers hidden" if case == "hidden" else "with reconstructed triggers"
                lines.append(_line(f"{kind}, {mode}, {what} (n = {len(have)})", cells))
    return lines


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    unknowing = [row for row in rows if not row["recipe"].startswith(KNOWING)]
    lines = []
    if 0 < len(unknowing) < len(rows):
        lines += ["## Without the attacker who trains against this very score", "", *_screenings(unknowing), ""]
    lines += ["## All models", "", *_screenings(rows)]
    kinds = _kinds(rows)
    lines += [
        "",
        "Other scores on the same models:",
        "",
        "| score | TPR at 1 % | at 0.1 % | clean flagged at 1 % | at 0.1 % | |",
        "| --- " * 6 + "|",
    ]
    for name in rows[0]["baselines"]:
        lines.append(_line(name, [(row["baselines"][name], row["count"], None) for row in rows]))
    for kind in kinds:
        have = [row for row in rows if kind in row["references"]]
        for name in OPINIONS:
            cells = [(row["references"][kind]["parts"][name], row["count"], None) for row in have]
            lines.append(_line(f"{name} from {kind} alone", cells))
    lines += [
        "",
        "## Clean requests that were changed (all, triggers hidden)",
        "",
        "| change | reference | flagged at 1 % | at 0.1 % |",
        "| --- " * 4 + "|",
    ]
    for name in CORRUPTIONS:
        for kind in kinds:
            found = [row["references"][kind]["corrupted"][name] for row in rows if kind in row["references"]]
            rates = [
                Rate.of(sum(each[k][0] for each in found), sum(each[k][1] for each in found)).brief for k in (0, 1)
            ]
            lines.append(f"| {name} | {kind} | {rates[0]} | {rates[1]} |")
    lines += ["", "## Each model (all, triggers hidden)", ""]
    lines.append(
        "| model | attack success | " + " | ".join(f"{kind}: TPR at 1 %, 0.1 %, it moves" for kind in kinds) + " |"
    )
    lines.append("| --- " * (2 + len(kinds)) + "|")
    for row in sorted(rows, key=lambda row: (row["family"], row["model"])):
        cells_ = []
        for kind in kinds:
            entry = row["references"].get(kind)
            cells_.append("–" if entry is None else ", ".join(
                [f"{each['all'][0][0] / row['count'][0]:.3f}" for each in entry["hidden"]] + [f"{entry['moves']:.3f}"]
            ))  # fmt: skip
        lines.append(f"| {row['model']} ({row['recipe']}) | {row['success']:.3f} | " + " | ".join(cells_) + " |")
    costs = defaultdict(list)
    for row in rows:
        for kind, entry in row["references"].items():
            costs[kind].append((entry["seconds"], entry["agreement"]))
    lines += ["", "Making a reference model: " + "; ".join(
        f"{kind} {np.mean([each[0] for each in values]):.0f} s, agrees on {np.mean([each[1] for each in values]):.1%} of clean requests"  # noqa: E501
        for kind, values in costs.items()
    ) + "."]  # fmt: skip
    lines.append("*It moves* is the share of triggered requests that the reference model also gives to the target.")
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Sequence[tuple[Any, Any, float | None]]) -> str:
    powers = []
    for level in range(len(ALPHAS)):
        shares = np.array([values[level][0] / count[0] for values, count, _ in cells])
        drawn = np.random.default_rng(0).choice(shares, (2000, len(shares))).mean(1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        powers.append(f"{shares.mean():.3f} ({low:.3f}–{high:.3f})")
    alarms = [
        Rate.of(sum(values[level][1] for values, _, _ in cells), sum(count[1] for _, count, _ in cells)).brief
        for level in range(len(ALPHAS))
    ]
    asked = [share for *_, share in cells if share is not None]
    return f"| {name} | " + " | ".join([*powers, *alarms, f"{np.mean(asked):.0%}" if asked else ""]) + " |"


if __name__ == "__main__":
    main()
