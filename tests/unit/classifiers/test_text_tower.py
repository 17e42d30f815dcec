from typing import Any

import pytest
import torch

from guard.classifiers import TextTower
from guard.errors import ModelError
from tests.texts import PROMPTS, text_classifier

TEXTS = list(PROMPTS[:6])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_causal_mask": True},
        {"pool_type": "last", "no_causal_mask": True, "proj_type": "linear", "proj_bias": True},
    ],
)
def test_the_way_through_the_parts_gives_the_embeddings_of_the_classifier(changes: dict[str, Any]) -> None:
    classifier = text_classifier(**changes)
    tower = TextTower(classifier)
    assert torch.allclose(tower.encode(TEXTS, batch=4), classifier.encode_texts(TEXTS), atol=1e-6)
    assert tower.causal is not bool(changes)


def test_a_causal_tower_gives_the_first_tokens_the_same_features_without_the_rest() -> None:
    tower = TextTower(text_classifier())
    tokens = tower.tokens(TEXTS)
    whole, cut = tower.features(tower.embed(tokens)), tower.features(tower.embed(tokens[:, :9]))
    assert torch.allclose(whole[:, :9], cut, atol=1e-5)


def test_a_tower_with_a_class_token_is_refused() -> None:
    with pytest.raises(ModelError, match="class token"):
        TextTower(text_classifier(embed_cls=True))


def test_a_tower_of_another_library_is_refused() -> None:
    classifier = text_classifier()
    classifier.model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="not one of open_clip's own"):
        TextTower(classifier)
