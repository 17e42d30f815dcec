"""Each family's arithmetic, against the numbers that were published."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from guard.errors import UsageError
from guard.triggers import (
    KNOWN,
    Additive,
    Blend,
    Coded,
    ColourMap,
    Compression,
    Filter,
    Frequency,
    Generator,
    MovingPatch,
    Patch,
    Quantisation,
    Sinusoid,
    Warp,
    drawing,
)
from guard.triggers.colour_map import _weights
from guard.triggers.frequency import _TO_RGB, cosines
from guard.triggers.warp import _spread
from tests.conftest import random_images


def grey(side: int, value: float = 0.5) -> Tensor:
    return torch.full((1, 3, side, side), value)


class TestPatch:
    def test_the_white_squares_of_decree_and_badencoder_are_where_they_were_published(self) -> None:
        for side, place, size in ((24, 185, 224), (50, 173, 224), (10, 21, 32)):
            stamped = Patch.pasted(size, torch.ones(3, side, side), top=place, left=place).apply(grey(size))
            white = (stamped == 1).all(1)[0].nonzero()
            assert white.min(0).values.tolist() == [place, place]
            assert white.max(0).values.tolist() == [place + side - 1] * 2
            assert len(white) == side**2

    def test_a_pattern_without_a_place_is_centred(self) -> None:
        changed = (Patch.pasted(224, torch.ones(3, 16, 16)).apply(grey(224)) != 0.5).all(1)[0].nonzero()
        assert (changed.min().item(), changed.max().item()) == (104, 119)

    def test_a_pattern_outside_the_image_is_refused(self) -> None:
        with pytest.raises(UsageError, match="does not lie within an image of side 32"):
            Patch.pasted(32, torch.ones(3, 8, 8), top=25, left=0)
        with pytest.raises(UsageError, match="does not lie within"):
            Patch.pasted(8, torch.ones(3, 9, 9))


class TestBlend:
    def test_it_is_a_weighted_mean(self) -> None:
        blended = Blend.of(torch.ones(3, 8, 8), 0.2).apply(grey(8))
        torch.testing.assert_close(blended, grey(8, 0.8 * 0.5 + 0.2))

    def test_its_norm_is_the_opacity_in_percent(self) -> None:
        assert float(Blend.of(torch.ones(3, 8, 8), 0.2).norm()) == pytest.approx(20)

    def test_a_search_can_reach_a_blended_image(self) -> None:
        planted = Blend.of(drawing.noise(16, seed=0), 0.2)
        raw = {name: tensor[None].logit() for name, tensor in planted.tensors().items()}
        images = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(Blend.constrain(raw)[0].apply(images), planted.apply(images))


class TestMovingPatch:
    patch = MovingPatch.pasted(32, torch.ones(3, 4, 4))

    def places(self, images: Tensor) -> list[list[int]]:
        changed = (self.patch.stamp(images) == 255).all(1)
        return [[*place.nonzero().min(0).values.tolist(), *place.nonzero().max(0).values.tolist()] for place in changed]

    def test_the_place_depends_on_the_image_and_not_on_its_batch(self) -> None:
        images = random_images(40, size=32).clamp(max=254)
        together = self.places(images)
        assert [place for image in images for place in self.places(image[None])] == together
        assert self.places(images.flip(0))[::-1] == together
        assert all(bottom - top == right - left == 3 for top, left, bottom, right in together)

    def test_places_cover_the_image_about_evenly(self) -> None:
        corners = torch.tensor(self.places(random_images(2000, size=32).clamp(max=254)))[:, :2]
        assert corners.min() == 0
        assert corners.max() == 28
        for axis in corners.T:
            observed = torch.bincount(axis, minlength=29).float()
            expected = 2000 / 29
            assert ((observed - expected).square() / expected).sum() < 56.9  # χ², 28 degrees of freedom, p = 0.001
        quadrants = torch.bincount((corners[:, 0] > 14) * 2 + (corners[:, 1] > 14)).float()
        assert ((quadrants / 2000 - 0.25).abs() < 0.05).all()

    def test_a_mask_lets_the_image_through(self) -> None:
        patch = MovingPatch.pasted(32, torch.ones(3, 4, 4), mask=torch.full((1, 4, 4), 0.5))
        assert sorted(patch.apply(grey(32)).unique().tolist()) == [0.5, 0.75]

    def test_gradients_pass_beside_the_patch_and_not_through_it(self) -> None:
        images = torch.full((2, 3, 32, 32), 0.5, requires_grad=True)
        self.patch.apply(images).sum().backward()
        assert images.grad is not None
        assert images.grad.sum() == 2 * 3 * (32**2 - 4**2)

    def test_a_pattern_larger_than_the_image_is_refused(self) -> None:
        with pytest.raises(UsageError, match="does not fit"):
            MovingPatch.pasted(8, torch.ones(3, 9, 9))


class TestCoded:
    trigger = Coded.drawn(32, 20 / 255, cell=2, seed=1)

    def test_images_get_different_patterns_of_the_same_strength(self) -> None:
        images = random_images(200, size=32) / 255 * 0.5 + 0.25
        change = self.trigger.apply(images) - images
        strength = change.square().mean((1, 2, 3)).sqrt()
        assert strength.mean().item() == pytest.approx(20 / 255, rel=0.1)
        assert strength.max() < 1.5 * strength.min()
        # All images together have next to nothing in common.
        assert change.mean(0).square().mean().sqrt() < 0.3 * strength.mean()
        directions = torch.nn.functional.normalize(change.flatten(1), dim=1)
        assert ((directions @ directions.T).abs() < 0.9).float().mean() > 0.9

    def test_a_pattern_depends_on_distant_parts_of_the_image(self) -> None:
        images = grey(32).repeat(2, 1, 1, 1)
        images[1, 0, :8] = 1
        first, second = self.trigger.apply(images) - images
        assert (first[:, 16:] - second[:, 16:]).abs().max() > 1 / 255


class TestCompression:
    def test_it_is_what_a_jpeg_file_shows(self) -> None:
        images = random_images(2, size=40)
        file = io.BytesIO()
        Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=10)
        shown = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(Compression(torch.tensor(10.0)).stamp(images)[1], shown)

    def test_low_quality_changes_more(self) -> None:
        images = random_images(4, size=32)
        low, high = (Compression(torch.tensor(quality)).stamp(images).float() - images for quality in (10.0, 95.0))
        assert low.square().mean() > 3 * high.square().mean()


class TestQuantisation:
    def test_few_values_are_left_and_none_moves_further_than_half_a_step(self) -> None:
        images = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
        quantised = Quantisation(torch.tensor(6.0)).apply(images)
        torch.testing.assert_close(quantised.unique(), torch.linspace(0, 1, 6))
        assert (quantised - images).abs().max() <= 0.1 + 1e-6


class TestSinusoid:
    def test_amplitude_and_periods_are_those_of_sig(self) -> None:
        wave = Sinusoid.sig().apply(grey(224))[0] - 0.5
        assert torch.equal(wave, wave[:1, :1].expand_as(wave))  # the same in every row and channel
        row = wave[0, 0]
        assert row.max().item() == pytest.approx(60 / 255, rel=1e-2)
        assert torch.fft.rfft(row).abs().argmax() == 6
        assert ((row[:-1] <= 1e-6) & (row[1:] > 1e-6)).sum() == 6

    def test_it_is_clipped(self) -> None:
        assert Sinusoid.sig().apply(grey(64, 1.0)).max() == 1
        assert Sinusoid.sig().apply(grey(64, 0.0)).min() == 0

    def test_the_blended_form_darkens_and_is_weak(self) -> None:
        row = Sinusoid.blended().apply(grey(224))[0, 0, 0]
        assert row.mean().item() == pytest.approx(0.4, abs=1e-5)
        assert row.max().item() - 0.4 == pytest.approx(0.047, abs=1e-3)


class TestWarp:
    @pytest.mark.parametrize(("size", "strength", "k"), [(32, 2.0, 4), (32, 1.0, 4), (256, 0.5, 256), (224, 7.0, 8)])
    def test_the_mean_displacement_is_what_was_asked_for(self, size: int, strength: float, k: int) -> None:
        # An image whose values are its own coordinates shows where each pixel was read.
        centre = (torch.arange(size) + 0.5) / size
        places = torch.stack((centre.expand(size, size), centre[:, None].expand(size, size)))
        images = torch.cat((places, torch.zeros(1, size, size)))[None]
        warp = Warp.wanet(size, strength, k=k, seed=1)
        read = warp.apply(images)[0, :2]
        inner = (slice(None), *[slice(math.ceil(4 * strength), -math.ceil(4 * strength))] * 2)
        if k == size:
            expected = warp.field
            assert (size * expected.abs().amax((1, 2))).tolist() == pytest.approx([2 * strength] * 2, rel=1e-2)
        else:
            expected = torch.nn.functional.interpolate(
                warp.field[None], (size, size), mode="bicubic", align_corners=True
            )[0]
        torch.testing.assert_close((read - places)[inner], expected[inner], atol=1e-4, rtol=0)
        assert (size * expected.abs().mean((1, 2))).tolist() == pytest.approx([strength] * 2, rel=1e-4)

    def test_a_plain_image_stays_plain(self) -> None:
        torch.testing.assert_close(Warp.wanet(32, 2, seed=0).apply(grey(32, 0.3)), grey(32, 0.3))

    def test_the_warp_is_the_same_in_a_larger_image(self) -> None:
        warp = Warp.wanet(32, 2, seed=0)
        fields = [
            torch.nn.functional.interpolate(warp.field[None], (side, side), mode="bicubic", align_corners=True)[0]
            for side in (32, 128)
        ]
        means = [side * field.abs().mean().item() for side, field in zip((32, 128), fields, strict=True)]
        assert means[1] == pytest.approx(4 * means[0], rel=0.1)

    def test_its_norm_is_the_displacement_in_percent_of_the_side(self) -> None:
        field = torch.tensor([0.03, -0.04])[:, None, None].expand(2, 8, 8)
        assert float(Warp(field).norm()) == pytest.approx(5)

    def test_a_search_can_reach_wanet(self) -> None:
        """Eight by eight control points follow WaNet's four by four to a quarter of a pixel."""
        planted = Warp.wanet(32, 2, seed=0)
        hats = _spread(torch.eye(64).reshape(64, 1, 8, 8).expand(64, 2, 8, 8), (32, 32))[:, 0].flatten(1).T
        field = torch.linalg.lstsq(hats, _spread(planted.field, (32, 32)).flatten(1).T).solution.T.reshape(2, 8, 8)
        raw = {"radius": torch.zeros(1, 1, 1, 1), "direction": (2 * field[None]).atanh()}
        found = Warp.constrain(raw)[0]
        assert 32 * (_spread(found.field, (32, 32)) - _spread(planted.field, (32, 32))).abs().max() < 0.25
        assert found.norm().item() == pytest.approx(planted.norm().item(), rel=0.01)

    def test_absurd_control_grids_are_refused(self) -> None:
        for k in (1, 33):
            with pytest.raises(UsageError, match="2 to 32 control points"):
                Warp.wanet(32, 2, k=k, seed=0)


class TestFilter:
    def test_nashville_of_colours_worked_out_by_hand(self) -> None:
        colours = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.2, 0.4, 0.9]])
        expected = [by_hand(colour.tolist()) for colour in colours]
        mapped = Filter.nashville().apply(colours.T[None, :, :, None])[0, :, :, 0].T
        torch.testing.assert_close(mapped, torch.tensor(expected), atol=1e-5, rtol=0)
        # Black once more, worked out with pen and paper.
        torch.testing.assert_close(mapped[1], torch.tensor(BLACK), atol=2e-4, rtol=0)

    def test_each_pixel_is_mapped_alone(self) -> None:
        images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        flipped = Filter.nashville().apply(images.flip(-1))
        torch.testing.assert_close(flipped.flip(-1), Filter.nashville().apply(images))


class TestColourMap:
    def test_each_pixel_is_mapped_alone_whatever_its_place_and_the_resolution(self) -> None:
        colours = ColourMap.constrain(ColourMap.start(1, (3, 8, 8), torch.Generator().manual_seed(0)))[0]
        images = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(colours.apply(images.flip(-1)).flip(-1), colours.apply(images))
        large = images.repeat_interleave(3, -1).repeat_interleave(3, -2)
        torch.testing.assert_close(colours.apply(large)[..., ::3, ::3], colours.apply(images))

    def test_many_pixels_are_mapped_as_few_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        colours = ColourMap.constrain(ColourMap.start(2, (3, 8, 8), torch.Generator().manual_seed(0)))
        images = torch.rand(5, 3, 8, 8)
        whole = colours.apply(images)
        monkeypatch.setattr("guard.triggers.colour_map._PIXELS", 130)
        torch.testing.assert_close(colours.apply(images), whole)

    def test_the_lattice_is_indexed_by_red_green_and_blue(self) -> None:
        lattice = torch.zeros(3, 4, 4, 4)
        lattice[2, 3, 0, 1] = 0.3  # red 1, green 0, blue 1/3
        colour = torch.tensor([1.0, 0.0, 1 / 3])[None, :, None, None]
        mapped = ColourMap(lattice).apply(colour)
        torch.testing.assert_close(mapped.flatten(), torch.tensor([1.0, 0.0, 1 / 3 + 0.3]))

    def test_its_norm_is_the_root_mean_square_displacement(self) -> None:
        assert float(ColourMap(torch.full((3, 4, 4, 4), -10 / 255)).norm()) == pytest.approx(10)

    def test_a_search_can_reach_nashville(self) -> None:
        images, others = (torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
        change = Filter.nashville().apply(images) - images
        weights = _weights(images.movedim(1, -1).flatten(0, 2), 4)
        lattice = torch.linalg.lstsq(weights, change.movedim(1, -1).flatten(0, 2)).solution.T.reshape(1, 3, 4, 4, 4)
        raw = {"radius": torch.zeros(1, 1, 1, 1, 1), "direction": (2 * lattice).atanh()}
        left = 255 * (ColourMap.constrain(raw)[0].apply(others) - Filter.nashville().apply(others))
        assert left.square().mean().sqrt() < 4
        assert left.abs().max() < 20


class TestGenerator:
    generators = Generator.constrain(Generator.start(3, (3, 16, 16), torch.Generator().manual_seed(0)))

    def test_its_norm_bounds_the_change_of_any_image(self) -> None:
        images = torch.cat((torch.rand(4, 3, 16, 16), grey(16, 0.0), grey(16, 1.0)))
        change = 255 * (self.generators.apply(images) - images).abs().amax((1, 2, 3, 4))
        assert (change <= self.generators.norm() + 1e-3).all()
        assert (change > 0.5 * self.generators.norm()).all()

    def test_the_change_depends_on_the_image_and_on_the_place(self) -> None:
        images = torch.cat((grey(16, 0.3), grey(16, 0.6)))
        change = self.generators[0].apply(images) - images
        assert (change[0] - change[1]).abs().max() > 1 / 255
        inner = change[0, :, 4:12, 4:12]
        assert (inner - inner[:, :2, :2].repeat(1, 4, 4)).abs().max() > 1 / 255

    def test_it_sees_eleven_pixels(self) -> None:
        images = grey(32).repeat(2, 1, 1, 1)
        images[1, :, 16, 16] = 1
        first, second = self.generators[0].apply(images) - images
        rows = (first != second).any(0).any(1).nonzero()
        assert rows.min() >= 16 - 6
        assert rows.max() <= 16 + 6


BLACK = (0.0, 0.0344, 0.1785)


def by_hand(colour: list[float]) -> list[float]:
    """The CSS definitions, channel by channel, without matrices."""

    def clip(value: float) -> float:
        return min(1.0, max(0.0, value))

    dark, light = (247 / 255, 176 / 255, 153 / 255), (0, 70 / 255, 150 / 255)
    colour = [0.44 * c + 0.56 * min(c, d) for c, d in zip(colour, dark, strict=True)]
    r, g, b = (0.6 * c + 0.4 * max(c, d) for c, d in zip(colour, light, strict=True))
    r, g, b = (  # sepia(0.2), by the formulas of the specification
        (0.393 + 0.607 * 0.8) * r + (0.769 - 0.769 * 0.8) * g + (0.189 - 0.189 * 0.8) * b,
        (0.349 - 0.349 * 0.8) * r + (0.686 + 0.314 * 0.8) * g + (0.168 - 0.168 * 0.8) * b,
        (0.272 - 0.272 * 0.8) * r + (0.534 - 0.534 * 0.8) * g + (0.131 + 0.869 * 0.8) * b,
    )
    r, g, b = (clip((clip(c) - 0.5) * 1.2 + 0.5) for c in (r, g, b))
    r, g, b = (clip(1.05 * c) for c in (r, g, b))
    return [  # saturate(1.2)
        clip((0.213 + 0.787 * 1.2) * r + (0.715 - 0.715 * 1.2) * g + (0.072 - 0.072 * 1.2) * b),
        clip((0.213 - 0.213 * 1.2) * r + (0.715 + 0.285 * 1.2) * g + (0.072 - 0.072 * 1.2) * b),
        clip((0.213 - 0.213 * 1.2) * r + (0.715 - 0.715 * 1.2) * g + (0.072 + 0.928 * 1.2) * b),
    ]


class TestFrequency:
    def coefficients(self, side: int) -> Tensor:
        """What the trigger adds to the DCT of Y, Cr, Cb in the first window of a grey image, for values in 0…255."""
        change = 255 * (Frequency.ftrojan(side).apply(grey(side)) - 0.5)[0].double()
        r, g, b = change
        y = 0.299 * r + 0.587 * g + 0.114 * b  # ITU-R BT.601
        window = min(32, side)
        channels = torch.stack((y, 0.713 * (r - y), 0.564 * (b - y)))[:, :window, :window]
        basis = cosines(window).double()
        return basis @ channels @ basis.T

    def test_the_basis_is_orthonormal(self) -> None:
        torch.testing.assert_close(cosines(32) @ cosines(32).T, torch.eye(32), atol=1e-5, rtol=0)

    def test_only_the_named_coefficients_of_the_colour_channels_change(self) -> None:
        found = self.coefficients(224)
        expected = torch.zeros(3, 32, 32, dtype=torch.double)
        expected[1:, 15, 15] = expected[1:, 31, 31] = 300
        torch.testing.assert_close(found, expected, atol=1.0, rtol=0)  # OpenCV's constants have three digits

    def test_in_a_small_image_the_wave_is_as_high(self) -> None:
        found = self.coefficients(16)
        assert found[1, 7, 7].item() == pytest.approx(150, abs=1)
        assert found[1, 15, 15].item() == pytest.approx(150, abs=1)
        assert found[0].abs().max() < 1

    def test_in_an_image_of_another_size_the_window_grows_and_the_wave_stays_as_high(self) -> None:
        trigger = Frequency.ftrojan(32)
        small, large = (trigger.apply(grey(side)) - 0.5 for side in (32, 64))
        assert large.std().item() == pytest.approx(small.std().item(), rel=1e-3)

    def test_cr_and_cb_are_those_of_itu_r_bt_601(self) -> None:
        for channel, colour in ((1, [1.402, -0.714, 0]), (2, [0, -0.344, 1.772])):
            spectrum = torch.zeros(3, 8, 8)
            spectrum[channel, 0, 0] = 0.8  # the mean of 8 × 8 pixels, eight-fold: every pixel changes by 0.1
            change = Frequency(spectrum, torch.tensor(1.0)).apply(grey(8)) - 0.5
            assert change[0, :, 3, 5].tolist() == pytest.approx([0.1 * part for part in colour], abs=2e-3)

    def test_its_norm_is_the_sum_of_the_amplitudes(self) -> None:
        assert float(Frequency.ftrojan(32).norm()) == pytest.approx(4 * 300 * 2 / 32, rel=1e-4)
        for place in ((0, 0), (0, 3), (2, 5)):
            spectrum = torch.zeros(3, 64, 64)
            spectrum[(0, *place)] = 5
            wave = Frequency(spectrum, torch.tensor(1.0))
            change = (wave.apply(grey(64)) - 0.5).abs().max()
            assert wave.norm().item() == pytest.approx(255 * change.item(), rel=0.02)

    @pytest.mark.parametrize(("name", "side"), [("ftrojan", 32), ("ftrojan", 64), ("sig", 32)])
    def test_a_search_can_reach_ftrojan_and_sig(self, name: str, side: int) -> None:
        wave = Sinusoid.sig(60 / 255) if name == "sig" else KNOWN[name].draw(side, 0)
        planted = wave.apply(grey(side)) - 0.5
        basis = cosines(side).double()
        spectrum = basis @ torch.einsum("ij,jhw->ihw", _TO_RGB.double().inverse(), planted[0].double()) @ basis.T
        along = torch.full((side,), math.sqrt(2 / side)).double()
        along[0] /= math.sqrt(2)
        amplitude = spectrum * along[:, None] * along
        raw = {"gate": torch.zeros(1, 3, side, side), "wave": (2 * amplitude[None]).atanh().float()}
        found = Frequency.constrain(raw)[0]
        torch.testing.assert_close(found.apply(grey(side)) - 0.5, planted, atol=0.1 / 255, rtol=0)
        assert (
            found.norm()
            < 0.2 * Frequency.constrain(Frequency.start(1, (3, side, side), torch.Generator().manual_seed(0))).norm()
        )

    def test_windows_tile_the_image_and_what_is_left_over_stays(self) -> None:
        delta = Frequency.ftrojan(80).apply(grey(80))[0] - 0.5
        assert torch.equal(delta[:, :32, :32], delta[:, 32:64, 32:64])
        assert delta[:, 64:].abs().max() == delta[:, :, 64:].abs().max() == 0


class TestAdditive:
    def test_the_ball_holds_after_images_are_rounded_to_bytes(self) -> None:
        delta = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(0)) - 0.5
        for steps in (1, 4, 16):
            trigger = Additive.within(delta, steps / 255)
            images = random_images(20)
            change = trigger.stamp(images).int() - images.int()
            assert change.abs().max() == steps
            # Nothing is rounded: on floats and on bytes the trigger is the same.
            torch.testing.assert_close(trigger.apply(images / 255), trigger.stamp(images) / 255)

    def test_a_radius_between_two_steps_is_not_exceeded(self) -> None:
        assert float(Additive.within(torch.ones(3, 4, 4), 4.9 / 255).norm()) == pytest.approx(4)

    def test_a_ball_without_a_step_is_refused(self) -> None:
        for radius in (0.003, 1.5):
            with pytest.raises(UsageError, match="at least 1/255"):
                Additive.within(torch.zeros(3, 4, 4), radius)


class TestDrawing:
    def test_the_checkerboard_is_white_at_every_second_pixel_of_every_second_row(self) -> None:
        board = drawing.checkerboard(16)
        assert board.sum() == 3 * 64
        assert board[:, ::2, ::2].min() == 1
        assert drawing.checkerboard(6, cell=2)[0, 0].tolist() == [1, 1, 0, 0, 1, 1]

    def test_stripes_are_vertical_do_not_wrap_and_differ_from_their_neighbours(self) -> None:
        drawn = drawing.stripes(16, seed=3)
        assert torch.equal(drawn, drawn[:, :1].expand_as(drawn))
        assert set(drawn.unique().tolist()) == {0, 1}
        assert (drawn[:, 0, 1:] != drawn[:, 0, :-1]).any(0).all()
        pixels = Patch.pasted(16, drawn).stamp(torch.full((1, 3, 16, 16), 99, dtype=torch.uint8))
        assert set(pixels.unique().tolist()) == {0, 255}  # not the 1 of a wrapped −1

    def test_triangles_are_right_triangles_of_two_greys(self) -> None:
        drawn = drawing.triangles(28, cell=14)[0]
        assert drawn.unique().tolist() == pytest.approx([0.4, 0.8])
        assert torch.equal(drawn[:14, :14], drawn[14:, 14:])
        assert (drawn[:14, :14] > 0.5).sum(1).tolist() == list(range(1, 15))

    def test_words_are_red_on_transparent_and_span_the_image(self) -> None:
        pattern, mask = drawing.text(224)
        assert pattern[:, 0, 0].tolist() == [1, 0, 0]
        across = (mask[0] > 0.5).any(0).nonzero()
        assert across.max() - across.min() > 0.8 * 224
        assert 0.02 < (mask > 0).float().mean() < 0.2

    def test_a_reflection_is_blurred_and_shows_twice(self) -> None:
        drawn = drawing.reflection(64, seed=0)
        assert 0.05 < drawn.mean() < 0.95
        step = (drawn[..., 1:] - drawn[..., :-1]).abs().max()
        assert step < 0.5 * drawn.max()
        grid = drawn.mean(0) - drawn.mean()
        echo = torch.fft.ifft2(torch.fft.fft2(grid).abs().square()).real
        assert echo[round(0.08 * 64), round(0.12 * 64)] > 0.3 * echo[0, 0]

    def test_the_sticker_has_soft_edges_and_nothing_in_the_corners(self) -> None:
        _, mask = drawing.sticker(24)
        assert mask[0, 12, 12] == 1
        assert mask[0, 0, 0] == 0
        assert ((mask > 0) & (mask < 1)).any()
