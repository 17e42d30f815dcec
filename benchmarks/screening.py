"""Does the false-alarm rate hold, what does a poisoned bank cost, what does the monitor see?

python -m benchmarks.screening ZOO --measured FILE [--models PATTERN] [--budget BUDGET] [--large FOLDER]

For each backdoored model on which vetting reconstructs a trigger. `--large` names a folder of images for banks of
1,000, 10,000 and 50,000, searched with the first model. Each model is a line of FILE; what it holds is not made again.
Then benchmarks/results/screening-NAME.md is written.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import betabinom

from benchmarks._record import RESULTS, heading, read_rows
from guard.classifiers import ImageFolder
from guard.evaluation import Zoo
from guard.evaluation.images import ImageSet
from guard.evaluation.statistics import Rate
from guard.evaluation.subject import EvaluationSettings, Subject
from guard.profiles import Profile
from guard.screening import Banks, Detector, Monitor, Screen, default_k

Floats = NDArray[np.float32]
ALPHAS = (0.01, 0.001)
SPLITS = 200
POISON = (0.0, 0.001, 0.01, 0.05)
SHARES = (0.01, 0.05, 0.5)
STREAM = 30_000
"""Images after which a stream counts as silent."""
LARGE = (1000, 10_000, 50_000)


def main() -> None:
    """Run what is missing, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--models", default="*")
    parser.add_argument("--budget", default="quick", choices=("quick", "standard", "thorough"))
    parser.add_argument("--large", type=Path)
    arguments = parser.parse_args()
    path: Path = arguments.measured
    rows = read_rows(path)
    zoo, sets = Zoo.read(arguments.zoo), {}
    large = arguments.large
    for name in zoo.select(arguments.models):
        truth = zoo.truth(name)
        if truth is None or truth.label != "backdoored" or zoo.models[name].base is None:
            continue
        if name in {row["model"] for row in rows}:
            continue
        data = zoo.models[name].images
        if data not in sets:
            sets[data] = ImageSet.of_zoo(zoo.root / "images" / data, vetting=1000, seed=0)
        settings = EvaluationSettings(budget=arguments.budget)
        subject = Subject(zoo, name, sets[data], settings, searches=zoo.root / "evaluation" / ".searches")
        rows.append(_measure(subject, large))
        large = None if rows[-1]["found"] else large
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        sys.stderr.write(f"{name}: {rows[-1].get('poison', 'no trigger')}\n")
    command = f"python -m benchmarks.screening {zoo.name} --budget {arguments.budget}" + (
        f" --models '{arguments.models}'" if arguments.models != "*" else ""
    )
    seeded = "" if zoo.seed == 0 else f"-{zoo.seed}"
    out = RESULTS / f"screening-{zoo.name}{seeded}.md"
    out.write_text(heading(f"Screening on the zoo {zoo.name}", command) + report(rows), encoding="utf-8")


def _measure(subject: Subject, large: Path | None) -> dict[str, Any]:
    truth, vetting = subject.truth, subject.vetting(paired=True)
    row: dict[str, Any] = {
        "model": subject.name,
        "family": truth.family if truth else "",
        "found": bool(vetting.triggers),
    }
    if not vetting.triggers or subject.pixels.calibration is None or subject.pixels.requests is None:
        return row
    images, requests = subject.pixels.calibration, subject.requests.numpy()
    bare = Profile.build(subject.classifier, vetting)
    triggered = np.concatenate([attack.embeddings.numpy() for attack in subject.attacks])
    triggered = triggered[np.random.default_rng(0).permutation(len(triggered))]

    def embed(pixels: torch.Tensor) -> Floats:
        embedded: Floats = subject.classifier.embed(pixels).numpy()
        return embedded

    row["poison"] = [_poisoned(subject, bare, images, share, requests, triggered) for share in POISON]
    profile = bare.calibrate(subject.classifier, images, ALPHAS[0])
    detector = profile.detector()
    row["splits"] = [_splits(profile, detector, requests, alpha) for alpha in ALPHAS]
    row["restart"] = _survives_restart(profile, detector, requests)
    judged = detector.score(requests)
    targets = [attack.target for attack in subject.attacks]
    genuine = np.isin(judged.scores.classes, targets)
    row["genuine"] = [int(judged.flags[genuine].sum()), int(genuine.sum())]
    each = _detector(profile, ALPHAS[0], per_class=True)
    again = each.score(requests).flags
    row["per_class"] = {
        "genuine": [int(again[genuine].sum()), int(genuine.sum())],
        "alarms": [int(again.sum()), len(again)],
        "detected": [int(each.score(triggered).flags.sum()), len(triggered)],
        "classes": len(each.own_threshold),
    }
    row["corrupted"] = {}
    for name, change in CORRUPTIONS.items():
        changed = embed(_changed(subject.pixels.requests, change))
        flags = detector.score(changed).flags
        row["corrupted"][name] = [int(flags.sum()), len(flags), *_watched(detector, requests, changed, 1.0)]
    row["streams"] = {str(share): _watched(detector, requests, triggered, share) for share in SHARES}
    row["streams"]["0"] = _watched(detector, requests, requests, 0.0)
    if large is not None:
        row["large"] = _large(subject, profile, large, requests, triggered)
    return row


def _poisoned(
    subject: Subject, bare: Profile, images: torch.Tensor, share: float, requests: Floats, triggered: Floats
) -> dict[str, Any]:
    """Calibrate with a share of images that carry the attacker's trigger, in every part of the split."""
    generator, poisoned = np.random.default_rng(0), images.clone()
    rows = generator.choice(len(images), round(share * len(images)), replace=False)
    for attack, part in zip(subject.attacks, np.array_split(rows, len(subject.attacks)), strict=True):
        poisoned[part] = attack.trigger.stamp(images[part])
    profile = bare.calibrate(subject.classifier, poisoned, ALPHAS[0])
    record = profile.document.calibration
    left_out = {int(item.image) for item in record.left_out} if record else set()
    clean_left_out = len(left_out - set(rows.tolist()))
    result: dict[str, Any] = {
        "share": share,
        "left_out": [len(left_out & set(rows.tolist())), len(rows), clean_left_out],
    }
    for alpha in ALPHAS:
        detector = _detector(profile, alpha)
        result[str(alpha)] = {
            "detected": [int(detector.score(triggered).flags.sum()), len(triggered)],
            "alarms": [int(detector.score(requests).flags.sum()), len(requests)],
        }
    return result


def _detector(profile: Profile, alpha: float, *, per_class: bool = False) -> Detector:
    """The same banks and clean scores at another false-alarm rate, on the whole or per class."""
    if profile.reference is None:
        raise AssertionError("calibration leaves a reference")
    left_out = profile.document.left_out()
    return Detector(profile.detector().screen, profile.reference.clean, alpha, per_class=per_class, left_out=left_out)


def _splits(profile: Profile, detector: Detector, requests: Floats, alpha: float) -> dict[str, float]:
    """The rate over random splits of the clean scores, beside the exact law of one threshold."""
    reference = profile.reference
    if reference is None:
        raise AssertionError("calibration leaves a reference")
    pool = np.concatenate([reference.clean.values, detector.screen.score_samples(requests).values])
    behind = len(pool) // 2
    rank = int(alpha * (behind + 1) + 1e-9)
    if rank < 1:
        return {}
    rates = _rates(pool, rank)
    law = betabinom(len(pool) - behind, rank, behind + 1 - rank)
    size = len(pool) - behind
    return {
        "alpha": alpha,
        "mean": float(np.mean(rates)),
        "spread": float(np.std(rates)),
        "expected": float(law.mean()) / size,
        "lawful": float(law.std()) / size,
    }


def _rates(pool: Floats, rank: int) -> list[float]:
    """False-alarm rates over random halves of clean scores: a threshold from one, the rate on the other."""
    behind, generator, rates = len(pool) // 2, np.random.default_rng(0), []
    for _ in range(SPLITS):
        order = generator.permutation(pool)
        rates.append(float((order[behind:] > np.sort(order[:behind])[-rank]).mean()))
    return rates


def _survives_restart(profile: Profile, detector: Detector, requests: Floats) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "profile")
        again = Profile.open(Path(folder) / "profile").detector().score(requests)
        return bool(np.array_equal(again.p_values, detector.score(requests).p_values))


def _watched(detector: Detector, clean: Floats, other: Floats, share: float) -> list[Any]:
    """The first alarm of each kind in a stream of which a share is `other`: images until then, or None.

    Clean images come in random order, and again once all have come; without others, once only: a few hundred images
    that come again and again have a rate of their own.
    """
    generator, monitor = np.random.default_rng(0), Monitor(detector.streams())
    parts = [detector.observations(detector.screen.score_samples(part)) for part in (clean, other)]
    waiting: list[list[int]] = [[], []]
    first: dict[str, int | None] = {"attack": None, "drift": None}
    for place in range(1, (STREAM if share else len(clean)) + 1):
        which = int(generator.random() < share)
        waiting[which] = waiting[which] or generator.permutation(len(parts[which])).tolist()
        for alarm in monitor.observe(parts[which][waiting[which].pop()]):
            first[alarm.kind] = first[alarm.kind] or place
        raised = [value for value in first.values() if value]
        if raised and place >= 2 * max(raised):
            break
    return [first["attack"], first["drift"]]


def _large(
    subject: Subject, profile: Profile, folder: Path, requests: Floats, triggered: Floats
) -> list[dict[str, Any]]:
    """Banks of several sizes, from other images, behind the same calibration images."""
    found, calibration = ImageFolder.scan(folder).sample(max(LARGE), seed=0), subject.pixels.calibration
    if calibration is None or profile.reference is None:
        raise AssertionError("the zoo has calibration images")
    pixels = subject.classifier.read(found)
    clean = subject.classifier.embed(pixels).numpy()
    stamped = {
        name: subject.classifier.embed(trigger.stamp(pixels)).numpy()
        for name, trigger in profile.load_triggers().items()
    }
    kept, results = subject.classifier.embed(calibration).numpy(), []
    for size in LARGE:
        banks = Banks.fit(
            clean[:size],
            {name: bank[:size] for name, bank in stamped.items()},
            profile.reference.banks.head,
            k=default_k(size, len(subject.classifier.classes.names)),
        )
        screen = Screen(banks)
        pool = np.concatenate([screen.score_samples(part).values for part in (kept, requests)])
        rates = _rates(pool, int(ALPHAS[0] * (len(pool) // 2 + 1) + 1e-9))
        detector = Detector(screen, screen.score_samples(kept), ALPHAS[1])
        hits = detector.score(triggered).flags
        results.append(
            {
                "size": size,
                "k": banks.k,
                "mean": float(np.mean(rates)),
                "spread": float(np.std(rates)),
                "detected": [int(hits.sum()), len(hits)],
            }
        )
    return results


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(image.width / 32))


def _jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def _noise(image: Image.Image) -> Image.Image:
    values = np.asarray(image, np.float32)
    noise = np.random.default_rng(int(values.sum()) % 2**32).normal(scale=0.08 * 255, size=values.shape)
    return Image.fromarray((values + noise).clip(0, 255).astype(np.uint8))


def _crop(image: Image.Image) -> Image.Image:
    edge = image.width // 10
    return image.crop((edge, edge, image.width - edge, image.height - edge)).resize(
        image.size, Image.Resampling.BICUBIC
    )


CORRUPTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "blur, σ = 1/32 of the side": _blur,
    "noise, σ = 8 %": _noise,
    "JPEG, quality 30": _jpeg,
    "crop to 80 %": _crop,
}


def _changed(pixels: torch.Tensor, change: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    images = [change(Image.fromarray(image)) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    found = [row for row in rows if row["found"]]
    lines = [
        f"{len(found)} of {len(rows)} backdoored models, those on which vetting reconstructed a trigger.",
        "Requests of all models are pooled; the exact 95 % intervals take them as independent.",
        "",
        "## Poisoned calibration images",
        "",
        "A share of all images given to `guard calibrate` carries the attacker's trigger.",
        "",
        "| poisoned | α | triggered flagged | clean flagged | poisoned images left out | clean ones, per model |",
        "| --- " * 6 + "|",
    ]
    for place, share in enumerate(POISON):
        for level in map(str, ALPHAS):
            parts = [row["poison"][place] for row in found]
            out = [sum(part["left_out"][k] for part in parts) for k in range(3)]
            left = "–" if not out[1] else f"{out[0] / out[1]:.1%}"
            lines.append(
                f"| {share:.1%} | {level} | {_pooled(part[level]['detected'] for part in parts)} | "
                f"{_pooled(part[level]['alarms'] for part in parts)} | {left} | {out[2] / len(parts):.1f} |"
            )
    lines += ["", "## The false-alarm rate over random splits", ""]
    lines += [
        f"{SPLITS} splits for each model; the law is the beta-binomial one of a single conformal threshold.",
        "",
        "| α | models | mean rate | by the law | spread | by the law |",
        "| --- " * 6 + "|",
    ]
    for alpha in ALPHAS:
        parts = [part for row in found for part in row["splits"] if part and part["alpha"] == alpha]
        means = [
            sum(part[key] for part in parts) / max(1, len(parts)) for key in ("mean", "expected", "spread", "lawful")
        ]
        if parts:
            lines.append(f"| {alpha} | {len(parts)} | " + " | ".join(f"{value:.3%}" for value in means) + " |")
    same = sum(row["restart"] for row in found)
    lines += [
        "",
        f"After writing and reading the profile every p-value is the same: {same} of {len(found)} models.",
        "",
    ]
    for row in found:
        if "large" in row:
            lines += [
                f"Banks of several sizes, {row['model']}, from images that the model was trained on:",
                "",
                "| bank | k | mean rate, α = 0.01 | spread | triggered flagged, α = 0.001 |",
                "| --- " * 5 + "|",
                *(
                    f"| {item['size']:,} | {item['k']} | {item['mean']:.3%} | {item['spread']:.3%} | "
                    f"{Rate.of(*item['detected']).brief} |"
                    for item in row["large"]
                ),
                "",
            ]
    lines += [
        "## Other requests, α = 0.01",
        "",
        "| requests | flagged | attack alarm | drift alarm |",
        "| --- " * 4 + "|",
    ]
    lines.append(f"| genuine images of the target class | {_pooled(row['genuine'] for row in found)} | – | – |")
    for key, label in (
        ("genuine", "the same, thresholds per class"),
        ("alarms", "all clean ones, thresholds per class"),
        ("detected", "triggered ones, thresholds per class"),
    ):
        lines.append(f"| {label} | {_pooled(row['per_class'][key] for row in found)} | – | – |")
    for name in CORRUPTIONS:
        parts = [row["corrupted"][name] for row in found]
        lines.append(
            f"| {name} | {_pooled(part[:2] for part in parts)} | {_when(part[2] for part in parts)} | "
            f"{_when(part[3] for part in parts)} |"
        )
    for mixed in ("0", *map(str, SHARES)):
        parts = [row["streams"][mixed] for row in found]
        label = "clean, each image once" if mixed == "0" else f"{float(mixed):.0%} triggered"
        lines.append(f"| {label} | – | {_when(part[0] for part in parts)} | {_when(part[1] for part in parts)} |")
    note = (
        "Alarms of the stream monitor: in how many of the models, after how many images (median); streams of at most "
        f"{STREAM:,} images, run length 10⁷. Streams of corrupted images hold nothing else."
    )
    lines += ["", note]
    return "\n".join(lines) + "\n"


def _pooled(parts: Any) -> str:  # noqa: ANN401 - pairs of numbers from JSON
    counts = np.array([list(part)[:2] for part in parts]).sum(0)
    return Rate.of(int(counts[0]), int(counts[1])).brief


def _when(parts: Any) -> str:  # noqa: ANN401 - numbers and None from JSON
    values = list(parts)
    raised = [value for value in values if value is not None]
    return f"{len(raised)}/{len(values)}" + (f", after {np.median(raised):,.0f}" if raised else "")


if __name__ == "__main__":
    main()
