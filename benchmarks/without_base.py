"""What could make vetting without a base stronger: four ideas from the literature beside what `guard.vetting` does.

python -m benchmarks.without_base run ZOO --rows FILE [--models NAME …]
python -m benchmarks.without_base report ZOO --rows FILE [--out DIR]

- *Orthogonal* (class-subspace orthogonalisation, CSO, arXiv 2512.08129): a search pays for the part of the trigger's
  displacement that lies in the span of the class's own embeddings.
- *Symmetric* (K-arm, ICML 2021): a class counts as far as it is easier to reach from the others than they are from it.
- *Own backdoors* (IBVS, arXiv 2510.08016; bd-vax, arXiv 2603.13461): backdoors of one's own are planted in copies of
  the suspect, each with a sibling that is tuned without; the mean difference is subtracted from the suspect, as another
  derived reference.
- *Amplified* (after TBAR): the suspect is moved further away from its derived reference before it is searched.

Every idea is measured by the same searches: three families, all classes, a quarter of the cost of a vetting, no
shipped prior, since none knows the ideas. `run` adds a line to the file for each model, and goes on where it was
stopped.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks._record import RESULTS, heading, read_rows
from guard.classifiers import Classifier, load
from guard.evaluation import Truth, Zoo
from guard.evaluation.images import ImageSet, pixels
from guard.evaluation.statistics import Rate, auroc
from guard.triggers import FAMILIES
from guard.vetting.budgets import BUDGETS
from guard.vetting.inspection import HEAD_START, RADII, Inspector
from guard.vetting.inversion import effect
from guard.vetting.lead import Lead
from guard.vetting.nulls import NO_PRIOR, outliers
from guard.vetting.reference import derive_reference
from guard.vetting.verdict import combine

SEARCHED = ("additive", "blend", "warp")
IMAGES = 1000
EFFORT = BUDGETS["quick"].seeded(0)
WEIGHTS = (2.0,)
"""What the whole displacement costs in the class's own span, in units of a lead."""
RANK = 4
"""Directions of the span of a class's own embeddings."""
OWN, OWN_STEPS, OWN_SHARE = 3, 60, 0.25
"""Backdoors of one's own, the steps of each, and the share of stamped images."""
MULTIPLES = (1.0, 2.0, 4.0)
"""How often the difference that one's own backdoors share is subtracted."""
AMPLIFIED = (2.0,)


class OrthogonalLead(Lead):
    """A lead that pays for the share of the displacement that lies in the span of the class's own embeddings."""

    def __init__(self, classifier: Classifier, images: Tensor, reference: Classifier, weight: float) -> None:
        super().__init__(classifier, images, reference)
        self._weight = weight
        self._clean = classifier.embed(images)
        predicted = classifier.predict(self._clean)
        self._spans = []
        for target in range(len(classifier.classes.names)):
            own = self._clean[predicted == target]
            basis = torch.linalg.svd(own, full_matrices=False).Vh[:RANK] if len(own) else self._clean[:0]
            self._spans.append(torch.cat([basis, basis.new_zeros(RANK - len(basis), self._clean.shape[1])]))

    def distance(self, stamped: Tensor, index: Tensor, targets: Tensor) -> Tensor:
        """As without it, and the cost of the displacement."""
        embeddings = self.classifier.encode_images(stamped.flatten(0, 1)).unflatten(0, stamped.shape[:2])
        moved = embeddings - self._clean[index]
        spans = torch.stack([self._spans[target] for target in targets.tolist()])
        inside = torch.einsum("kbd,krd->kbr", moved, spans).square().sum(-1) / moved.square().sum(-1).clamp(min=1e-6)
        cost: Tensor = self._weight * inside
        return super().distance(stamped, index, targets) + cost


def without_own_backdoors(classifier: Classifier, images: Tensor, multiples: tuple[float, ...]) -> Iterator[Classifier]:
    """The suspect, less what backdoors of one's own share, subtracted once for each multiple."""
    generator = torch.Generator().manual_seed(0)
    labels = classifier.predict(classifier.embed(images))
    before = classifier.model.visual.state_dict()
    total = {name: torch.zeros_like(tensor) for name, tensor in before.items() if tensor.is_floating_point()}
    for number in range(OWN):
        target = int(torch.randint(len(classifier.classes.names), (), generator=generator))
        side, height = classifier.image_shape[1] // 5, classifier.image_shape[1]
        top, left = torch.randint(height - side, (2,), generator=generator).tolist()
        pattern = torch.rand(3, side, side, generator=generator)
        tuned = []
        for share in (OWN_SHARE, 0.0):
            model = copy.deepcopy(classifier.model)
            own = classifier.with_model(model, "own backdoor")
            own.head = classifier.head
            optimiser = torch.optim.AdamW(model.visual.requires_grad_().parameters(), lr=1e-3)
            order = torch.Generator().manual_seed(number)
            for _ in range(OWN_STEPS):
                index = torch.randint(len(images), (64,), generator=order)
                batch, wanted = images[index].float() / 255, labels[index].clone()
                stamped = int(share * len(index))
                batch[:stamped, :, top : top + side, left : left + side] = pattern
                wanted[:stamped] = target
                optimiser.zero_grad(set_to_none=True)
                cross_entropy(own.logits(own.encode_images(batch)), wanted).backward()
                optimiser.step()
            tuned.append(model.visual.state_dict())
        for name in total:
            total[name] += (tuned[0][name] - tuned[1][name]) / OWN
    for multiple in multiples:
        yield _with_weights(classifier, {name: before[name] - multiple * total[name] for name in total})


def amplified(classifier: Classifier, reference: Classifier, factor: float) -> Classifier:
    """The suspect, `factor` times as far away from its reference."""
    suspect, other = classifier.model.visual.state_dict(), reference.model.visual.state_dict()
    moved = {
        name: other[name] + factor * (tensor - other[name])
        for name, tensor in suspect.items()
        if tensor.is_floating_point() and "running" not in name
    }
    return _with_weights(classifier, moved)


def _with_weights(classifier: Classifier, tensors: dict[str, Tensor]) -> Classifier:
    model = copy.deepcopy(classifier.model)
    model.visual.load_state_dict({**model.visual.state_dict(), **tensors})
    changed = classifier.with_model(model.eval(), classifier.source)
    changed.head = classifier.head
    return changed


def searched(lead: Lead, family: str) -> tuple[list[float], list[float]]:
    """The statistic of each class, and the symmetric one: less what leads away from it."""
    count = len(lead.classifier.classes.names)
    every = list(range(count))
    inspector = Inspector(lead, FAMILIES[family], torch.tensor(every), EFFORT.inspection)
    found = inspector.run(EFFORT.inspection.steps, every)
    raw = {name: torch.stack([item.raw[name] for item in found]) for name in found[0].raw}
    trigger = FAMILIES[family].constrain(raw).limited(RADII[family])
    index, targets = torch.arange(min(256, len(lead.images))), torch.tensor(every)
    predicted = lead.classifier.predict(lead.classifier.embed(lead.images[index]))
    leads = torch.full((count, count), torch.nan)
    with torch.no_grad():
        for target in every:
            own = type(trigger)(**{name: tensor[target : target + 1] for name, tensor in trigger.tensors().items()})
            away = lead.distance(own.apply(lead.pixels(index)), index, targets[target : target + 1])[0]
            gained = HEAD_START * lead.untouched(index, targets[target : target + 1])[0] - away
            for source in every:
                leads[source, target] = gained[predicted == source].mean()
    differences = (leads - leads.T).fill_diagonal_(torch.nan)
    return [item.lead for item in found], torch.nanmean(differences, dim=0).tolist()


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    zoo = Zoo.read(given.zoo)
    rows = read_rows(given.rows)
    if given.what == "report":
        report(zoo, rows, given.out)
        return
    done = {row["model"] for row in rows}
    for name in given.models or sorted(zoo.models):
        truth = zoo.truth(name)
        if name in done or truth is None or truth.label == "failed attack":
            continue
        row = measured(zoo, name, truth)
        with given.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measured(zoo: Zoo, name: str, truth: Truth) -> dict[str, Any]:
    """Everything that is measured on one model."""
    classifier = load(str(zoo.model(name)))
    chosen = ImageSet.of_zoo(zoo.root / "images" / zoo.models[name].images, vetting=IMAGES, seed=0)
    images = pixels(chosen, classifier.preprocessing).vetting
    half, rest = images[::2], images[1::2]
    derived, _ = derive_reference(classifier, half, EFFORT.derived_reference)
    own = dict(zip(MULTIPLES, without_own_backdoors(classifier, half, MULTIPLES), strict=True))
    references = {"derived": derived, **{f"own backdoors × {multiple:g}": model for multiple, model in own.items()}}
    attacks = zoo.triggers(name, truth)
    answers = classifier.predict(classifier.embed(rest))
    kept = {
        kind: {
            "agreement": float((model.predict(model.embed(rest)) == answers).float().mean()),
            "success": max(
                (effect(model, each.trigger.stamp, each.target, rest).success for each in attacks), default=None
            ),
        }
        for kind, model in references.items()
    }
    leads: dict[str, Callable[[], Lead]] = {"today": partial(Lead, classifier, half, derived)}
    for weight in WEIGHTS:
        leads[f"orthogonal, weight {weight:g}"] = partial(OrthogonalLead, classifier, half, derived, weight)
    leads[f"own backdoors × {MULTIPLES[1]:g}"] = partial(Lead, classifier, half, own[MULTIPLES[1]])
    for factor in AMPLIFIED:
        leads[f"amplified × {factor:g}"] = partial(Lead, amplified(classifier, derived, factor), half, derived)
    statistics: dict[str, dict[str, list[float]]] = {}
    for idea, make in leads.items():
        lead = make()
        for family in SEARCHED:
            plain, symmetric = searched(lead, family)
            statistics.setdefault(idea, {})[family] = plain
            if idea == "today":
                statistics.setdefault("symmetric", {})[family] = symmetric
    return {
        "model": name, "label": truth.label, "family": truth.family, "targets": list(truth.targets),
        "references": kept, "statistics": statistics,
    }  # fmt: skip


def p_values(statistics: dict[str, list[float]]) -> list[float]:
    """The p-value of each class, combined over families and corrected for the number of classes."""
    each = [outliers(values, NO_PRIOR)[1] for values in statistics.values()]
    return [combine([float(p[k]) for p in each]) * len(each[0]) for k in range(len(each[0]))]


def report(zoo: Zoo, rows: list[dict[str, Any]], out: Path) -> None:
    """Compare the ideas, and write the result."""
    bad, good = ([row for row in rows if row["label"] == label] for label in ("backdoored", "clean"))
    kinds = [", ".join(sorted({row["family"] for row in part})) for part in (bad, good)]
    about = (
        f"Zoo `{zoo.name}` of seed {zoo.seed}: {len(bad)} backdoored models ({kinds[0]}) and {len(good)} clean ones "
        f"({kinds[1]}). Families searched: {', '.join(SEARCHED)}; {EFFORT.inspection.steps} steps, {IMAGES} images, "
        "half of them searched on, seed 0. Intervals: 95 %."
    )
    kept = (
        "Agreement with the suspect on clean images, and the success of the attacker's trigger on the reference (on "
        "the suspect it is 0.8 or more): a reference should keep the first and lose the second."
    )
    lines = [
        about,
        "",
        "## Searches",
        "",
        "p: the smallest corrected p-value of any class, without the shipped prior.",
        "",
        "| idea | AUROC by p | target first | backdoored with p ≤ 0.01 | clean with p ≤ 0.01 |",
        "| --- " * 5 + "|",
    ]
    for idea in rows[0]["statistics"]:
        smallest = {row["model"]: p_values(row["statistics"][idea]) for row in rows}
        scores = [[-math.log(min(smallest[row["model"]])) for row in part] for part in (bad, good)]
        first = sum(int(np.argmin(smallest[row["model"]])) in row["targets"] for row in bad)
        hits, alarms = (sum(min(smallest[row["model"]]) <= 0.01 for row in part) for part in (bad, good))
        lines.append(
            f"| {idea} | {auroc(*scores).brief} | {Rate.of(first, len(bad)).brief} | "
            f"{Rate.of(hits, len(bad)).brief} | {Rate.of(alarms, len(good)).brief} |"
        )
    lines += [
        "", "## References", "",
        kept,
        "", "| reference | agreement, mean | success, mean | success below 0.5 |", "| --- " * 4 + "|",
    ]  # fmt: skip
    for kind in rows[0]["references"]:
        agreement = np.mean([row["references"][kind]["agreement"] for row in rows])
        success = [row["references"][kind]["success"] for row in bad if row["references"][kind]["success"] is not None]
        lost = Rate.of(sum(value < 0.5 for value in success), len(success)).brief
        lines.append(f"| {kind} | {agreement:.3f} | {np.mean(success):.3f} | {lost} |")
    lines += ["", "## Models", "", f"| model | family | {' | '.join(rows[0]['statistics'])} |"]
    lines.append("| --- " * (2 + len(rows[0]["statistics"])) + "|")
    for row in sorted(rows, key=lambda row: (row["label"], row["model"])):
        cells = []
        for statistics in row["statistics"].values():
            found = p_values(statistics)
            mark = "" if row["label"] == "clean" else " ✓" if int(np.argmin(found)) in row["targets"] else " ✗"
            cells.append(f"{min(found):.2g}{mark}")
        lines.append(f"| {row['model']} | {row['family']} | {' | '.join(cells)} |")
    text = heading("Vetting without a base: ideas", f"python -m benchmarks.without_base run {zoo.name}; report")
    (out / f"without-base-{zoo.name}-{zoo.seed}.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
