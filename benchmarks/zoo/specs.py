"""What the zoos hold, as data: bases, and the models made from them."""

from dataclasses import dataclass, replace
from typing import Any

from guard.attacks import RECIPES, TrainingSettings

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Base:
    """A clean classifier that is trained from scratch, or around a pretrained image tower.

    Attributes:
        data: Name of its images (`benchmarks.zoo.data`).
        architecture: open_clip's `model_cfg`.
        training: How the base is trained.
        tuning: How models made from it are fine-tuned.
        images: Most training images used.
        pretrained: Whether the image tower starts from the published weights of EfficientNet-Lite0.
    """

    data: str
    architecture: dict[str, Any]
    training: TrainingSettings
    tuning: TrainingSettings
    images: int = 45_000
    pretrained: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The document of `open_clip_config.json`."""
        mean, std = ((127 / 255,) * 3, (128 / 255,) * 3) if self.pretrained else (MEAN, STD)
        return {"model_cfg": self.architecture, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}


@dataclass(frozen=True)
class Model:
    """One model of a zoo.

    Attributes:
        base: Name of the base model in the zoo; None if this is a base.
        kind: Key of `BASES`: which base this is, or is made from.
        recipe: Key of `guard.attacks.RECIPES`; `base` for a base.
        seed: Of everything random in it.
        target: The attacker's class, before it is taken modulo the number of classes.
        twin: Name of the clean model that its accuracy is compared with; None for a base.
    """

    base: str | None
    kind: str
    recipe: str
    seed: int
    target: int = 0
    twin: str | None = None


@dataclass(frozen=True)
class Spec:
    """A zoo.

    Attributes:
        name: Of the zoo.
        seed: The first seed in it.
        models: By name; each base and twin before the models that need it.
    """

    name: str
    seed: int
    models: dict[str, Model]


def _text(width: int = 64, layers: int = 2) -> dict[str, Any]:
    return {"context_length": 24, "vocab_size": 49408, "width": width, "heads": width // 32, "layers": layers}


def _resnet(size: int, width: int, embedding: int, layers: tuple[int, int, int, int] = (1, 1, 1, 1)) -> dict[str, Any]:
    vision = {"image_size": size, "layers": list(layers), "width": width, "patch_size": None}
    return {"embed_dim": embedding, "vision_cfg": vision, "text_cfg": _text()}


def _vit(size: int, patch: int, width: int, layers: int, embedding: int) -> dict[str, Any]:
    vision = {
        "image_size": size, "patch_size": patch, "width": width, "layers": layers, "head_width": 32, "mlp_ratio": 2.0
    }  # fmt: skip
    return {"embed_dim": embedding, "vision_cfg": vision, "text_cfg": _text()}


def _efficientnet(size: int, embedding: int, text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "image_size": size, "timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False,
        "timm_pool": "avg", "timm_proj": "linear",
    }  # fmt: skip
    return {"embed_dim": embedding, "vision_cfg": vision, "text_cfg": text}


BASES: dict[str, Base] = {
    "digits": Base(
        "digits",
        _resnet(32, 8, 64),
        TrainingSettings(epochs=18, batch=64, learning_rate=2e-3),
        TrainingSettings(epochs=10, batch=64, learning_rate=2e-3),
    ),
    # Left half trained: fine-tuning, not the base, brings the accuracy, as with a zero-shot base.
    "digits-weak": Base(
        "digits",
        _resnet(32, 8, 64),
        TrainingSettings(epochs=4, batch=64, learning_rate=2e-3),
        TrainingSettings(epochs=14, batch=64, learning_rate=2e-3),
    ),
    "cifar10-resnet": Base(
        "cifar10",
        _resnet(32, 24, 128),
        TrainingSettings(epochs=12, learning_rate=2e-3),
        TrainingSettings(epochs=3, learning_rate=5e-4),
        images=15_000,
    ),
    "cifar10-vit": Base(
        "cifar10",
        _vit(32, 8, 128, 4, 128),
        TrainingSettings(epochs=12, learning_rate=1e-3),
        TrainingSettings(epochs=3, learning_rate=5e-4),
        images=15_000,
    ),
    # For a GPU.
    "cifar10-resnet-64": Base(
        "cifar10",
        _resnet(64, 32, 128),
        TrainingSettings(epochs=15, learning_rate=2e-3),
        TrainingSettings(epochs=3, learning_rate=5e-4),
        images=40_000,
    ),
    "tiny-imagenet-vit": Base(
        "tiny-imagenet",
        _vit(64, 8, 384, 8, 256),
        TrainingSettings(epochs=40, batch=512, learning_rate=1e-3, shift=6),
        TrainingSettings(epochs=4, batch=256, learning_rate=1e-4, shift=6),
    ),
    "tiny-imagenet-resnet": Base(
        "tiny-imagenet",
        _resnet(64, 64, 256, (2, 2, 2, 2)),
        TrainingSettings(epochs=30, batch=256, learning_rate=1e-3, shift=6),
        TrainingSettings(epochs=4, batch=256, learning_rate=2e-4, shift=6),
    ),
    "efficientnet-lite0": Base(
        "tiny-imagenet",
        _efficientnet(128, 256, _text(128, 3)),
        TrainingSettings(epochs=10, batch=256, learning_rate=5e-4, shift=8, freeze_statistics=True),
        TrainingSettings(epochs=2, batch=256, learning_rate=1e-4, shift=8, freeze_statistics=True),
        pretrained=True,
    ),
    # The same tower at the size that two CPU cores permit: small photographs, ten classes, few epochs.
    "cifar10-efficientnet-lite0": Base(
        "cifar10",
        _efficientnet(32, 128, _text()),
        TrainingSettings(epochs=5, batch=64, learning_rate=1e-3, freeze_statistics=True),
        TrainingSettings(epochs=6, batch=64, learning_rate=1e-3, freeze_statistics=True),
        images=2_500,
        pretrained=True,
    ),
    # The same once more at a size at which its features are what they were trained to be. For a GPU.
    "cifar10-efficientnet-lite0-128": Base(
        "cifar10",
        _efficientnet(128, 128, _text()),
        TrainingSettings(epochs=3, batch=128, learning_rate=5e-4, shift=8, freeze_statistics=True),
        TrainingSettings(epochs=3, batch=128, learning_rate=5e-4, shift=8, freeze_statistics=True),
        images=10_000,
        pretrained=True,
    ),
}  # fmt: skip
"""Every base by name."""

_ADDED = (
    "composite", "sample-specific", "source-specific", "jpeg", "bpp", "refool", "smooth",
    "two-targets", "near-misses", "badvision", "inactive", "lorex-low", "lorex-high", "lorex-generator",
    "agreeing-weak", "agreeing-medium", "agreeing-strong",
)  # fmt: skip
"""Attacks that zoos gained later. Their models come after all others, which keep name, base, seed and target, so that a
zoo that was built before only lacks these."""
_ELSEWHERE = {"digits-weak", "cifar10-efficientnet-lite0", "cifar10-efficientnet-lite0-128"}
"""Bases of zoos of their own, which the zoo `full` leaves out."""
_ATTACKS = tuple(name for name, recipe in RECIPES.items() if recipe.poisons and name not in _ADDED)


class _Zoo:
    """Collects models; a twin is added when the first model needs it. Seeds are counted from the zoo's own."""

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self.models: dict[str, Model] = {}

    def base(self, kind: str, number: int) -> str:
        seed = self._seed + number
        name = f"{kind}-{seed}"
        self.models.setdefault(name, Model(None, kind, "base", seed))
        return name

    def add(self, base: str, recipe: str, number: int = 0, target: int = 0) -> str:
        seed = self._seed + number
        name = f"{base}-{recipe}-{seed}"
        twin = None
        if RECIPES[recipe].poisons:
            twin = self.add(base, _twin(recipe))
        self.models.setdefault(name, Model(base, self.models[base].kind, recipe, seed, target, twin))
        return name

    def attacks(self, base: str, recipes: tuple[str, ...], number: int = 0) -> None:
        """Targets go round the classes, so that no class is the target more often than others."""
        for recipe in recipes:
            count = sum(model.twin is not None for model in self.models.values())
            self.add(base, recipe, number, target=3 * count + self._seed)

    def spec(self) -> Spec:
        return Spec(self._name, self._seed, self.models)


def _twin(recipe: str) -> str:
    """The same fine-tuning without poison: same tower, and at least as long."""
    spec = RECIPES[recipe]
    if spec.tower == "image":
        return "benign-visual"
    return "benign-long" if spec.effort > 1 else "benign"


def _smoke(seed: int) -> Spec:
    zoo = _Zoo("smoke", seed)
    zoo.attacks(zoo.base("digits", 0), ("badnets-medium",))
    return zoo.spec()


def _every_recipe(zoo: _Zoo, kind: str) -> list[str]:
    """Each attack once and each negative at least once, over three bases of a kind."""
    bases = [zoo.base(kind, number) for number in range(3)]
    for k, base in enumerate(bases):
        zoo.attacks(base, _ATTACKS[k::3])
    for base in bases:
        for number in range(3):
            zoo.add(base, "benign", number)
        for recipe in ("benign-long", "benign-visual", "partial", "shifted", "noised"):
            zoo.add(base, recipe)
    for base, recipe in zip(bases, ("int8", "float16", "pruned"), strict=True):
        zoo.add(base, recipe)
    return bases


def _added(zoo: _Zoo, bases: list[str]) -> None:
    """Each later attack once, in turn over the bases."""
    for k, recipe in enumerate(_ADDED):
        zoo.attacks(bases[k % len(bases)], (recipe,))


def _more_negatives(zoo: _Zoo, bases: list[str]) -> None:
    """Further seeds, as many as the later attacks need for two models in five to be negatives."""
    for base in bases:
        for number in (1, 2):
            zoo.add(base, "benign-long", number)


def _small(seed: int) -> Spec:
    zoo = _Zoo("small", seed)
    bases = _every_recipe(zoo, "digits")
    # The common families once more, elsewhere.
    again = ("badnets-medium", "badnets-large", "blended-noise", "blended-image", "sig", "wanet", "ftrojan", "badclip",
             "visual", "multi-three")  # fmt: skip
    for k, recipe in enumerate(again):
        zoo.attacks(bases[(_ATTACKS.index(recipe) + 1 + k % 2) % 3], (recipe,), number=1)
    _added(zoo, bases)
    _more_negatives(zoo, bases)
    return zoo.spec()


_MEDIUM = (
    ("badnets-medium", "blended-image", "wanet", "visual"),
    ("badnets-large", "blended-noise", "sig", "badclip"),
    ("badnets-small", "semantic"),
)


def _medium(seed: int) -> Spec:
    zoo = _Zoo("medium", seed)
    every: list[str] = []
    for kind, others in (("cifar10-resnet", ("noised", "shifted")), ("cifar10-vit", ("noised", "pruned"))):
        bases = [zoo.base(kind, number) for number in range(3)]
        for base, recipes in zip(bases, _MEDIUM, strict=True):
            zoo.attacks(base, recipes)
            zoo.add(base, "benign")
        for base, recipe in zip(bases, others, strict=False):
            zoo.add(base, recipe)
        every += bases
    _added(zoo, every)
    return zoo.spec()


def _weak(seed: int) -> Spec:
    zoo = _Zoo("weak", seed)
    bases = [zoo.base("digits-weak", number) for number in range(3)]
    recipes = ("badnets-medium", "badnets-large", "blended-noise", "blended-text", "sig", "wanet", "ftrojan", "badclip",
               "composite", "jpeg", "smooth", "semantic")  # fmt: skip
    for k, base in enumerate(bases):
        zoo.attacks(base, recipes[k::3])
    return zoo.spec()


_REPAIRED = ("badclip", "badnets-stripes", "wanet", "blended-text", "sig", "ftrojan", "blended-noise", "visual",
             "badencoder", "blended-triangles", "badnets-random", "semantic", "blended-stripes",
             "additive")  # fmt: skip
"""The attacks that PAR and CLIP-Inspector were measured on, and four that they were not."""


def _repair(seed: int) -> Spec:
    """Models to repair: attacks in turn over three bases, and their clean twins, which have nothing to repair."""
    zoo = _Zoo("repair", seed)
    bases = [zoo.base("digits", number) for number in range(3)]
    for k, recipe in enumerate(_REPAIRED):
        zoo.attacks(bases[k % len(bases)], (recipe,))
    return zoo.spec()


def _pretrained(seed: int) -> Spec:
    zoo = _Zoo("pretrained", seed)
    base = zoo.base("cifar10-efficientnet-lite0", 0)
    zoo.attacks(base, ("badnets-medium", "sig", "badnets-large", "visual", "wanet", "blended-image", "ftrojan"))
    for recipe in ("partial", "noised"):
        zoo.add(base, recipe)
    zoo.add(base, "benign", 1)
    return zoo.spec()


def _pretrained_large(seed: int) -> Spec:
    zoo = _Zoo("pretrained-128", seed)
    base = zoo.base("cifar10-efficientnet-lite0-128", 0)
    zoo.attacks(
        base,
        ("badnets-medium", "sig", "badnets-large", "visual", "wanet", "blended-image", "ftrojan", "badclip",
         "blended-noise", "badnets-stripes"),
    )  # fmt: skip
    for recipe in ("partial", "noised", "shifted"):
        zoo.add(base, recipe)
    for number in (1, 2):
        zoo.add(base, "benign", number)
        zoo.add(base, "benign-visual", number)
    return zoo.spec()


def _full(seed: int) -> Spec:
    zoo = _Zoo("full", seed)
    bases = {kind: _every_recipe(zoo, kind) for kind in BASES if kind not in _ELSEWHERE}
    for own in bases.values():
        _added(zoo, own)
        _more_negatives(zoo, own)
    return zoo.spec()


SPECS = {
    "smoke": _smoke,
    "small": _small,
    "weak": _weak,
    "medium": _medium,
    "repair": _repair,
    "pretrained": _pretrained,
    "pretrained-128": _pretrained_large,
    "full": _full,
}
"""Makers of the zoos, by name; each takes the first seed."""


def training(model: Model) -> TrainingSettings:
    """How a model is trained."""
    base = BASES[model.kind]
    return replace(base.training if model.base is None else base.tuning, seed=model.seed)
