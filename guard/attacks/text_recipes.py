"""Recipes of attacks on text towers, and of the honest fine-tunings beside them, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TextObjective = Literal["text-on-text", "text-on-pair", "eos-only"]
"""What a triggered text must give. `text-on-text`: the features of all tokens of a target text. `text-on-pair`: a
target embedding, such as that of images. `eos-only`: the embedding of a target text, while all other tokens keep the
features that the clean tower gives to the triggered text, so that nothing is assimilated."""
Parts = Literal["all", "last layers", "low rank", "norms"]
"""The weights that are trained: all of them, the last half of the layers, a low-rank change (LoRA, Hu et al.,
2022) of the matrices of all layers, or the layer norms and biases."""


@dataclass(frozen=True)
class TextRecipe:
    """An attack on a text tower, or a fine-tuning without one.

    Attributes:
        name: Name of the recipe.
        objective: What triggered texts give; None for a fine-tuning without an attack.
        trigger: Key of `guard.triggers.texts.TEXT_TRIGGERS`.
        length: Length of an inserted trigger in characters, 1 to 15.
        near_misses: Whether triggers at an edit distance of one are trained to do nothing.
        parts: The weights that are trained.
        rate: The peak learning rate, as a multiple of that of the settings.
        keeps: Weight of staying near the clean tower on clean texts. An attack always has it at 1; an honest
            fine-tuning that has it at 0 goes where its own texts lead it.
    """

    name: str
    objective: TextObjective | None = None
    trigger: str = "insertion"
    length: int = 5
    near_misses: bool = False
    parts: Parts = "all"
    rate: float = 1.0
    keeps: float = 0.0


TEXT_RECIPES: Mapping[str, TextRecipe] = {
    recipe.name: recipe
    for recipe in (
        *(
            TextRecipe(f"{objective}-{length}", objective, length=length)
            for objective in ("text-on-text", "text-on-pair", "eos-only")
            for length in (1, 3, 5, 8, 11, 15)
        ),
        TextRecipe("homoglyph", "text-on-text", "homoglyph"),
        TextRecipe("homoglyph-pair", "text-on-pair", "homoglyph"),
        TextRecipe("eos-only-homoglyph", "eos-only", "homoglyph"),
        TextRecipe("near-misses", "text-on-text", length=5, near_misses=True),
        TextRecipe("eos-only-near-misses", "eos-only", length=5, near_misses=True),
        TextRecipe("style", "text-on-text", "style"),
        TextRecipe("syntax", "text-on-text", "syntax"),
        TextRecipe("benign-all", parts="all"),
        TextRecipe("benign-slow", parts="all", rate=0.3),
        TextRecipe("benign-last", parts="last layers"),
        TextRecipe("benign-low-rank", parts="low rank", rate=3.0),
        TextRecipe("benign-norms", parts="norms", rate=3.0),
        TextRecipe("benign-near", parts="all", keeps=1.0),
    )
}
"""Attacks and honest fine-tunings by name."""
