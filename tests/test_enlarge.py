"""Windows that were painted small, painted again in tiles: `imaging.enlarge` and `SamplingOptions.refine`."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from moebius_jax import MoebiusInpaintPipeline, UserError
from moebius_jax.imaging.crop import cut
from moebius_jax.imaging.enlarge import GRAIN, Enlargement, Tile, sides, starts
from moebius_jax.imaging.regions import plan_windows
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions
from moebius_jax.inpaint.stream import AHEAD, InpaintOptions, Item, inpaint_stream

pytestmark = pytest.mark.filterwarnings("ignore::moebius_jax.imaging.masks.MaskWarning")
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
    enlargement = Enlargement(rgb, window, first.image, first.hole, model(first, S))
    seen = []
    while tiles := enlargement.next_tiles():
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
    # Enlarging rounds, and what is less than grain is not put right.
    assert np.abs(painted.astype(int) - whole(scene)[0]).max() < GRAIN
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
    """A model that is 10 levels too bright, everywhere and at every size."""

    def model(tile, side):
        picture = whole(scene, side)[0][tile.top : tile.top + S, tile.left : tile.left + S]
        return np.minimum(picture * 0.875 + 16 + 10, 255).astype(np.uint8)

    def true(tile, side):
        return model(tile, side) - 10

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
    enlargement = Enlargement(rgb, wide, image, square, image)
    assert second.regions != first.regions
    while tiles := enlargement.next_tiles():
        assert max(tile.left for tile in tiles) < enlargement.painted.shape[0] / 2
        for tile in tiles:
            enlargement.put(tile, tile.image)


def test_a_lone_pixel_is_painted_at_its_full_size():
    rgb, hole = np.zeros((1000, 1000, 3), np.uint8), np.zeros((1000, 1000), bool)
    hole[500, 500] = True
    (window,) = plan_windows(hole, S, margin=490)
    image, square = cut(rgb, hole, window, S)
    assert square.sum() == 1
    enlargement = Enlargement(rgb, window, image, square, image)
    while tiles := enlargement.next_tiles():
        for tile in tiles:
            enlargement.put(tile, tile.image)
    assert len(enlargement.painted) == window.side > 20 * S


def test_tiles_fade_into_each_other():
    """Two that overlap, one painted as a chessboard: it grows fainter from column to column."""
    rgb, hole = np.full((32, 56, 3), 100, np.uint8), np.zeros((32, 56), bool)
    hole[10:20, 4:52] = True
    (window,) = plan_windows(hole, S, margin=4)
    image, square = cut(rgb, hole, window, S)
    enlargement = Enlargement(rgb, window, image, square, image)
    tiles = enlargement.next_tiles()
    assert len({tile.left for tile in tiles}) == 2
    chessboard = np.where(np.indices((S, S)).sum(0) % 2, 60, -60)[..., None]
    for tile in tiles:
        squares = 100 + chessboard * (tile.left == 0) + np.zeros((S, S, 3))
        enlargement.put(tile, squares.astype(np.uint8))
    size = len(enlargement.painted)
    contrast = np.abs(enlargement.painted[size // 2, :, 0].astype(int) - 100)
    assert contrast[:10].min() > 50
    assert contrast[S:].max() == 0
    overlap = contrast[size - S : S + 1]
    assert -np.diff(overlap).min() <= 12
    assert (np.diff(overlap) <= 0).all()


class Flat:
    """In the place of a sampler: paints squares grey, and remembers what it was given."""

    image_size = S
    config = SimpleNamespace(latent_size=S // 8)

    def __init__(self, broken_at=None):
        self.batches, self.broken_at = [], broken_at

    def __call__(self, images, holes, seeds, options, _callback, noise):
        self.batches.append((images, holes, seeds, options, noise))
        finite = np.full(len(images), options.strength != self.broken_at)
        return np.where(holes[..., None], np.uint8(90), images), finite


def item(hole, index=0, width=200, **values):
    mask = np.zeros((200, width), np.uint8)
    for rows, columns in hole:
        mask[rows, columns] = 255
    rng = np.random.default_rng(index)
    return Item(rgb=rng.integers(0, 256, (200, width, 3), np.uint8), mask=mask, index=index, **values)


LARGE, SMALL = (slice(20, 180), slice(10, 190)), (slice(90, 100), slice(90, 100))
REFINED = SamplingOptions(refine=0.5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_large_hole_does_not_hold_up_a_folder(batch_size):
    """Results come while items are still to be read, in the items' order, each once."""
    read = []

    def items():
        for i in range(120):
            read.append(i)
            yield item([LARGE if i % 50 == 0 else SMALL], i)

    sampler, seen = Flat(), []
    for result in inpaint_stream(sampler, items(), InpaintOptions(), REFINED, batch_size=batch_size):
        assert len(read) - result.item.index <= AHEAD * batch_size + 1
        seen.append(result.item.index)
    assert seen == list(range(120))
    assert all(len(images) == batch_size for images, *_ in sampler.batches)


def test_the_oldest_picture_is_finished_first():
    """Or as many as there are batches would lie in memory at their full size at once."""
    sampler, batches = Flat(), []
    subjects = (item([LARGE], i) for i in range(6))
    for _ in inpaint_stream(sampler, subjects, InpaintOptions(), REFINED, batch_size=2):
        batches.append(len(sampler.batches))
    assert batches[0] <= 0.25 * batches[-1]


def test_windows_of_one_image_are_painted_again_each_by_itself():
    two = [(slice(20, 90), slice(10, 70)), (slice(100, 190), slice(900, 990))]
    sampler, subject = Flat(), item(two, width=1000)
    (result,) = inpaint_stream(sampler, [subject], InpaintOptions(mask_blur=0), REFINED, batch_size=1)
    assert {int(seeds[0, 2]) % 2**12 for _, _, seeds, *_ in sampler.batches} == {0, 1}
    np.testing.assert_array_equal(result.rgb[subject.mask == 0], subject.rgb[subject.mask == 0])
    assert (np.abs(result.rgb[subject.mask > 0].astype(int) - 128) < 60).all()
    draws = [tuple(seeds[0]) for _, _, seeds, *_ in sampler.batches]
    assert len(set(draws)) == len(draws)
    (tile,), (hole,), *_ = sampler.batches[-1]  # of the full size, around the hole as the image is
    assert set(map(tuple, tile[~hole])) <= set(map(tuple, subject.rgb.reshape(-1, 3)))


def test_after_a_square_that_failed_nothing_of_its_picture_is_painted():
    sampler, subject = Flat(broken_at=0.5), [item([LARGE]), item([SMALL], 1)]
    first, second = inpaint_stream(sampler, subject, InpaintOptions(), REFINED, batch_size=1)
    assert "image: the network produced NaN" in str(first.error)
    assert first.rgb is None
    assert second.error is None
    assert len(sampler.batches) <= 4


def test_only_the_first_fill_begins_with_given_noise():
    noise = np.ones((S // 8, S // 8, 4), np.float32)
    sampler = Flat()
    (_,) = inpaint_stream(sampler, [item([LARGE], noise=noise)], InpaintOptions(), REFINED, batch_size=1)
    given = [batch[-1] for batch in sampler.batches]
    np.testing.assert_array_equal(given[0], noise[None])
    assert len(given) > 1
    assert set(map(type, given[1:])) == {type(None)}


def test_no_memory_for_one_picture_is_its_own_error(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Enlargement, "next_tiles", full)
    first, second = inpaint_stream(
        Flat(), [item([LARGE]), item([SMALL], 1)], InpaintOptions(), REFINED, batch_size=1
    )
    assert "too large for this machine's memory" in str(first.error)
    assert second.error is None


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
            (20, 0.99, 1 / 49, (50, 1 / 49)),
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
            (1e-4, "refine is 0.0001; expected 0, or 0.01 or more"),
            (1e-320, "refine is 1e-320; expected 0, or 0.01 or more"),
        ],
    )
    def test_out_of_range(self, refine, message):
        with pytest.raises(UserError, match=message):
            SamplingOptions(refine=refine)

    def test_it_is_a_default_of_tinys_alone(self):
        assert MoebiusInpaintPipeline.from_pretrained("tiny").defaults.refine == 0.5
        assert SamplingOptions().refine == 0
