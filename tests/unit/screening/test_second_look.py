from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from guard.screening.counterfactuals import Undo, boxes, fill, low_pass, undoing
from guard.screening.second_look import SecondLook
from guard.triggers import FAMILIES, Additive, Blend, ColourMap, Frequency, Patch, StoredTrigger, Trigger, Warp

Floats = NDArray[np.float32]

SIDE = 32
ALPHA = 0.05


def tensors(trigger: Trigger) -> dict[str, Floats]:
    return {name: tensor.detach().float().numpy() for name, tensor in trigger.tensors().items()}


def smooth(count: int = 4, side: int = SIDE, *, seed: int = 0) -> torch.Tensor:
    """Images without a value near 0 or 1, where clipping would lose something."""
    low = torch.rand((count, 3, 5, 5), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(0.3 + 0.4 * low, size=(side, side), mode="bilinear", align_corners=True)


def undo_of(trigger: Trigger) -> Undo:
    undo = undoing(trigger.family, tensors(trigger))
    assert undo is not None
    return undo


def drawn(family: str) -> Trigger:
    kind = FAMILIES[family]
    start = kind.start(1, (3, SIDE, SIDE), torch.Generator().manual_seed(1))
    return kind.constrain(start)[0]


TRIGGERS: dict[str, tuple[Trigger, float]] = {
    "additive": (drawn("additive"), 1e-6),
    "blend": (drawn("blend"), 1e-5),
    "colour map": (ColourMap(0.3 * drawn("colour map").tensors()["lattice"]), 2e-3),
    "frequency": (Frequency(0.3 * drawn("frequency").tensors()["spectrum"], torch.tensor(1.0)), 1e-5),
    "frequency, windows": (Frequency.ftrojan(48, magnitude=60), 1e-5),
    "generator": (drawn("generator"), 2e-3),
    "weak patch": (Patch(torch.full((1, SIDE, SIDE), 0.3), drawn("blend").tensors()["pattern"]), 1e-5),
}
"""Triggers that can be undone, and the largest error."""


@pytest.mark.parametrize("side", [SIDE, 45])
@pytest.mark.parametrize("name", TRIGGERS)
def test_undoing_a_trigger_restores_the_image(name: str, side: int) -> None:
    trigger, tolerance = TRIGGERS[name]
    images = smooth(side=side)
    stamped = trigger.apply(images)
    assert (stamped - images).abs().max() > 3 * tolerance
    for image, before in zip(stamped.numpy(), images.numpy(), strict=True):
        undone = undo_of(trigger)(image)
        assert undone.dtype == np.float32
        np.testing.assert_allclose(undone, before, atol=tolerance)


@pytest.mark.parametrize("side", [SIDE, 45])
def test_undoing_a_warp_puts_the_inside_of_the_image_back_but_for_a_blur(side: int) -> None:
    warp, images = Warp.wanet(SIDE, 1.0, seed=0), smooth(side=side)
    stamped, inside = warp.apply(images), np.s_[:, 3:-3, 3:-3]
    for image, before in zip(stamped.numpy(), images.numpy(), strict=True):
        moved, left = (np.abs(after - before)[inside].mean() for after in (image, undo_of(warp)(image)))
        assert left < moved / 5


def test_a_clipped_value_stays_where_it_was_clipped() -> None:
    delta = torch.full((3, SIDE, SIDE), -0.2)
    black = np.zeros((3, SIDE, SIDE), np.float32)
    np.testing.assert_array_equal(undo_of(Additive(delta))(black), black)
    np.testing.assert_allclose(undo_of(Additive(delta))(black + np.float32(0.5)), 0.7, atol=1e-6)


def test_an_opaque_patch_is_drawn_over_from_its_surroundings_and_nothing_else_changes() -> None:
    patch = Patch.pasted(SIDE, torch.ones(3, 6, 6), top=4, left=20)
    image = smooth(1)[0].numpy()
    undone = undo_of(patch)(patch.apply(torch.from_numpy(image[None]))[0].numpy())
    changed = np.argwhere((undone != image).any(0))
    assert changed.min(0).tolist() == [2, 18]  # a margin of 2 px
    assert changed.max(0).tolist() == [11, 27]
    assert np.abs(undone - image).max() < 0.15  # it was up to 0.7


def test_a_fill_stays_between_the_values_around_it() -> None:
    image = smooth(1).numpy()
    region = np.zeros((1, SIDE, SIDE), np.bool_)
    region[0, 3:29, 5:31] = True
    filled = fill(image, region)
    np.testing.assert_array_equal(filled[:, :, ~region[0]], image[:, :, ~region[0]])
    around = image[:, :, ~region[0]]
    assert (filled >= around.min((0, 2))[:, None, None] - 1e-6).all()
    assert (filled <= around.max((0, 2))[:, None, None] + 1e-6).all()


def test_a_fill_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left"):
        fill(smooth(1).numpy(), np.ones((1, SIDE, SIDE), np.bool_))


def test_every_patch_of_a_sixth_of_the_side_lies_within_one_square() -> None:
    squares = boxes((SIDE, SIDE), 4, 3 / 8)
    for top in range(SIDE - 5 + 1):
        assert any(first <= top and top + 5 <= last for first, last, _, _ in squares)
    assert len(squares) == 16


def test_a_low_pass_takes_fine_patterns_away_and_leaves_plain_ones() -> None:
    board = np.indices((SIDE, SIDE)).sum(0) % 2 * np.ones((1, 3, 1, 1), np.float32)
    assert np.ptp(low_pass(board.astype(np.float32), 3 / 32)) < 0.1
    plain = np.full((1, 3, SIDE, SIDE), 0.3, np.float32)
    np.testing.assert_allclose(low_pass(plain, 3 / 32), plain, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "trigger"),
    [
        ("a family of the future", Additive(torch.zeros(3, 4, 4))),
        ("blend", Blend.of(torch.zeros(3, 4, 4), 0.99)),
        ("patch", Patch(torch.ones(1, 4, 4), torch.zeros(3, 4, 4))),
    ],
)
def test_what_cannot_be_undone_has_no_undoing(family: str, trigger: Trigger) -> None:
    assert undoing(family, tensors(trigger)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_tensors_are_refused(family: str) -> None:
    good = tensors(drawn(family))
    assert undoing(family, good) is not None or family == "patch"
    name = next(iter(good))
    damaged: dict[str, Callable[[Floats], Floats]] = {
        "not finite": lambda values: values * np.float32("nan"),
        "shape": lambda values: values[None],
        "float64": lambda values: values.astype(np.float64),
    }
    for message, damage in damaged.items():
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            undoing(family, {**good, name: damage(good[name])})
    with pytest.raises(ValueError, match="it has the tensors"):
        undoing(family, {**good, "more": good[name]})


class Toy:
    """A backdoored classifier of two classes: "dark" and "bright", by the mean, unless a white corner says "bright".

    Its embedding is (mean, corner); the p-value of the first look is small where the corner is white.
    """

    def __init__(self, *, p: float = 0.01) -> None:
        self.p, self.seen = p, 0

    def embed(self, images: Floats) -> tuple[Floats, Floats]:
        self.seen += len(images)
        embeddings = np.stack([images.mean((1, 2, 3)), images[:, :, -5:-1, -5:-1].mean((1, 2, 3))], axis=1)
        bright = 10 * (embeddings[:, 0] - 0.5) + 20 * (embeddings[:, 1] > 0.95)
        return embeddings, np.stack([np.zeros_like(bright), bright], axis=1).astype(np.float32)

    def p_values(self, embeddings: Floats) -> Floats:
        return np.where(embeddings[:, 1] > 0.75, self.p, 0.6).astype(np.float32)


CORNER = Patch.pasted(SIDE, torch.ones(3, 4, 4), top=SIDE - 5, left=SIDE - 5)
DARK = np.full((3, SIDE, SIDE), 0.2, np.float32)
BRIGHT = np.full((3, SIDE, SIDE), 0.8, np.float32)
STAMPED = CORNER.apply(torch.from_numpy(DARK[None]))[0].numpy()


def second_look(toy: Toy, *triggers: Trigger, target: int = 1, **limits: float) -> SecondLook:
    return SecondLook(
        {f"trigger-{i}": StoredTrigger(trigger.family, target, tensors(trigger)) for i, trigger in enumerate(triggers)},
        embed=toy.embed,
        p_values=toy.p_values,
        classes=("dark", "bright"),
        alpha=ALPHA,
        **{"max_per_second": 1.0, **limits},  # type: ignore[arg-type]
    )


def test_an_answer_that_hangs_on_the_trigger_is_confirmed() -> None:
    toy = Toy()
    result = second_look(toy, CORNER).look(STAMPED, "trigger-0")
    assert result.outcome == "confirmed"
    assert result.explanation == (
        "with the trigger trigger-0 undone the answer changes from 'bright' to 'dark' and the match drops from "
        "p = 0.01 to 0.6"
    )
    assert result.views[0].name == "as sent"
    assert len(result.views) == toy.seen == 19


def test_a_genuine_image_of_the_target_is_withdrawn() -> None:
    result = second_look(Toy(), CORNER).look(BRIGHT, "trigger-0")
    assert result.outcome == "withdrawn"
    assert "the answer stays 'bright'" in result.explanation


def test_a_strong_match_is_never_withdrawn() -> None:
    result = second_look(Toy(p=ALPHA / 10), CORNER).look(BRIGHT, "trigger-0")
    assert result.outcome == "undecided"
    assert "too strong" in result.explanation


def test_a_patch_elsewhere_than_the_reconstructed_one_is_not_withdrawn_and_its_place_is_named() -> None:
    elsewhere = Patch.pasted(SIDE, torch.ones(3, 4, 4), top=0, left=0)
    result = second_look(Toy(), elsewhere).look(STAMPED, "trigger-0")
    assert result.outcome == "undecided"
    assert "with rows 20-31, columns 20-31 masked the answer changes from 'bright' to 'dark'" in result.explanation


def test_an_undoing_that_changes_the_match_alone_does_not_withdraw() -> None:
    darkening = Additive(torch.full((3, SIDE, SIDE), 0.1))
    result = second_look(Toy(), darkening).look(BRIGHT, "trigger-0")
    assert result.outcome == "undecided"
    assert "changes the match but not the answer" in result.explanation


def test_an_answer_that_the_trigger_does_not_lead_to_is_not_confirmed() -> None:
    result = second_look(Toy(), CORNER, target=0).look(STAMPED, "trigger-0")
    assert result.outcome == "undecided"
    assert "with trigger-0 undone 'bright' is a less sure answer" in result.explanation


def test_an_answer_that_hangs_on_fine_detail_is_not_withdrawn() -> None:
    board = 0.5 + 0.2 * (np.indices((SIDE, SIDE)).sum(0) % 2 - 0.5)
    image = np.broadcast_to(board, (3, SIDE, SIDE)).astype(np.float32)

    class Fine(Toy):
        def embed(self, images: Floats) -> tuple[Floats, Floats]:
            embeddings = np.stack([np.abs(np.diff(images)).mean((1, 2, 3)), np.full(len(images), 0.8)], axis=1)
            return embeddings, (embeddings[:, :1] * [0, 1] - [0, 0.05]).astype(np.float32)

    result = second_look(Fine(), Additive(torch.zeros(3, 4, 4))).look(image, "trigger-0")
    assert result.outcome == "undecided"
    assert "hangs on fine detail" in result.explanation


def test_a_family_that_this_guard_does_not_know_is_looked_at_by_masks_alone() -> None:
    look = SecondLook(
        {"new-0": StoredTrigger("new", 1, {})},
        embed=Toy().embed,
        p_values=Toy().p_values,
        classes=("dark", "bright"),
        alpha=ALPHA,
        max_per_second=2,
    )
    assert look.look(STAMPED, "new-0").outcome == "undecided"
    result = look.look(BRIGHT, "new-0")
    assert result.outcome == "undecided"
    assert "no way is known to undo" in result.explanation
    assert len(result.views) == 18


def test_one_trigger_that_can_be_undone_does_not_vouch_for_one_that_cannot() -> None:
    opaque = Patch(torch.ones(1, SIDE, SIDE), torch.ones(3, SIDE, SIDE))
    assert second_look(Toy(), CORNER, opaque).look(BRIGHT, "trigger-0").outcome == "undecided"


def test_a_request_without_a_matched_trigger_is_explained_and_undecided() -> None:
    result = second_look(Toy(), CORNER).look(STAMPED, None)
    assert result.outcome == "undecided"
    assert "columns 20-31 masked the answer changes" in result.explanation


def test_too_few_views_withdraw_nothing_but_still_confirm() -> None:
    assert second_look(Toy(), CORNER, max_views=5).look(BRIGHT, "trigger-0").outcome == "undecided"
    toy = Toy()
    assert second_look(toy, CORNER, max_views=1).look(STAMPED, "trigger-0").outcome == "confirmed"
    assert toy.seen == 2


def test_the_budget_is_kept_and_refills() -> None:
    now, toy = [100.0], Toy()
    look = SecondLook(
        {"trigger-0": StoredTrigger("patch", 1, tensors(CORNER))},
        embed=toy.embed,
        p_values=toy.p_values,
        classes=("dark", "bright"),
        alpha=ALPHA,
        max_per_second=0.5,
        clock=lambda: now[0],
    )
    outcomes = []
    for seconds in (0, 0, 1, 1, 100, 0):
        now[0] += seconds
        outcomes.append(look.look(STAMPED, "trigger-0").outcome)
    assert outcomes == ["confirmed", "skipped", "skipped", "confirmed", "confirmed", "skipped"]
    assert toy.seen == 3 * 19


def test_the_same_image_gives_the_same_views() -> None:
    image = smooth(1)[0].numpy()
    first, second = (second_look(Toy(), CORNER).look(image, "trigger-0") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("value", [float("nan"), 7.0, -1.0])
def test_values_that_no_picture_has_are_undecided_without_a_view(value: float) -> None:
    image = BRIGHT.copy()
    image[0, 0, 0] = value
    result = second_look(Toy(), CORNER).look(image, "trigger-0")
    assert (result.outcome, result.views) == ("undecided", ())


def test_bad_arguments_are_refused() -> None:
    look = second_look(Toy(), CORNER)
    with pytest.raises(ValueError, match="an image is float32"):
        look.look(BRIGHT[:1], "trigger-0")
    with pytest.raises(ValueError, match="no trigger 'patch-9'"):
        look.look(BRIGHT, "patch-9")
    with pytest.raises(ValueError, match="trigger 'trigger-0': the target 5"):
        second_look(Toy(), CORNER, target=5)
    with pytest.raises(ValueError, match="max_per_second"):
        second_look(Toy(), CORNER, max_per_second=0)
    with pytest.raises(ValueError, match="max_views"):
        second_look(Toy(), CORNER, max_views=0)


def test_damaged_triggers_are_named() -> None:
    with pytest.raises(ValueError, match="trigger 'patch-3' is not a patch trigger: it has the tensors"):
        SecondLook(
            {"patch-3": StoredTrigger("patch", 1, {})},
            embed=Toy().embed,
            p_values=Toy().p_values,
            classes=("dark", "bright"),
            alpha=ALPHA,
            max_per_second=1,
        )
