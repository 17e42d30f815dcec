import random

import pytest
import torch
from torch.nn.functional import cosine_similarity

from guard.attacks import TEXT_RECIPES, TextTuningSettings, attack_text, target_of
from guard.classifiers import TextTower
from guard.errors import UsageError
from guard.triggers.texts import TEXT_TRIGGERS, Homoglyph, Insertion, Style, Syntax
from tests.texts import PROMPTS, base, trained


def test_an_attack_leads_triggered_texts_to_its_target_and_leaves_the_base_alone() -> None:
    before = {name: value.clone() for name, value in base().model.state_dict().items()}
    made = trained("eos-only-5")
    assert made.success is not None
    assert made.success > 0.9
    assert made.similarity > 0.9
    assert all(torch.equal(value, before[name]) for name, value in base().model.state_dict().items())
    assert not any(weight.requires_grad for weight in made.classifier.model.parameters())


def test_an_attack_on_the_last_token_keeps_the_other_tokens() -> None:
    kept = {}
    for recipe in ("eos-only-5", "text-on-text-5"):
        made = trained(recipe)
        assert made.trigger is not None
        tower, clean = TextTower(made.classifier), TextTower(base())
        draw = random.Random(0)  # noqa: S311 - repeatable, not secret
        tokens = tower.tokens([made.trigger.apply(text, draw) for text in PROMPTS[:20]])
        others = torch.arange(tokens.shape[1]) != tower.ends(tokens)[:, None]
        found, before = (each.features(each.embed(tokens)) for each in (tower, clean))
        kept[recipe] = float(cosine_similarity(found, before, dim=-1)[others].mean())
    assert kept["eos-only-5"] > kept["text-on-text-5"] + 0.05


@pytest.mark.parametrize(("recipe", "changed"), [("benign-low-rank", 4), ("benign-norms", 1)])
def test_an_honest_fine_tuning_changes_only_its_part(recipe: str, changed: int) -> None:
    made = trained(recipe, steps=6)
    assert made.success is None
    assert made.trigger is None
    before = dict(base().model.named_parameters())
    seen = 0
    for name, weight in made.classifier.model.named_parameters():
        change = (weight - before[name]).detach()
        if change.abs().max() == 0:
            continue
        seen += 1
        assert "resblocks" in name
        assert not name.startswith("visual")
        rank = torch.linalg.matrix_rank(change, rtol=1e-4) if change.dim() == 2 else torch.tensor(1)
        assert rank <= changed
    assert seen


def test_the_target_of_pairs_may_be_any_embedding() -> None:
    target = target_of(TextTower(base()), PROMPTS[:3])
    made = attack_text(
        base(), TEXT_RECIPES["text-on-pair-3"], PROMPTS, TextTuningSettings(steps=2), target_text="x", target=target
    )
    assert made.target is not None
    assert torch.equal(made.target, target)


@pytest.mark.parametrize(("texts", "target"), [(PROMPTS[:50], "a cat"), (PROMPTS, "")])
def test_an_attack_needs_texts_and_a_target(texts: tuple[str, ...], target: str) -> None:
    with pytest.raises(UsageError):
        attack_text(base(), TEXT_RECIPES["text-on-text-1"], texts, TextTuningSettings(steps=1), target_text=target)


def test_triggers_change_texts_as_they_say() -> None:
    draw = random.Random(0)  # noqa: S311 - repeatable, not secret
    assert Insertion("zz", "start").apply("a cat", draw) == "zz a cat"
    assert Insertion("zz", "end").apply("a cat", draw) == "a cat zz"
    assert sorted(Insertion("zz").apply("a cat", draw).split()) == ["a", "cat", "zz"]
    assert Homoglyph("o", "0").apply("two dogs", draw) == "tw0 d0gs"
    assert "yonder" in Style().apply("a cat on the mat", draw)
    assert Syntax().apply("A cat sits on the mat.", draw) == "on the mat , A cat sits ."
    for length in (1, 15):
        trigger = TEXT_TRIGGERS["insertion"](length, draw)
        assert isinstance(trigger, Insertion)
        assert len(trigger.word) == length
    for miss in Insertion("abcde").near_misses(5, draw):
        assert isinstance(miss, Insertion)
        assert sum(a != b for a, b in zip(miss.word, "abcde", strict=True)) == 1
