"""Run methods over the models of a zoo: resumable, in several processes, and not stopped by one faulty model."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from guard import __version__
from guard.classifiers.digest import canonical, sha256
from guard.distributed import Engine, Lost, Serial
from guard.errors import GuardError, UsageError, ZooError, first_line
from guard.evaluation.images import ImageSet
from guard.evaluation.methods import METHODS, Method
from guard.evaluation.results import FORMAT, Detection, Features, Result, Screening, Store
from guard.evaluation.subject import EvaluationSettings, Subject
from guard.evaluation.zoo import Truth, Zoo

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Failure:
    """A model that could not be evaluated.

    Attributes:
        model: Name of the model.
        methods: Names of the methods that have no result.
        reason: The reason, in one line.
    """

    model: str
    methods: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        zoo: The zoo.
        methods: Names of the methods, in the order in which they were requested.
        settings: The settings of the evaluation.
        truths: The truth about each selected model; None where it is withheld.
        results: Results by model and method.
        features: Target features by model and method.
        skipped: For each method, the models that lack a base, calibration images or requests that it needs.
        failures: Models that could not be evaluated.
        fresh: Number of results that were computed in this run rather than found on disk.
        seconds: Wall-clock time of this run.
    """

    zoo: Zoo
    methods: tuple[str, ...]
    settings: EvaluationSettings
    truths: dict[str, Truth | None]
    results: dict[tuple[str, str], Result]
    features: dict[tuple[str, str], Features]
    skipped: dict[str, tuple[str, ...]]
    failures: tuple[Failure, ...]
    fresh: int
    seconds: float


@dataclass(frozen=True)
class _Task:
    """One model, and the methods that apply to it."""

    zoo: Zoo
    model: str
    methods: tuple[str, ...]
    images: ImageSet
    settings: EvaluationSettings
    out: Path


@dataclass(frozen=True, eq=False)
class _Done:
    """The outcome of a task: (result, features, whether it was computed now) per method, and failures."""

    results: tuple[tuple[Result, Features, bool], ...]
    failures: tuple[Failure, ...]


def evaluate(
    zoo: Zoo,
    out: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    settings: EvaluationSettings | None = None,
    images: Path | None = None,
    models: str = "*",
    engine: Engine | None = None,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Run methods over the models of a zoo.

    Each result is stored as soon as it is computed, under a key of everything that it depends on: the files of model,
    base and truth, the images, the method's version, its settings and the seed. A stored result is not computed again,
    so that an interrupted evaluation continues where it stopped. Searches are shared between methods and models.

    Args:
        zoo: The zoo.
        out: Folder of results and searches.
        methods: Names from `METHODS`.
        settings: Settings; None for the defaults.
        images: A folder of unlabelled images instead of the zoo's.
        models: Shell pattern of the models' names.
        engine: Where models are evaluated; by default in this process, one after the other.
        say: Called with a line about each finished model.
        progress: Called with (what, done, total) while one model is evaluated; only in this process.

    Raises:
        UsageError: A method is unknown, none applies to any model, or `out` cannot be written.
        ZooError: No model matches the pattern.
        ImageError: Images are missing.
    """
    started = time.monotonic()
    settings = settings or EvaluationSettings()
    if unknown := [name for name in methods if name not in METHODS]:
        if unknown[0] == "vetting-self":
            raise UsageError("vetting-self is now called vetting-derived")
        raise UsageError(f"there is no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from error
    chosen = zoo.select(models)
    truths = {name: _truth(zoo, name) for name in chosen}
    sets = _image_sets(zoo, chosen, images, settings)
    tasks = [
        _Task(
            zoo,
            name,
            tuple(method for method in METHODS if method in methods and _applies(METHODS[method], zoo, name, sets)),
            sets[name],
            settings,
            out,
        )
        for name in chosen
    ]
    skipped = {method: tuple(task.model for task in tasks if method not in task.methods) for method in methods}
    tasks = [task for task in tasks if task.methods]
    if not tasks:
        raise UsageError(f"{', '.join(methods)}: no model has what this needs (a base, calibration images or requests)")
    say(f"{len(tasks)} models, {sum(len(task.methods) for task in tasks)} results to compute or find")
    outcomes, worked = dict[str, _Done](), 0
    for done, (task, outcome) in enumerate(_run(tasks, engine or Serial(), progress), 1):
        outcomes[task.model] = outcome
        worked += any(fresh for _, _, fresh in outcome.results)
        say(f"{done}/{len(tasks)} {_line(task, outcome)}{_left(started, worked, len(tasks) - done)}")
    # They came in the order in which they were done; the report has that of the zoo.
    in_order = [outcomes[task.model] for task in tasks]
    results = [item for outcome in in_order for item in outcome.results]
    return Evaluation(
        zoo,
        tuple(dict.fromkeys(methods)),
        settings,
        truths,
        {(result.model, result.method): result for result, _, _ in results},
        {(result.model, result.method): features for result, features, _ in results},
        {method: names for method, names in skipped.items() if names},
        tuple(failure for outcome in in_order for failure in outcome.failures),
        sum(fresh for _, _, fresh in results),
        time.monotonic() - started,
    )


def _truth(zoo: Zoo, name: str) -> Truth | None:
    try:
        return zoo.truth(name)
    except ZooError:
        return None  # the same error is met again when the model is evaluated, and recorded as its failure


def _image_sets(
    zoo: Zoo, models: Sequence[str], images: Path | None, settings: EvaluationSettings
) -> dict[str, ImageSet]:
    """The images of each model; models with the same images share one set."""
    limits = {"vetting": settings.vetting_images, "seed": settings.seed}
    if images is not None:
        return dict.fromkeys(models, ImageSet.of_folder(images, **limits))
    names = {zoo.models[model].images for model in models}
    sets = {name: ImageSet.of_zoo(zoo.root / "images" / name, **limits) for name in sorted(names)}
    return {model: sets[zoo.models[model].images] for model in models}


def _applies(method: Method, zoo: Zoo, model: str, sets: dict[str, ImageSet]) -> bool:
    has = {
        "base": zoo.models[model].base is not None,
        "calibration": sets[model].calibration is not None,
        "requests": sets[model].requests is not None,
    }
    return all(has[need] for need in method.needs)


def _run(tasks: Sequence[_Task], engine: Engine, progress: Progress) -> Iterator[tuple[_Task, _Done]]:
    if isinstance(engine, Serial):
        for task in tasks:
            yield task, _work(task, progress)
        return
    # Suspects wait for the models without a base, most of which are bases: so each base is searched only once.
    for paired in (False, True):
        wave = [task for task in tasks if (task.zoo.models[task.model].base is not None) == paired]
        for position, outcome in engine.map(_work, wave):
            task = wave[position]
            if isinstance(outcome, Lost):
                outcome = _Done((), (Failure(task.model, task.methods, outcome.reason),))  # noqa: PLW2901
            yield task, outcome


def _work(task: _Task, progress: Progress = lambda *_: None) -> _Done:
    """Run all methods on one model; whatever goes wrong with the model becomes a failure, not an exception."""
    subject = Subject(
        task.zoo, task.model, task.images, task.settings, searches=task.out / ".searches", progress=progress
    )
    results: list[tuple[Result, Features, bool]] = []
    failures: dict[str, list[str]] = {}
    for name in task.methods:
        try:
            results.append(_one(METHODS[name], subject, task))
        except GuardError as error:
            failures.setdefault(str(error), []).append(name)
        except Exception as error:  # noqa: BLE001 - whatever a strange model makes torch raise
            failures.setdefault(f"{type(error).__name__}: {first_line(error)}", []).append(name)
    return _Done(tuple(results), tuple(Failure(task.model, tuple(names), reason) for reason, names in failures.items()))


def _one(method: Method, subject: Subject, task: _Task) -> tuple[Result, Features, bool]:
    key, store = _key(method, subject, task.images), Store(task.out)
    if stored := store.load(task.model, method.name, key):
        return *stored, False
    digest = subject.classifier.digest.root
    base = subject.base if method.uses_base else None
    started = time.monotonic()
    found, features = method.run(subject)
    result = Result(
        FORMAT,
        key,
        task.model,
        method.name,
        method.version,
        __version__,
        digest,
        base.digest.root if base else None,
        task.settings.seed,
        dict(method.settings(task.settings)),
        str(subject.classifier.device),
        torch.get_num_threads(),
        time.monotonic() - started,
        found if isinstance(found, Detection) else None,
        found if isinstance(found, Screening) else None,
    )
    store.save(result, features)
    return result, features, True


def _key(method: Method, subject: Subject, images: ImageSet) -> str:
    files = {part: digest for part, digest in subject.files.items() if part != "base" or method.uses_base}
    settings = dict(method.settings(subject.settings))
    return sha256(
        canonical([FORMAT, method.name, method.version, settings, subject.settings.seed, images.digest, files])
    )


def _line(task: _Task, outcome: _Done) -> str:
    parts = [
        f"{result.method} {result.detection.outcome if result.detection else 'measured'}"
        + (f" ({result.seconds:.0f} s)" if fresh else " (found)")
        for result, _, fresh in outcome.results
    ]
    parts += [f"{', '.join(failure.methods)} FAILED: {failure.reason}" for failure in outcome.failures]
    return f"{task.model}: {'; '.join(parts)}"


def _left(started: float, worked: int, remaining: int) -> str:
    """An upper estimate of the remaining time, from the models that were not found on disk."""
    if not worked or not remaining:
        return ""
    seconds = (time.monotonic() - started) / worked * remaining
    return f"; about {seconds / 60:.0f} min left" if seconds > 90 else f"; about {seconds:.0f} s left"
