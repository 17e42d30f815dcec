"""The whole of guard on one small example, from training to flagged requests."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from guard import report
from guard._files import replace_file
from guard.certificates import Admission
from guard.classifiers import Classifier, Preprocessing, export
from guard.demo import traffic
from guard.demo.certificates import TAMPERED, admissions
from guard.demo.data import DemoData, from_digits, from_folder
from guard.demo.models import Trained, attack_trigger, train_models
from guard.demo.recipes import ALPHA, DIGITS, FOLDER, TARGET
from guard.evaluation.statistics import Rate
from guard.profiles import Profile
from guard.triggers import Trigger
from guard.vetting import Budget, Vetting, vet

MIN_DETECTED, MAX_FALSE_ALARMS, MIN_BY_OPINION = 0.95, 0.03, 0.9
METRICS = (
    "guard_requests_total",
    "guard_flagged_trigger_total",
    "guard_model_info",
    "guard_alpha_ratio",
    "guard_ready",
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        classes: Number of classes.
        accuracy: Accuracy of each model on clean images that no model was trained on.
        attack_success: Attack success rate of each model with the attacker's trigger.
        verdicts: Verdict on each vetted model.
        targets: The class that each verdict accuses.
        true_target: The attacker's target class.
        alpha: False-alarm rate that the threshold was set for.
        detected: Share of triggered requests that were flagged.
        false_alarms: Share of clean requests that were flagged.
        detected_by_opinion: Share of triggered requests that were flagged with the reconstructed triggers switched off,
            so that only the second opinion of the base model can tell.
        false_alarms_by_opinion: Share of clean requests that were flagged then.
        admissions: What a trust policy says of the certified models, and of a copy that was tampered with.
        latency: p50 and p99 in ms at the client, with and without screening, interleaved in one run.
        metrics: Some lines of `/metrics`.
        seconds: Wall-clock time of each part.
        failures: Promises of the demo that were not kept; empty if all went well.
        report: Path of the report.
        seed: Seed for all random choices.
    """

    classes: int
    accuracy: dict[str, float]
    attack_success: dict[str, float]
    verdicts: dict[str, str]
    targets: dict[str, str | None]
    true_target: str
    alpha: float
    detected: Rate
    false_alarms: Rate
    detected_by_opinion: Rate
    false_alarms_by_opinion: Rate
    admissions: dict[str, str]
    latency: dict[str, tuple[float, float]]
    metrics: list[str]
    seconds: dict[str, float]
    failures: list[str]
    report: str
    seed: int


class _Clock:
    """Measures the time of each part."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds, self._last = seconds, seconds()
        self.parts: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = self._seconds()
        self.parts[part] = round(now - self._last, 1)
        self._last = now


def run(
    out: Path,
    images: Path | None,
    *,
    seed: int,
    device: str | None,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    clock: Callable[[], float],
) -> DemoResult:
    """Train, vet, calibrate, export, serve, attack, report.

    Args:
        out: Folder for everything that is written; models of an earlier run with the same settings are reused.
        images: A folder with one sub-folder per class; None for the digits.
        seed: Seed for all random choices.
        device: torch device; None for a GPU if there is one.
        say: Called with a short description of each step.
        progress: Called with (what, done, total).
        clock: Returns the seconds since the start.

    Raises:
        GuardError: A step failed.
    """
    traffic.client_library()  # fails now rather than after the training
    laps = _Clock(clock)
    recipe = FOLDER if images else DIGITS
    preprocessing = recipe.preprocessing
    data = from_folder(images, preprocessing, seed=seed, progress=progress) if images else from_digits(seed=seed)
    laps.lap("images")
    models = train_models(data, recipe, out / "models", seed=seed, device=device, say=say)
    laps.lap("training")
    vettings = {
        name: _vet(name, models, data, out, recipe.budget, seed, say, progress) for name in ("backdoored", "clean-twin")
    }
    laps.lap("vetting")
    backdoored = models["backdoored"].classifier
    export(models["base"].classifier, out / "exported-base", data.calibration.pixels[:512])
    profile = _calibrated(backdoored, vettings["backdoored"], models["base"].classifier, data, out, seed, say)
    _write(profile, data, out / "profiles" / "backdoored")
    # As if vetting had found nothing.
    blind = replace(vettings["backdoored"], triggers=())
    hidden = _calibrated(backdoored, blind, models["base"].classifier, data, out, seed, lambda _: None)
    _write(hidden, data, out / "profiles" / "no-trigger")
    export(backdoored, out / "exported", data.calibration.pixels[:512])
    laps.lap("calibration and export")
    admitted = admissions(out, seed=seed)
    laps.lap("certificates")
    trigger = attack_trigger(recipe, seed=seed)
    clean, triggered, latency, metrics = _attack(out, data, trigger, preprocessing, say)
    opinions = _attack_unseen(out, data, trigger, preprocessing)
    laps.lap("requests")
    result = _result(
        models, vettings, data, clean, triggered, opinions, admitted, latency, metrics, laps.parts,
        str(out / "report.html"), seed,
    )  # fmt: skip
    drawn = report.examples(profile, data.vetting.pixels)
    sections = [report.Section("The demo", [(label, value) for label, value in _rows(result)], _note(images))]
    text = report.render(
        profile,
        drawn,
        truth=report.example(trigger, data.vetting.pixels),
        scores={"clean requests": clean.scores, "triggered requests": triggered.scores},
        sections=sections,
    )
    replace_file(out / "report.html", text.encode())
    replace_file(out / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    return result


def _note(images: Path | None) -> str:
    data = f"images of {images}" if images else "scikit-learn's handwritten digits, coloured"
    return f"Data: {data}. One model and one seed: a demonstration, not a benchmark."


def _vet(
    name: str,
    models: dict[str, Trained],
    data: DemoData,
    out: Path,
    budget: Budget,
    seed: int,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> Vetting:
    def labelled(what: str, done: int, total: int) -> None:
        progress(f"vetting {name}: {what}", done, total)

    vetting = vet(
        models[name].classifier,
        data.vetting.pixels[:2000],
        base=models["base"].classifier,
        budget=budget,
        seed=seed,
        cache=out / "searches",
        progress=labelled,
    )
    profile = Profile.build(models[name].classifier, vetting)
    _write(profile, data, out / "profiles" / name)
    target = vetting.verdict.target
    say(f"{name}: {vetting.verdict.outcome}{'' if target is None else f', target {data.classes.names[target]!r}'}")
    return vetting


def _calibrated(
    classifier: Classifier,
    vetting: Vetting,
    base: Classifier,
    data: DemoData,
    out: Path,
    seed: int,
    say: Callable[[str], None],
) -> Profile:
    """The calibrated profile of a classifier, with the base as its reference model."""
    profile = Profile.build(classifier, vetting).calibrate(
        classifier, data.calibration.pixels, ALPHA, groups=data.groups, reference=base, seed=seed, progress=say
    )
    return profile.with_reference_model(out / "exported-base")


def _write(profile: Profile, data: DemoData, directory: Path) -> None:
    text = report.render(profile, report.examples(profile, data.vetting.pixels))
    profile.save(directory, report=text)


def _attack(
    out: Path, data: DemoData, trigger: Trigger, preprocessing: Preprocessing, say: Callable[[str], None]
) -> tuple[traffic.Replies, traffic.Replies, dict[str, tuple[float, float]], list[str]]:
    """Send clean and triggered requests to a sidecar with screening, and clean ones to one without beside it."""
    arguments = ["--model", str(out / "exported"), "--profile", str(out / "profiles" / "backdoored")]
    requests = data.requests[:1500]
    clean = preprocessing.normalise(requests.pixels.numpy())
    triggered = preprocessing.normalise(trigger.stamp(requests.pixels[requests.labels != TARGET]).numpy())
    with traffic.sidecar(*arguments) as screened, traffic.sidecar(*arguments, "--no-screening") as bare:
        say(f"sidecar at {screened['listen']}: sending {len(clean)} clean and {len(triggered)} triggered requests")
        with_screening, without = traffic.send([screened["listen"], bare["listen"]], clean)
        attacked = traffic.send([screened["listen"]], triggered)[0]
        metrics = traffic.scrape(screened["metrics"], METRICS)
    latency = {
        "with screening": _quantiles(with_screening.milliseconds),
        "without": _quantiles(without.milliseconds),
    }
    return with_screening, attacked, latency, metrics


def _attack_unseen(
    out: Path, data: DemoData, trigger: Trigger, preprocessing: Preprocessing
) -> tuple[traffic.Replies, traffic.Replies]:
    """Send clean and triggered requests to a sidecar that knows no trigger and has a second opinion."""
    requests = data.requests[:600]
    clean = preprocessing.normalise(requests.pixels.numpy())
    triggered = preprocessing.normalise(trigger.stamp(requests.pixels[requests.labels != TARGET]).numpy())
    arguments = ["--model", str(out / "exported"), "--profile", str(out / "profiles" / "no-trigger")]
    with traffic.sidecar(*arguments, "--second-opinion", "all") as screened:
        return traffic.send([screened["listen"]], clean)[0], traffic.send([screened["listen"]], triggered)[0]


def _quantiles(milliseconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    p50, p99 = np.quantile(milliseconds, [0.5, 0.99])
    return round(float(p50), 2), round(float(p99), 2)


def _result(
    models: dict[str, Trained],
    vettings: dict[str, Vetting],
    data: DemoData,
    clean: traffic.Replies,
    triggered: traffic.Replies,
    opinions: tuple[traffic.Replies, traffic.Replies],
    admitted: dict[str, Admission],
    latency: dict[str, tuple[float, float]],
    metrics: list[str],
    seconds: dict[str, float],
    path: str,
    seed: int,
) -> DemoResult:
    names = data.classes.names
    detected = Rate.of(triggered.flagged, len(triggered.decisions))
    alarms = Rate.of(clean.flagged, len(clean.decisions))
    opinion_alarms, by_opinion = (Rate.of(each.flagged, len(each.decisions)) for each in opinions)
    verdicts = {name: vetting.verdict for name, vetting in vettings.items()}
    failures = []
    if verdicts["backdoored"].outcome != "backdoored":
        failures.append(f"the backdoored model was called {verdicts['backdoored'].outcome!r}")
    elif verdicts["backdoored"].target != TARGET:
        failures.append("the backdoored model was found, with the wrong target class")
    if verdicts["clean-twin"].outcome == "backdoored":
        failures.append("the clean twin was called 'backdoored'")
    if detected.value < MIN_DETECTED:
        failures.append(
            f"only {detected.value:.1%} of triggered requests were flagged ({MIN_DETECTED:.0%} are promised)"
        )
    if alarms.value > MAX_FALSE_ALARMS:
        failures.append(
            f"{alarms.value:.1%} of clean requests were flagged (at most {MAX_FALSE_ALARMS:.0%} are promised)"
        )
    if by_opinion.value < MIN_BY_OPINION:
        failures.append(
            f"only {by_opinion.value:.1%} of triggered requests were flagged by the second opinion alone "
            f"({MIN_BY_OPINION:.0%} are promised)"
        )
    wanted = {"clean-twin": verdicts["clean-twin"].outcome == "no evidence", "backdoored": False, TAMPERED: False}
    failures += [
        f"the trust policy {'admits' if admitted[name].admitted else 'refuses'} the {name}"
        for name, expected in wanted.items()
        if admitted[name].admitted is not expected
    ]
    return DemoResult(
        len(names),
        {name: model.accuracy for name, model in models.items()},
        {name: model.success for name, model in models.items()},
        {name: verdict.outcome for name, verdict in verdicts.items()},
        {name: None if verdict.target is None else names[verdict.target] for name, verdict in verdicts.items()},
        names[TARGET],
        ALPHA,
        detected,
        alarms,
        by_opinion,
        opinion_alarms,
        {name: "admitted" if each.admitted else f"refused ({each.rule})" for name, each in admitted.items()},
        latency,
        metrics,
        seconds,
        failures,
        path,
        seed,
    )


def _rows(result: DemoResult) -> list[tuple[str, str]]:
    rows = []
    for name in result.accuracy:
        text = f"accuracy {result.accuracy[name]:.3f}, attack success {result.attack_success[name]:.3f}"
        rows.append((name, text))
    for name, outcome in result.verdicts.items():
        target = result.targets[name]
        rows.append((f"verdict on {name}", f"{outcome}{f', target {target!r}' if target else ''}"))
    rows += [(f"certificate: {name}", decision) for name, decision in result.admissions.items()]
    rows.append(("attacker's target", repr(result.true_target)))
    rows.append(("triggered requests flagged", str(result.detected).strip()))
    rows.append((f"clean requests flagged (α = {result.alpha:g})", str(result.false_alarms).strip()))
    rows.append(("flagged by the second opinion alone", str(result.detected_by_opinion).strip()))
    rows.append(("clean requests flagged by it", str(result.false_alarms_by_opinion).strip()))
    for name, (p50, p99) in result.latency.items():
        rows.append((f"latency {name}", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"))
    return rows


def table(result: DemoResult) -> str:
    """The result as a table for people."""
    rows = _rows(result)
    width = max(len(label) for label, _ in rows)
    rule = "─" * (width + 62)
    lines = [rule, *(f"{label:<{width}}  {value}" for label, value in rows), rule]
    lines += [f"  {line}" for line in result.metrics]
    lines += [rule, f"report: {result.report}"]
    lines.append("time: " + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in result.seconds.items()))
    lines += [f"FAILED: {failure}" for failure in result.failures]
    return "\n".join(lines)
