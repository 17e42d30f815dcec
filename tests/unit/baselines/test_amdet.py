"""AMDET as released, compared with a slow transcription of its formulas."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from guard.baselines import AmdetSettings, amdet
from guard.classifiers import TextTower
from guard.errors import UsageError
from tests.texts import PROMPTS, base, text_classifier, trained

SETTINGS = AmdetSettings(prompts=60, epochs=1, batch=12)


def test_the_loss_of_the_first_step_is_the_published_one() -> None:
    tower, anchor = TextTower(trained("text-on-text-5").classifier), TextTower(base())
    result = amdet(tower, anchor, PROMPTS, SETTINGS)
    torch.manual_seed(42)
    vector = torch.randn(1, 32)
    torch.empty((), dtype=torch.int64).random_()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    first = torch.randperm(48, generator=torch.Generator().manual_seed(seed))[:12]
    losses = []
    for k in first.tolist():
        hidden = tower.embed(tower.tokens([PROMPTS[k]]))[0]
        spliced = torch.cat([hidden[:1], vector, hidden[1:]])[:24][None]
        new, anchored, old = tower.features(spliced)[0], anchor.features(spliced)[0], tower.features(hidden[None])[0]
        matrix = cosine_similarity(new[None], new[:, None], dim=2).mean()
        losses.append(-matrix + 0.1 * cosine_similarity(old, new, dim=-1).mean()
                      + 0.1 * cosine_similarity(anchored, new, dim=-1).mean())  # fmt: skip
    assert result.losses[0] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert len(result.losses) == 4
    assert result.mean_loss[3] == pytest.approx(sum(result.losses) / 4)


def test_all_four_tests_are_made_when_the_first_ones_pass() -> None:
    tower, anchor = TextTower(trained("text-on-text-5").classifier), TextTower(base())
    easy = AmdetSettings(
        prompts=60, tested=2, assimilated=-1, same=-1, different=2, shares=(0.5, 0.5, 0.5, -1.0), grid=5
    )
    result = amdet(tower, anchor, PROMPTS, easy)
    assert result.backdoored
    assert result.tests is not None
    assert len(result.losses) == 1
    assert (result.tests.assimilated, result.tests.same, result.tests.different) == (1.0, 11 / 12, 1.0)
    assert result.tests.curvature is not None
    assert 0 <= result.tests.curvature <= 1
    assert result.embedding.shape == (1, 32)
    assert result.features.shape == (24, 32)


def test_a_tower_that_never_assimilates_is_clean_without_an_error() -> None:
    result = amdet(TextTower(base()), TextTower(base()), PROMPTS, AmdetSettings(prompts=60, epochs=1, tested=-2))
    assert not result.backdoored
    assert result.tests is None


def test_full_attention_and_several_tokens_work_and_other_towers_are_refused() -> None:
    full = TextTower(text_classifier(no_causal_mask=True))
    result = amdet(full, full, PROMPTS, AmdetSettings(tokens=3, prompts=60, epochs=1))
    assert result.embedding.shape == (3, 32)
    with pytest.raises(UsageError, match="width"):
        amdet(full, TextTower(text_classifier(width=16)), PROMPTS, SETTINGS)
    with pytest.raises(UsageError, match="prompts"):
        amdet(full, full, PROMPTS[:9], SETTINGS)
