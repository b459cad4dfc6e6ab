"""Windows that were painted small, painted again in tiles: `imaging.enlarge` and `SamplingOptions.refine`."""

import dataclasses
import itertools

import numpy as np
import pytest

from moebius_jax import MoebiusInpaintPipeline, UserError
from moebius_jax.imaging.crop import cut
from moebius_jax.imaging.enlarge import Enlargement, Tile, sides, starts
from moebius_jax.imaging.regions import plan_windows
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions

S = 32
TWICE = {"num_inference_steps": 2, "refine": 0.5, "output_type": "np", "mask_blur": 0}


def test_sizes_grow_by_two_or_less_to_the_windows_own():
    assert sides(128, 128) == sides(64, 128) == sides(159, 128) == []
    assert sides(160, 128) == [160]
    assert sides(256, 128) == [256]
    assert sides(512, 128) == [256, 512]
    grown = [128, *sides(700, 128)]
    assert grown[-1] == 700
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(grown))


@pytest.mark.parametrize("side", [32, 33, 40, 64, 100, 224])
def test_tiles_reach_from_end_to_end_and_overlap_by_a_quarter(side):
    found = starts(side, S)
    assert (found[0], found[-1]) == (0, side - S)
    assert all(0 < b - a <= 0.75 * S + 1 for a, b in itertools.pairwise(found))


@pytest.fixture
def scene():
    """A picture, a hole across most of it, and the window around the hole as a model would see it."""
    y, x = np.mgrid[:90, :120]
    rgb = np.stack([2 * x, 2 * y, 255 - x - y], -1).astype(np.uint8)
    hole = np.zeros((90, 120), bool)
    hole[20:75, 15:100] = True
    hole[40:50, 50:60] = False
    (window,) = plan_windows(hole, S)
    image, square = cut(rgb, hole, window, S)
    return rgb, hole, window, Tile(number=0, top=0, left=0, image=image, hole=square)


def enlarged(scene, model):
    """The window at its full size, and every tile on the way there."""
    rgb, _, window, first = scene
    enlargement = Enlargement(rgb, window, first, model(first, S))
    seen = []
    while tiles := enlargement.tiles():
        seen.append(tiles)
        side = max(max(tile.top, tile.left) for tile in tiles) + S
        done = [enlargement.put(tile, model(tile, side)) for tile in reversed(tiles)]
        assert done == [False] * (len(tiles) - 1) + [True]
    return enlargement.painted, seen


def whole(scene, side=None):
    """The window of the picture itself."""
    rgb, hole, window, _ = scene
    return cut(rgb, hole, window, side or window.side)


def test_a_model_that_knows_the_picture_restores_it(scene):
    def model(tile, side):
        return whole(scene, side)[0][tile.top : tile.top + S, tile.left : tile.left + S]

    painted, seen = enlarged(scene, model)
    assert painted.shape == (scene[2].side, scene[2].side, 3)
    np.testing.assert_array_equal(painted, whole(scene)[0])
    numbers = [tile.number for tiles in seen for tile in tiles]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(seen) == len(sides(scene[2].side, S)) > 1


def test_tiles_hold_what_is_known_and_what_was_painted(scene):
    """Around the hole the picture itself; inside it the size before, enlarged."""

    def model(tile, _side):
        return np.where(tile.hole[..., None], 100, tile.image).astype(np.uint8)

    _, seen = enlarged(scene, model)
    for tiles in seen:
        side = max(max(tile.top, tile.left) for tile in tiles) + S
        picture, hole = whole(scene, side)
        inside = np.zeros((side, side), bool)
        for tile in tiles:
            here = slice(tile.top, tile.top + S), slice(tile.left, tile.left + S)
            inside[here] = True
            np.testing.assert_array_equal(tile.hole, hole[here])
            np.testing.assert_array_equal(tile.image[~tile.hole], picture[here][~tile.hole])
        assert inside[hole].all(), "a part of the hole is in no tile"
        middle = seen[0][len(seen[0]) // 2]
        assert abs(int(np.median(middle.image[middle.hole])) - 100) <= 2


def test_colours_do_not_drift(scene):
    """A model that is 20 levels too bright, everywhere and at every size."""

    def model(tile, side):
        picture = whole(scene, side)[0][tile.top : tile.top + S, tile.left : tile.left + S]
        return np.minimum(picture.astype(int) // 2 + 64 + 20, 255).astype(np.uint8)

    def true(tile, side):
        return model(tile, side) - 20

    brighter, usual = enlarged(scene, model)[0].astype(int), enlarged(scene, true)[0].astype(int)
    assert np.abs(brighter - usual).max() <= 2


def test_windows_of_another_region_are_left_alone():
    """A tile in which only another window's hole lies is not painted."""
    rgb = np.zeros((64, 256, 3), np.uint8)
    hole = np.zeros((64, 256), bool)
    hole[4:60, 4:40] = hole[4:60, 200:250] = True
    first, second = plan_windows(hole, S)
    wide = dataclasses.replace(first, top=0, left=0, side=256)
    image, square = cut(rgb, hole, wide, S)
    enlargement = Enlargement(rgb, wide, Tile(number=0, top=0, left=0, image=image, hole=square), image)
    assert second.regions != first.regions
    while tiles := enlargement.tiles():
        assert max(tile.left for tile in tiles) < enlargement.painted.shape[0] / 2
        for tile in tiles:
            enlargement.put(tile, tile.image)


class TestPipeline:
    @pytest.fixture
    def large(self):
        rng = np.random.default_rng(3)
        rgb = rng.integers(0, 256, (150, 170, 3), np.uint8)
        mask = np.zeros((150, 170), np.uint8)
        mask[20:120, 30:140] = 255
        rgb[mask > 0] = 255
        return rgb, mask

    def watched(self, monkeypatch):
        """The strengths, holes and draws of every batch from now on."""
        seen, call = [], Sampler.__call__

        def watch(sampler, images, holes, seeds, options, *rest):
            seen.append((options, holes, seeds, images))
            return call(sampler, images, holes, seeds, options, *rest)

        monkeypatch.setattr(Sampler, "__call__", watch)
        return seen

    @pytest.mark.slow
    def test_large_holes_are_painted_again(self, tiny_pipeline, large, monkeypatch):
        rgb, mask = large
        (once,) = tiny_pipeline(rgb, mask, **TWICE | {"refine": 0}).images
        seen = self.watched(monkeypatch)
        (out,) = tiny_pipeline(rgb, mask, batch_size=4, **TWICE).images
        assert out.shape == rgb.shape
        np.testing.assert_array_equal(out[mask == 0], rgb[mask == 0])
        assert (out[mask > 0] != once[mask > 0]).mean() > 0.5
        assert [options.strength for options, *_ in seen] == [0.99] + [0.5] * (len(seen) - 1)
        assert {options.num_inference_steps for options, *_ in seen} == {2}
        draws = {tuple(row) for _, _, seeds, _ in seen for row in seeds}
        assert len(draws) > len(seen), "squares share their draws"
        for _, holes, _, images in seen[1:]:
            assert not (images == 255)[holes].all(-1).any(), "a tile shows what was to go"

    @pytest.mark.slow
    def test_an_item_of_a_batch_is_the_item_alone_and_in_its_place(self, tiny_pipeline, large):
        rgb, mask = large
        small = np.zeros_like(mask)
        small[40:60, 50:70] = 255
        images, masks = [rgb, 255 - rgb, rgb, rgb[::-1]], [small, mask, small, mask]
        together = tiny_pipeline(images, masks, seed=5, batch_size=2, **TWICE).images
        for i, (image, hole) in enumerate(zip(images, masks, strict=True)):
            (alone,) = tiny_pipeline(image, hole, seed=5, image_indices=[i], batch_size=2, **TWICE).images
            np.testing.assert_array_equal(together[i], alone)

    def test_small_holes_and_the_releases_way_are_not(self, tiny_pipeline, large, monkeypatch):
        rgb, mask = large
        seen = self.watched(monkeypatch)
        for part in ((rgb[:70, :70], mask[:70, :70]), (rgb, mask, "release")):
            mode = {"mode": part[2]} if len(part) > 2 else {}
            (out,) = tiny_pipeline(*part[:2], **TWICE, **mode).images
            (usual,) = tiny_pipeline(*part[:2], **TWICE | {"refine": 0}, **mode).images
            np.testing.assert_array_equal(out, usual)
        assert [options.strength for options, *_ in seen] == [0.99] * 4


class TestOptions:
    @pytest.mark.parametrize(
        ("steps", "strength", "refine", "expected"),
        [
            (20, 0.99, 0.5, (20, 0.5)),
            (1, 1.0, 0.5, (2, 0.5)),
            (1, 1.0, 0.3, (4, 0.3)),
            (20, 0.2, 0.5, (20, 0.2)),
        ],
    )
    def test_what_tiles_are_painted_with(self, steps, strength, refine, expected):
        options = SamplingOptions(
            num_inference_steps=steps, strength=strength, refine=refine, guidance_scale=3
        )
        again = options.refining
        assert (again.num_inference_steps, again.strength) == expected
        assert again.changed(num_inference_steps=steps, strength=strength, refine=refine) == options

    @pytest.mark.parametrize(
        ("refine", "message"),
        [
            (1.0, "refine is 1.0; expected less than 1"),
            (-0.5, "refine is -0.5; expected 0 or more"),
            (float("nan"), "refine is nan; expected a finite number"),
            (1e-4, r"strength 0.0001 of 1000 steps leaves none"),
        ],
    )
    def test_out_of_range(self, refine, message):
        with pytest.raises(UserError, match=message):
            SamplingOptions(refine=refine)

    def test_it_is_a_default_of_tinys_alone(self):
        assert MoebiusInpaintPipeline.from_pretrained("tiny").defaults.refine == 0.5
        assert SamplingOptions().refine == 0
