"""Colours that agree at a hole's edge: the membrane and its equation, pasting, and what tiles add."""

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import spsolve

from moebius_jax.imaging import crop
from moebius_jax.imaging.enlarge import GRAIN, Enlargement
from moebius_jax.imaging.membrane import membrane
from moebius_jax.imaging.pyramid import coarse
from moebius_jax.imaging.regions import plan_windows


def solved(difference, known):
    """The mean of its neighbours at every unknown position, by a direct solver."""
    H, W = known.shape
    at = np.arange(H * W).reshape(H, W)
    rows = np.concatenate([at[1:].ravel(), at[:-1].ravel(), at[:, 1:].ravel(), at[:, :-1].ravel()])
    columns = np.concatenate([at[:-1].ravel(), at[1:].ravel(), at[:, :-1].ravel(), at[:, 1:].ravel()])
    beside = sparse.csr_matrix((np.ones(columns.size), (rows, columns)), (H * W, H * W))
    laplacian = sparse.diags(np.asarray(beside.sum(1)).ravel()) - beside
    hole = ~known.ravel()
    flat = difference.reshape(H * W, -1)
    inner = laplacian[hole][:, hole].tocsc()
    out = np.array(flat, float)
    for c in range(flat.shape[1]):
        out[hole, c] = spsolve(inner, -(laplacian[hole][:, ~hole] @ flat[~hole, c]))
    return out.reshape(difference.shape)


@pytest.fixture
def known():
    known = np.ones((61, 90), bool)
    known[8:40, 20:70] = False
    known[30:61, 5:30] = False  # down to the edge
    known[3, 80] = False
    return known


def smooth(rng, shape):
    """Differences of a network that is a shade off, more here than there."""
    return coarse(rng.normal(0, 30, (*shape, 3)), 3)


def test_it_lies_as_the_equation_says(known):
    difference = smooth(np.random.default_rng(0), known.shape)
    ours, exact = membrane(difference, known), solved(difference, known)
    np.testing.assert_array_equal(ours[known], difference[known])
    error = np.abs(ours - exact)[~known]
    assert error.mean() < 0.2 * np.abs(exact[~known]).mean()
    inside = ours[~known]
    assert (inside >= difference[known].min(0)).all()
    assert (inside <= difference[known].max(0)).all()


def test_a_slope_goes_on_as_a_slope(known):
    """It satisfies the equation already, so that nothing is left for the sweeps."""
    y, x = np.mgrid[:61, :90]
    known = known.copy()
    known[40:] = True
    slope = np.stack([0.5 * x, 0.25 * y, 10 - 0.2 * x], -1)
    np.testing.assert_allclose(membrane(slope, known), slope, atol=0.25)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 40), (3, 3), (64, 1), (17, 33)])
def test_constants_in_maps_of_any_size(shape):
    known = np.zeros(shape, bool)
    difference = np.full((*shape, 3), 7.0)
    assert (membrane(difference, known) == 0).all()
    known[0, 0] = True
    np.testing.assert_array_equal(membrane(difference, known), difference)
    np.testing.assert_array_equal(membrane(difference, np.ones(shape, bool)), difference)


def test_unknown_differences_have_no_part(known):
    difference = smooth(np.random.default_rng(1), known.shape)
    other = np.where(known[..., None], difference, np.nan)
    np.testing.assert_array_equal(membrane(other, known), membrane(difference, known))


class TestPasting:
    @pytest.fixture
    def scene(self):
        """A photograph with two holes whose windows overlap, and what a network a shade off paints."""
        y, x = np.mgrid[:80, :120]
        rgb = np.uint8(np.stack([x + 40, 2 * y + 20, 200 - x], -1))
        hole = np.zeros((80, 120), bool)
        hole[20:50, 15:45] = True
        hole[30:40, 56:62] = True
        return rgb, hole

    def test_the_fill_meets_the_image_all_along_the_edge(self, scene):
        rgb, hole = scene
        first = plan_windows(hole, 64)[0]
        y, x = np.mgrid[: first.side, : first.side]
        shade = np.stack([x / 3, y / 3, 20 - x / 4], -1)
        image = crop.cut(rgb, hole, first, first.side)[0]
        pasted = crop.paste(rgb, np.uint8(image * 0.8 + shade), first, blur=0, match_color=True)
        np.testing.assert_allclose(pasted.astype(int), rgb, atol=4)
        unmatched = crop.paste(rgb, np.uint8(image * 0.8 + shade), first, blur=0, match_color=False)
        assert np.abs(unmatched.astype(int) - rgb).max() > 15

    def test_what_lies_in_another_hole_has_no_part(self, scene):
        rgb, _ = scene
        hole = np.zeros((80, 120), bool)
        hole[20:24, 20:24] = hole[20:24, 28:32] = True
        first, second = plan_windows(hole, 16)
        assert first.inside[1].stop > 28, "the first window reaches into the other hole"
        painted = np.random.default_rng(0).integers(0, 256, (first.side, first.side, 3), np.uint8)
        expected = crop.paste(rgb, painted, first, blur=0, match_color=True)
        rgb[second.inside][second.hole] = 255
        found = crop.paste(rgb, painted, first, blur=0, match_color=True)
        np.testing.assert_array_equal(found[20:24, 20:24], expected[20:24, 20:24])

    def test_what_the_network_did_not_paint_does_not_bleed(self, scene):
        """The rim of an object that is to go, white along one side of the hole."""
        rgb, hole = scene
        first = plan_windows(hole, 64)[0]
        image = crop.cut(rgb, hole, first, first.side)[0]
        rgb[20:50, 12:15] = 255
        pasted = crop.paste(rgb, image, first, blur=0, match_color=True)
        brighter = pasted[first.inside].astype(int) - image[first.covered]
        assert 5 < brighter[first.hole].max() <= 32

    def test_a_fade_begins_where_the_fill_agrees(self, scene):
        rgb, hole = scene
        first = plan_windows(hole, 64)[0]
        image = crop.cut(rgb, hole, first, first.side)[0]
        stained = rgb.copy()
        near = crop.feather(first.hole, 3) > 0
        # The rim of what is to go, which the network does not paint.
        stained[first.inside][near & ~first.hole] = 0

        pasted = crop.paste(stained, image, first, blur=3, match_color=True)
        np.testing.assert_array_equal(pasted[first.inside][first.hole], rgb[first.inside][first.hole])


class TestTiles:
    @pytest.fixture
    def begun(self):
        """A window of four times the model's side whose first fill is the image."""
        rgb = np.full((128, 128, 3), 120, np.uint8)
        hole = np.zeros((128, 128), bool)
        hole[30:100, 30:100] = True
        (window,) = plan_windows(hole, 32)
        image, square = crop.cut(rgb, hole, window, 32)
        return Enlargement(rgb, window, image, square, image)

    def last(self, begun, paint):
        while tiles := begun.next_tiles():
            for tile in tiles:
                begun.put(tile, paint(tile))
        return begun.painted.astype(int)

    def test_grain_is_not_added(self, begun):
        rng = np.random.default_rng(0)

        def faint(tile):
            return np.uint8(tile.image + rng.integers(0, 3, tile.image.shape))

        np.testing.assert_array_equal(self.last(begun, faint), 120)

    def test_colours_are_not_changed(self, begun):
        np.testing.assert_array_equal(self.last(begun, lambda tile: tile.image + np.uint8(50)), 120)

    def test_detail_is_added(self, begun):
        chessboard = np.indices((32, 32)).sum(0)[..., None] % 2 * 40
        painted = self.last(begun, lambda tile: np.uint8(tile.image + chessboard))
        assert np.abs(painted - 120).max() >= 20 - GRAIN
