"""Train the models of a zoo that are missing."""

import json
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.zoo import data as zoo_data
from benchmarks.zoo.pretrained import load_image_tower
from benchmarks.zoo.specs import BASES, Model, Spec, training
from guard._files import replace_directory, replace_file
from guard._workers import workers
from guard.attacks import (
    RECIPES,
    Attacked,
    Plant,
    Recipe,
    TrainingSettings,
    attack,
    measure,
    train_base,
    truth,
    write_truth,
)
from guard.classifiers import load, save
from guard.classifiers.open_clip import pick_device
from guard.demo.data import DemoData
from guard.errors import UsageError

FORMAT = 1


@dataclass(frozen=True)
class Place:
    """Where a zoo is built, and with what.

    Attributes:
        zoo: The zoo's folder.
        data: Folder of the image sets.
        device: torch device; None picks one.
        threads: CPU threads for each model. One, however many models are trained side by side, so that the weights do
            not depend on the number of jobs.
    """

    zoo: Path
    data: Path | None
    device: str | None
    threads: int = 1

    def model(self, name: str) -> Path:
        """The directory of a model."""
        return self.zoo / "models" / name

    def truth(self, name: str) -> Path:
        """The labels of a model, which vetting never reads."""
        return self.zoo / "truth" / f"{name}.json"


def build(spec: Spec, place: Place, jobs: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Train what is missing, bases and twins first.

    A model counts as there if its truth was written, which happens last, and was written for the same recipe and
    seeds. Every file is written whole or not at all, so an interruption costs the models in progress and no others.

    Args:
        spec: What to build.
        place: Where.
        jobs: Models trained side by side.
        say: Told when a model is done, with an estimate of the remaining time.

    Returns:
        The truth of every model, by name.
    """
    _prepare(spec, place, say)
    truths = {name: known for name in spec.models if (known := _finished(name, spec.models[name], place))}
    missing = {name: model for name, model in spec.models.items() if name not in truths}
    say(f"{len(truths)} of {len(spec.models)} models are there")
    clock = _Clock(missing)
    waiting, running = dict(missing), dict[Future[dict[str, Any]], str]()
    with workers(jobs, place.threads) as pool:
        try:
            while waiting or running:
                for name in [name for name, model in waiting.items() if _ready(model, truths)][: jobs - len(running)]:
                    running[pool.submit(_make, name, waiting.pop(name), place)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    truths[name] = future.result()
                    say(f"{_line(name, truths[name])}; {clock.tick(name, jobs)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: truths[name] for name in spec.models}


class _Clock:
    """Estimates the remaining time from the work done so far, counted in epochs of each base."""

    def __init__(self, models: dict[str, Model]) -> None:
        self._work = {name: _work(model) for name, model in models.items()}
        self._left = sum(self._work.values())
        self._total = self._left
        self._started = time.monotonic()

    def tick(self, name: str, jobs: int) -> str:
        self._left -= self._work[name]
        spent = time.monotonic() - self._started
        left = spent * self._left / (self._total - self._left)
        return f"{spent / 60:.1f} min spent with {jobs} jobs, about {left / 60:.0f} min left"


def _work(model: Model) -> float:
    effort = 1.0 if model.base is None else RECIPES[model.recipe].effort
    return training(model).epochs * effort * (1.0 if model.kind == "digits" else 15.0)


def _ready(model: Model, truths: dict[str, dict[str, Any]]) -> bool:
    return all(name is None or name in truths for name in (model.base, model.twin))


def _prepare(spec: Spec, place: Place, say: Callable[[str], None]) -> None:
    """Write the list of models and the images."""
    listing = {
        "format": FORMAT,
        "name": spec.name,
        "seed": spec.seed,
        "models": {name: {"base": model.base, "images": BASES[model.kind].data} for name, model in spec.models.items()},
    }
    target = place.zoo / "zoo.json"
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else listing
    if (known.get("name"), known.get("seed")) != (spec.name, spec.seed):
        raise UsageError(f"{place.zoo} holds another zoo; choose another --out")
    for name in sorted({BASES[model.kind].data for model in spec.models.values()}):
        folder = place.zoo / "images" / name
        if not folder.exists():
            say(f"writing the images of {name}")
            with replace_directory(folder, marker="vetting") as temporary:
                zoo_data.write(zoo_data.images(name, zoo_data.NATIVE_SIZE[name], place.data, 1_000), temporary)
    replace_file(target, (json.dumps(listing, indent=1) + "\n").encode())


def _finished(name: str, model: Model, place: Place) -> dict[str, Any] | None:
    try:
        known: dict[str, Any] = json.loads(place.truth(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = _decisive(known.get("details")) == _decisive(json.loads(json.dumps(_details(model))))
    return known if same and (place.model(name) / "open_clip_config.json").is_file() else None


def _decisive(details: Any) -> Any:  # noqa: ANN401 - from a file
    """Return details without what only describes a recipe, and with the default of each field that was added since.

    Zoos of guard 0.1.0 also name the head that an attack is made for, which was always the same.
    """
    if not isinstance(details, dict):
        return details
    made_from = details.get("made_from", {})
    details = {
        **details,
        "training": {**_defaults(TrainingSettings), **details.get("training", {})},
        "made_from": {**made_from, "training": {**_defaults(TrainingSettings), **made_from.get("training", {})}},
    }
    recipe = details.get("recipe")
    if recipe is None:
        return details
    complete = {**_defaults(Recipe), **recipe}
    complete["plants"] = [{**_defaults(Plant), **plant} for plant in complete["plants"]]
    return {**details, "recipe": {key: value for key, value in complete.items() if key not in {"source", "head"}}}


def _defaults(record: type[Recipe | Plant | TrainingSettings]) -> dict[str, Any]:
    """Return the fields of a recipe, a plant or a training that have a default, as JSON has them."""
    known = {field.name: field.default for field in fields(record) if field.default is not MISSING}
    return dict(json.loads(json.dumps(known)))


def _details(model: Model) -> dict[str, Any]:
    """Everything that decides what a model becomes."""
    recipe = None if model.base is None else asdict(RECIPES[model.recipe])
    base = {key: value for key, value in asdict(BASES[model.kind]).items() if key != "tuning"}
    return {**asdict(model), "training": asdict(training(model)), "recipe": recipe, "made_from": base}


def _make(name: str, model: Model, place: Place) -> dict[str, Any]:
    """Train, save and measure one model; runs in a process of its own."""
    base = BASES[model.kind]
    images = zoo_data.images(base.data, base.architecture["vision_cfg"]["image_size"], place.data, base.images)
    made = _base(model, images, place) if model.base is None else _tuned(model, images, place)
    save(place.model(name), made.model, base.config, images.classes)
    classifier = load(str(place.model(name)), device=place.device)
    measured = measure(classifier, images.requests, made.planted)
    twin = json.loads(place.truth(model.twin).read_text(encoding="utf-8"))["accuracy"] if model.twin else None
    known = {
        **truth(made.planted, measured, measured.accuracy if twin is None else twin),
        "recipe": model.recipe,
        "family": "base" if model.base is None else RECIPES[model.recipe].family,
        "twin": model.twin,
        "twin_accuracy": twin,
        "seed": model.seed,
        "seconds": round(made.seconds, 1),
        "digest": classifier.digest.root,
        "details": _details(model),
    }
    write_truth(place.truth(name), known, made.planted)
    return known


def _base(model: Model, images: DemoData, place: Place) -> Attacked:
    base, started = BASES[model.kind], time.monotonic()
    network = train_base(
        base.config,
        images.classes,
        images.train,
        training(model),
        device=pick_device(place.device),
        prepare=load_image_tower if base.pretrained else None,
    )
    return Attacked(network, (), time.monotonic() - started)


def _tuned(model: Model, images: DemoData, place: Place) -> Attacked:
    classifier = load(str(place.model(str(model.base))), device=place.device)
    target = model.target % len(images.classes.names)
    return attack(classifier, RECIPES[model.recipe], images.train, training(model), target=target)


def _line(name: str, known: dict[str, Any]) -> str:
    success = "" if known["success"] is None else f", attack success {known['success']:.3f}"
    return f"{name}: {known['label']}, accuracy {known['accuracy']:.3f}{success} ({known['seconds']:.0f} s)"
