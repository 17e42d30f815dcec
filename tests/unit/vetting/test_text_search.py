import pytest
import torch

from guard.classifiers import TextTower
from guard.triggers.texts import Insertion
from guard.vetting.text_probes import TextProbe, probe_leads
from guard.vetting.text_results import Place, TextSearchSettings
from guard.vetting.text_search import Comparison, search, slotted, usable_tokens
from tests.texts import PROMPTS, base, trained

SETTINGS = TextSearchSettings(steps=12, rounds=3)


def test_tokens_put_in_as_vectors_do_what_the_same_word_does_in_the_text() -> None:
    tower = TextTower(base())
    texts = list(PROMPTS[:5])
    comparison = Comparison(tower, TextTower(trained("benign-norms").classifier), texts)
    generator = torch.Generator().manual_seed(0)
    (token,) = tower.tokens(["sks"])[0, 1:2]
    vectors = tower.table[token][None, None]
    places: tuple[tuple[Place, str], ...] = (("end", "{} sks"), ("start", "sks {}"))
    for place, written in places:
        prompts = slotted(tower, comparison.tokens, 1, place, generator)
        found = comparison.embeddings(tower, prompts, vectors)[0]
        assert torch.allclose(found, tower.encode([written.format(text) for text in texts]), atol=1e-6)


@pytest.mark.parametrize("place", ["start", "end", "anywhere"])
def test_room_is_made_between_the_first_and_the_last_token(place: Place) -> None:
    tower = TextTower(base())
    tokens = tower.tokens(PROMPTS[:20])
    prompts = slotted(tower, tokens, 3, place, torch.Generator().manual_seed(1))
    assert (prompts.room.sum(1) == 3).all()
    assert not prompts.room[:, 0].any()
    for row, before in enumerate(tokens):
        kept = prompts.tokens[row][~prompts.room[row]]
        assert torch.equal(kept, before[: len(kept)])
        assert prompts.tokens[row, prompts.ends[row]] == before.max()


def test_the_search_finds_a_planted_trigger_and_not_an_honest_change() -> None:
    leads = {}
    for recipe in ("eos-only-5", "benign-norms"):
        towers = TextTower(trained(recipe).classifier), TextTower(base())
        searched, held_out = (Comparison(*towers, list(part)) for part in (PROMPTS[:24], PROMPTS[24:48]))
        found = search(searched, held_out, usable_tokens(towers[0]), 3, "end", SETTINGS, seed=0)
        leads[recipe] = found.lead
        assert found.vectors.norm(dim=-1).max() <= towers[0].table.norm(dim=-1).max()
        assert found.tokens == search(searched, held_out, usable_tokens(towers[0]), 3, "end", SETTINGS, seed=0).tokens
    assert leads["eos-only-5"] > leads["benign-norms"] + 0.1


def test_a_probe_that_is_the_trigger_leads() -> None:
    made = trained("eos-only-5")
    assert isinstance(made.trigger, Insertion)
    probes = [TextProbe("x", "harmless"), TextProbe("x", made.trigger.word)]
    towers = TextTower(made.classifier), TextTower(base())
    leads = probe_leads(*towers, PROMPTS[:12], probes)
    assert leads[1] > 0.3 > leads[0]
    assert torch.allclose(probe_leads(*towers[::-1], PROMPTS[:12], probes), -leads, atol=1e-6)
