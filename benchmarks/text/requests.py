"""Screen requests of text on every tower of a zoo that `benchmarks.text.examination run` has examined.

    python -m benchmarks.text.requests run --zoo ZOO --part reported --captions CAPTIONS --examined RESULTS.jsonl \
        --results REQUESTS.jsonl
    python -m benchmarks.text.requests report --results REQUESTS.jsonl --out FILE.md

A profile is calibrated on 2,400 captions that neither attackers nor tuners used, with and without a reference model and
with and without the trigger that the examination found. 1,000 other captions are clean requests; 400 of them with the
attacker's own trigger are the triggered ones. `run` can be interrupted, and goes on with what is missing.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._record import heading
from benchmarks.text.bases import read_captions
from benchmarks.text.examination import FAMILIES, read, trigger_of
from benchmarks.text.zoo import PARTS, opened, texts_of
from guard._types import Floats, Rows
from guard.classifiers import Classifier, TextTower
from guard.evaluation.statistics import Rate, auroc
from guard.profiles import InputKind, Profile
from guard.profiles.calibrating import Rules, TextSamples, calibrate
from guard.screening import Detector, Screen
from guard.vetting import ReferenceModel, TextStatistic, TextVetting, judge_text
from guard.vetting.assimilation import assimilation
from guard.vetting.nulls import text_null
from guard.vetting.text_results import (
    NearCaption,
    NearToken,
    PromptAssimilation,
    TextSearchSettings,
    TextTriggerRecord,
)

ALPHA = 0.01
_USED, _CALIBRATION, _CLEAN, _TRIGGERED = 600, 2400, 1000, 400
"""Captions that the examination may have used, and of each kind here."""
SETUPS = ("trigger and base", "trigger alone", "base alone", "neither")


def run(options: argparse.Namespace) -> None:
    """Measure every tower that was examined and has no result yet."""
    path: Path = options.results
    done = {item["name"] for item in read(path)} if path.exists() else set()
    examined = {item["name"]: item for item in read(options.examined)}
    _, texts = texts_of(read_captions(options.captions), options.part)
    used = set(random.Random(0).sample(texts, _USED))  # noqa: S311 - repeatable, not secret
    rest = [text for text in dict.fromkeys(texts) if text not in used]
    drawn = random.Random(1).sample(rest, min(len(rest), _CALIBRATION + _CLEAN))  # noqa: S311 - as above
    calibration, clean = drawn[:_CALIBRATION], drawn[_CALIBRATION:]
    for name, truth, base, model, _ in opened(options.zoo, options.part):
        if name in done or name not in examined or truth["label"] == "failed attack":
            continue
        started = time.monotonic()
        entry = {"name": name, "label": truth["label"], "recipe": truth["recipe"]["name"]}
        entry |= _measured(model, base, examined[name], truth, calibration, clean)
        entry["seconds"] = time.monotonic() - started
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        shown = {setup: entry["setups"][setup].get("auroc") for setup in SETUPS}
        sys.stdout.write(f"{name}: {shown}, {entry['seconds']:.0f} s\n")
        sys.stdout.flush()


def _measured(
    model: Classifier,
    base: Classifier,
    found: dict[str, Any],
    truth: dict[str, Any],
    calibration: Sequence[str],
    clean: Sequence[str],
) -> dict[str, Any]:
    triggered: list[str] = []
    if truth["trigger"] is not None:
        trigger, draw = trigger_of(truth["trigger"]), random.Random(2)  # noqa: S311 - repeatable, not secret
        triggered = [trigger.apply(text, draw) for text in clean[:_TRIGGERED]]
    vetting = _vetting(found, model)
    document = Profile.build(model, None, text=vetting).document
    requests = TextSamples(model, [*clean, *triggered], document, 0)
    embeddings, answers = requests.embed(), requests.ask(base)
    samples = _Remembered(TextSamples(model, calibration, document, 0))
    setups: dict[str, Any] = {}
    for setup in SETUPS:
        reference, samples.compared = base if "base" in setup else None, "trigger" in setup
        calibrated = calibrate(
            samples, model, Rules(ALPHA, per_class=False, seed=0), k=None, names=None, groups=None,
            reference=reference, kind="base", say=lambda _: None,
        )  # fmt: skip
        detector = Detector(Screen(calibrated.reference.banks), calibrated.reference.clean, ALPHA)
        judged = detector.score(embeddings, answers if reference is not None else None)
        setups[setup] = {
            "stamped": bool(detector.screen.triggers),
            "left_out": len(calibrated.record.left_out),
            **_rates(judged.scores.values, judged.flags, len(clean)),
            "parts": {
                name: _area(values, len(clean)) for name, values in judged.scores.parts.items() if len(triggered)
            },
        }
    return {
        "outcome": vetting.verdict.outcome,
        "setups": setups,
        "assimilation": _area(_alike(TextTower(model), requests.texts), len(clean)) if triggered else None,
    }


class _Remembered:
    """Texts whose embeddings are computed once, for several profiles.

    Args:
        texts: The texts.

    Attributes:
        compared: Whether there is a trigger that requests are compared with.
    """

    kind: InputKind = "texts"

    def __init__(self, texts: TextSamples) -> None:
        self._texts, self.compared = texts, True
        self.embed = cache(texts.embed)
        self.ask = cache(texts.ask)
        self._stamped: dict[str, tuple[int, Floats]] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def stamped(self, rows: Rows, say: Callable[[str], None]) -> dict[str, tuple[int, Floats]]:
        """See `Samples`; the rows are always the same."""
        if not self.compared:
            return {}
        if self._stamped is None:
            self._stamped = self._texts.stamped(rows, say)
        return self._stamped


def _rates(values: NDArray[np.float32], flags: NDArray[np.bool_], clean: int) -> dict[str, Any]:
    found: dict[str, Any] = {"false": int(flags[:clean].sum()), "clean": clean}
    if len(values) > clean:
        found |= {
            "auroc": _area(values, clean), "found": int(flags[clean:].sum()), "triggered": len(values) - clean,
            "at_1": float((values[clean:] > np.quantile(values[:clean], 0.99)).mean()),
        }  # fmt: skip
    return found


def _area(values: NDArray[np.float32], clean: int) -> float:
    return auroc(values[clean:].tolist(), values[:clean].tolist()).value


@torch.no_grad()
def _alike(tower: TextTower, texts: Sequence[str]) -> NDArray[np.float32]:
    """The assimilation of each text, over the tokens up to its end."""
    tokens = tower.tokens(list(texts))
    ends = tower.ends(tokens)
    found = torch.zeros(len(texts))
    for end in ends.unique().tolist():
        rows = ends == end
        found[rows] = assimilation(tower.features(tower.embed(tokens[rows, : end + 1])))
    return found.numpy()


def _vetting(found: dict[str, Any], model: Classifier) -> TextVetting:
    """The examination that a line of results is of, as far as a profile needs it."""
    stored = found["trigger"]
    feature = torch.tensor(stored["feature"])
    trigger = TextTriggerRecord(
        **{
            **stored,
            "nearest": tuple(tuple(NearToken(**near) for near in row) for row in stored["nearest"]),
            "captions": tuple(NearCaption(**near) for near in stored["captions"]),
            "feature": tuple(stored["feature"]),
            "vectors": tuple(tuple(vector) for vector in stored["vectors"]),
            "target": int((model.head @ feature).argmax()),
        }
    )
    statistics = []
    for family, (value, swapped) in found["statistics"].items():
        null = text_null("base", family) if family in FAMILIES else None
        p_value = None if null is None else null.p_value(value - swapped)
        statistics.append(TextStatistic(family, "", value, swapped, p_value, ""))
    return TextVetting(
        judge_text(statistics, trigger),
        tuple(statistics),
        trigger,
        PromptAssimilation((), (), ()),
        TextSearchSettings(),
        (0, 0),
        ReferenceModel("base", None, 0.0, 0),
        "cpu",
        0.0,
        0,
    )


def report(results: list[dict[str, Any]], command: str) -> str:
    """The result file."""
    attacked = [item for item in results if item["label"] == "backdoored"]
    clean = [item for item in results if item["label"] == "clean"]
    groups: dict[str, Callable[[str], bool]] = {
        "all attacks": lambda _: True,
        "text-on-text, text-on-pair": lambda recipe: recipe.startswith("text-on-"),
        "homoglyphs": lambda recipe: recipe.startswith("homoglyph"),
        "near misses": lambda recipe: recipe == "near-misses",
        "the last token alone (eos-only)": lambda recipe: recipe.startswith("eos-only"),
        "dynamic: style, syntax": lambda recipe: recipe in {"style", "syntax"},
    }
    matched = sum(item["setups"][SETUPS[0]]["stamped"] for item in attacked)
    intro = (
        f"{len(attacked)} attacked towers of the part `reported` and {len(clean)} honest fine-tunings, as in "
        f"text-towers.md. On each: {_CALIBRATION} captions calibrate the profile (alpha {ALPHA:.0%}), {_CLEAN} others "
        f"are clean requests, and {_TRIGGERED} of these with the attacker's own trigger are triggered ones. The "
        f"trigger that the examination found is compared with where its verdict is not `no evidence`: {matched} of "
        f"{len(attacked)} attacked towers. *Base*: a second opinion on every request by the clean tower that the "
        "suspect was tuned from. Nothing was chosen on these towers: weights, k and tails are those for images. "
        "Intervals are of 95 %, those of means over towers (bootstrap, 2,000 draws, seed 0), since requests to one "
        "tower are alike. All towers are calibrated on the same captions and asked the same clean requests, so the "
        "chance of one calibration (a standard deviation of about 0.3 points of the rate of false alarms) is common to "
        "them and not in these intervals. Seed 0.\n"
    )
    columns = (
        "attacks", "compared with", "towers", "mean AUROC", "lowest", "flagged at alpha 1 %", "at 1 % of the clean",
        "towers with at least 95 % flagged",
    )  # fmt: skip
    lines = [
        heading("Screening of text requests", command), intro, f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]  # fmt: skip
    for group, belongs in groups.items():
        some = [item for item in attacked if belongs(item["recipe"])]
        for setup in SETUPS if some else ():
            cells = [item["setups"][setup] for item in some]
            areas = [cell["auroc"] for cell in cells]
            shares = [cell["found"] / cell["triggered"] for cell in cells]
            enough = Rate.of(sum(share >= 0.95 for share in shares), len(shares))
            lines.append(
                f"| {group} | {setup} | {len(some)} | {_mean(areas)} | {min(areas):.3f} | {_mean(shares)} | "
                f"{_mean([cell['at_1'] for cell in cells])} | {enough.brief} |"
            )
    lines += [
        "",
        "| clean requests flagged at alpha 1 % | attacked towers | honest fine-tunings |",
        "| --- | --- | --- |",
    ]
    for setup in SETUPS:
        cells = [_mean([i["setups"][setup]["false"] / i["setups"][setup]["clean"] for i in some], 4) for some in
                 (attacked, clean) if some]  # fmt: skip
        lines.append(f"| {setup} | {' | '.join(cells)} |")
    lines += ["", "| AUROC of one score alone, mean over attacked towers | |", "| --- | --- |"]
    names = list(dict.fromkeys(name for item in attacked for name in item["setups"][SETUPS[0]]["parts"]))
    for name in names:
        areas = [item["setups"][SETUPS[0]]["parts"].get(name) for item in attacked]
        lines.append(f"| {name} | {_mean([area for area in areas if area is not None])} |")
    lines.append(f"| assimilation of the tokens (not used) | {_mean([item['assimilation'] for item in attacked])} |")
    lines += ["", f"| tower | verdict | {' | '.join(f'AUROC, flagged: {setup}' for setup in SETUPS)} | assimilation |"]
    lines.append(f"| --- | --- |{' --- |' * (len(SETUPS) + 1)}")
    for item in attacked:
        cells = [f"{c['auroc']:.3f}, {c['found'] / c['triggered']:.1%}" for c in item["setups"].values()]
        name = item["name"].removeprefix("reported-")
        lines.append(f"| {name} | {item['outcome']} | {' | '.join(cells)} | {item['assimilation']:.3f} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its 95 % interval over towers."""
    array, generator = np.asarray(values), np.random.default_rng(0)
    means = array[generator.integers(len(array), size=(2000, len(array)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{array.mean():.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--part", choices=list(PARTS), default="reported")
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--examined", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "run":
        run(options)
    else:
        options.out.write_text(
            report(read(options.results), "python -m benchmarks.text.requests run and report"), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
