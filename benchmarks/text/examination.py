"""Examine every text tower of a zoo (`benchmarks.text.zoo`), and say how often guard is right.

    python -m benchmarks.text.examination run --zoo ZOO --part reported --captions CAPTIONS --results RESULTS.jsonl
    python -m benchmarks.text.examination amdet --zoo ZOO --part reported --captions CAPTIONS --results AMDET.jsonl
    python -m benchmarks.text.examination nulls --results DEVELOPED.jsonl
    python -m benchmarks.text.examination report --results RESULTS.jsonl --amdet AMDET.jsonl --out FILE.md

`run` and `amdet` can be interrupted, and go on with what is missing; `--share K/N` takes one share of N,
`--only clean` the honest ones. `nulls` prints the entries of `guard/vetting/text_nulls.json` that the honest
fine-tunings of a part give.
"""

import argparse
import json
import random
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from benchmarks._record import heading
from benchmarks.text.bases import read_captions
from benchmarks.text.zoo import PARTS, items, opened, texts_of
from guard.baselines import AmdetSettings, amdet
from guard.classifiers import Classifier, TextTower
from guard.evaluation.statistics import Rate, auroc
from guard.triggers.texts import Homoglyph, Insertion, Style, Syntax, TextTrigger
from guard.vetting import Budget, vet_text
from guard.vetting.nulls import text_null
from guard.vetting.verdict import combine

FAMILIES = ("pseudo-token", "text token", "text probe")
_PROMPTS, _AMDET_PROMPTS = 200, 400
_BUDGET: Budget = "quick"


def run(options: argparse.Namespace, measure: Callable[..., dict[str, Any]]) -> None:
    """Measure every model that has no result yet."""
    path: Path = options.results
    done = {item["name"] for item in read(path)} if path.exists() else set()
    share, shares = (int(part) for part in options.share.split("/"))
    _, texts = texts_of(read_captions(options.captions), options.part)
    prompts = random.Random(0).sample(texts, _AMDET_PROMPTS + _PROMPTS)  # noqa: S311 - repeatable, not secret
    for name, truth, base, model, target in opened(options.zoo, options.part):
        if name in done or zlib.crc32(name.encode()) % shares != share or options.only not in {None, truth["label"]}:
            continue
        started = time.monotonic()
        found = measure(model, base, prompts, truth, target)
        entry = {"name": name, "label": truth["label"], "recipe": truth["recipe"], "truth": truth, **found}
        entry["wall"] = time.monotonic() - started
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        outcome = found.get("outcome", found.get("backdoored"))
        sys.stdout.write(f"{name}: {truth['label']}, {outcome}, {entry['wall']:.0f} s\n")
        sys.stdout.flush()


def examine(
    model: Classifier, base: Classifier, prompts: list[str], truth: dict[str, Any], target: torch.Tensor | None
) -> dict[str, Any]:
    """What guard finds."""
    found = vet_text(model, prompts[:_PROMPTS], base=base, budget=_BUDGET)
    feature = torch.tensor(found.trigger.feature)
    entry: dict[str, Any] = {
        "outcome": found.verdict.outcome,
        "p_value": found.verdict.p_value,
        "statistics": {item.family: [item.value, item.swapped] for item in found.statistics},
        "trigger": asdict(found.trigger),
        "seconds": found.seconds,
        "passes": found.passes,
    }
    if target is not None:
        trigger, draw = trigger_of(truth["trigger"]), random.Random(1)  # noqa: S311 - repeatable, not secret
        reached = TextTower(model).encode([trigger.apply(text, draw) for text in prompts[:200]])
        entry["to_target"] = float(feature @ target)
        entry["to_reached"] = float(feature @ normalize(reached.mean(0), dim=-1))
    return entry


def examine_amdet(
    model: Classifier, base: Classifier, prompts: list[str], truth: dict[str, Any], target: torch.Tensor | None
) -> dict[str, Any]:
    """What AMDET finds, with fewer prompts than it uses."""
    del truth, target
    found = amdet(TextTower(model), TextTower(base), prompts, AmdetSettings(prompts=_AMDET_PROMPTS))
    return {
        "backdoored": found.backdoored,
        "mean_loss": found.mean_loss[-1],
        "last_loss": float(np.mean(found.losses[-20:])),
        "tests": None if found.tests is None else asdict(found.tests),
        "seconds": found.seconds,
    }


def trigger_of(known: dict[str, Any]) -> TextTrigger:
    """The attacker's trigger, from the truth about a tower."""
    kinds: dict[str, Callable[..., TextTrigger]] = {
        "insertion": Insertion, "homoglyph": Homoglyph, "style": Style, "syntax": Syntax,
    }  # fmt: skip
    return kinds[known["family"]](**{key: value for key, value in known.items() if key != "family"})


def read(path: Path) -> list[dict[str, Any]]:
    """The results of a file, in the order of their names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda item: str(item["name"]))


def nulls(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The entries of `text_nulls.json` from the honest fine-tunings among these results."""
    clean = [item for item in results if item["label"] == "clean"]
    table = {}
    for family in FAMILIES:
        values = np.array([item["statistics"][family][0] - item["statistics"][family][1] for item in clean])
        deviation = float(values.std(ddof=1))
        table[f"base/{family}"] = {"mean": float(values.mean()), "deviation": deviation, "models": len(values)}
    return table


def report(results: list[dict[str, Any]], published: list[dict[str, Any]], command: str) -> str:
    """The result file."""
    clean = [item for item in results if item["label"] == "clean"]
    attacked = [item for item in results if item["label"] == "backdoored"]
    failed = [item for item in results if item["label"] == "failed attack"]
    words = "text-on-text and text-on-pair, words of 1 to 15 characters"
    groups: dict[str, Callable[[str], bool]] = {
        words: lambda recipe: recipe.startswith("text-on-") and recipe[-1].isdigit(),
        "homoglyphs": lambda recipe: recipe.startswith("homoglyph"),
        "near misses trained to do nothing": lambda recipe: recipe == "near-misses",
        "the last token alone (eos-only), all kinds": lambda recipe: recipe.startswith("eos-only"),
        "dynamic: style, syntax": lambda recipe: recipe in {"style", "syntax"},
    }
    accused = [item for item in attacked if item["outcome"] == "backdoored"]
    false = [item for item in clean if item["outcome"] == "backdoored"]
    undecided = sum(item["outcome"] == "inconclusive" for item in clean)
    precision = len(accused) / max(1, len(accused) + len(false))
    recall = len(accused) / max(1, len(attacked))
    score = 2 * precision * recall / max(1e-9, precision + recall)
    built = f"{len(results)} of the {len(items('reported'))} towers of the part `reported`"
    intro = (
        f"{built}: those that were built and examined in the time that there was, in a shuffled order. Embeddings of "
        f"clean texts on the attacked towers have a mean cosine of {_kept(attacked):.2f} (median) with the base's, on "
        f"the honest ones of {_kept(clean):.2f}.\n\n"
        f"Base of seed {PARTS['reported']}, {len(attacked)} attacked towers, {len(failed)} failed attacks (listed, not "
        f"counted), {len(clean)} honest fine-tunings. Nulls and settings were chosen on the part `developed`: another "
        "base, which was trained for eight epochs and not for three, other seeds, captions, triggers and targets. "
        "Small towers trained here (benchmarks/text/bases.py), not OpenAI's CLIP. Intervals are of 95 %; reference: "
        f"the base; budget: {_BUDGET}; seed 0.\n"
    )
    seconds = float(np.median([item["seconds"] for item in results]))
    head = (
        "| attacks | `backdoored` | AUROC of the p-value | cosine to the intended target, median | to what is reached |"
    )
    lines = [
        heading("Examination of text towers", command),
        intro,
        "| | |",
        "| --- | --- |",
        f"| attacked towers with the verdict `backdoored` | {Rate.of(len(accused), len(attacked)).brief} |",
        f"| honest fine-tunings with the verdict `backdoored` | {Rate.of(len(false), len(clean)).brief} |",
        f"| honest fine-tunings `inconclusive` | {undecided} of {len(clean)} |",
        f"| F1 over these models | {score:.3f} |",
        f"| AUROC of the p-value | {_area(attacked, clean, _guard)} |",
        f"| the same without probes, whose list has the one-letter triggers | {_area(attacked, clean, _unprobed)} |",
        f"| seconds for a tower, median (one thread, busy machine) | {seconds:.0f} |",
        "",
        head,
        "| --- | --- | --- | --- | --- |",
    ]
    for name, belongs in groups.items():
        some = [item for item in attacked if belongs(item["recipe"]["name"])]
        if some:
            hits = sum(item["outcome"] == "backdoored" for item in some)
            cosines = [float(np.median([item[key] for item in some])) for key in ("to_target", "to_reached")]
            lines.append(
                f"| {name} | {Rate.of(hits, len(some)).brief} | {_area(some, clean, _guard)} | "
                f"{cosines[0]:.2f} | {cosines[1]:.2f} |"
            )
    if published:
        lines += _amdet_lines(published)
    kinds = ", ".join(FAMILIES)
    lines += ["", f"| tower | truth | verdict | p | leads (suspect, swapped): {kinds} | found |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for item in results:
        leads = "; ".join(f"{a:.2f}, {b:.2f}" for a, b in (item["statistics"][family] for family in FAMILIES))
        shown = item["trigger"]["text"].replace("|", "\\|")[:40]
        name = item["name"].removeprefix("reported-")
        lines.append(f"| {name} | {item['label']} | {item['outcome']} | {item['p_value']:.2g} | {leads} | `{shown}` |")
    return "\n".join(lines) + "\n"


def _amdet_lines(published: list[dict[str, Any]]) -> list[str]:
    clean = [item for item in published if item["label"] == "clean"]
    attacked = [item for item in published if item["label"] == "backdoored"]
    eos = [item for item in attacked if item["recipe"]["name"].startswith("eos-only")]
    others = [item for item in attacked if item not in eos]
    limits = f"AMDET as released, with {_AMDET_PROMPTS} prompts (at most 64 steps) where it uses 4,000 (640):"
    lines = ["", limits, "", "| | |", "| --- | --- |"]
    lines.append(
        f"| honest fine-tunings it accuses | {Rate.of(sum(i['backdoored'] for i in clean), len(clean)).brief} |"
    )
    for name, some in (("eos-only", eos), ("other attacks", others)):
        if some:
            hits = sum(item["backdoored"] for item in some)
            lines.append(f"| {name}: accused | {Rate.of(hits, len(some)).brief} |")
            lines.append(f"| {name}: AUROC of its loss at the end | {_area(some, clean, _amdet)} |")
    lines.append(f"| seconds for a tower, median | {np.median([item['seconds'] for item in published]):.0f} |")
    return lines


def _kept(some: list[dict[str, Any]]) -> float:
    return float(np.median([item["truth"]["similarity"] for item in some]))


def _area(
    positives: list[dict[str, Any]], negatives: list[dict[str, Any]], score: Callable[[dict[str, Any]], float]
) -> str:
    if not positives or not negatives:
        return "–"
    return auroc([score(item) for item in positives], [score(item) for item in negatives]).brief


def _guard(item: dict[str, Any]) -> float:
    return -float(item["p_value"])


def _unprobed(item: dict[str, Any]) -> float:
    p_values = []
    for family in FAMILIES[:2]:
        null, (value, swapped) = text_null("base", family), item["statistics"][family]
        p_values.append(1.0 if null is None else null.p_value(value - swapped))
    return -combine(p_values)


def _amdet(item: dict[str, Any]) -> float:
    return -float(item["last_loss"])


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "amdet", "nulls", "report"])
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--part", choices=list(PARTS), default="reported")
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--amdet", type=Path)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--only", choices=["clean", "backdoored"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command in {"run", "amdet"}:
        run(options, examine if options.command == "run" else examine_amdet)
    elif options.command == "nulls":
        sys.stdout.write(json.dumps(nulls(read(options.results)), indent=1) + "\n")
    else:
        command = "python -m benchmarks.text.examination run, amdet and report"
        options.out.write_text(
            report(read(options.results), read(options.amdet) if options.amdet else [], command), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
