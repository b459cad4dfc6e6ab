"""Pictures, masks, windows and pasting; no network."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import synth
from PIL import Image

from moebius_jax import UserError
from moebius_jax.imaging import crop, masks, release
from moebius_jax.imaging.color import color_shift
from moebius_jax.imaging.grid import side_by_side
from moebius_jax.imaging.picture import picture_from_pil, read_mask, read_picture, write_image
from moebius_jax.imaging.regions import plan_windows


@pytest.fixture(scope="module")
def vectors():
    return synth.golden("pipeline_mini")


class TestRelease:
    """The release's preprocessing and pasting, to the bit."""

    @pytest.mark.parametrize("i", [0, 1])
    def test_prepare(self, vectors, i):
        rgb, hole = release.prepare(vectors[f"image_{i}"], vectors[f"mask_{i}"], 256, 0)
        np.testing.assert_array_equal(hole, vectors[f"pre_mask_{i}"][0, 0])
        np.testing.assert_allclose(rgb / 127.5 - 1, synth.nhwc(vectors[f"pre_image_{i}"])[0], atol=1e-6)

    @pytest.mark.parametrize("i", [0, 1])
    @pytest.mark.parametrize("kind", ["paste", "compensate"])
    def test_paste(self, vectors, i, kind):
        rgb, hole = release.prepare(vectors[f"image_{i}"], vectors[f"mask_{i}"], 256, 0)
        pasted = release.paste(rgb, vectors[f"plain_{i}"], hole, compensate=kind == "compensate")
        np.testing.assert_array_equal(pasted, vectors[f"{kind}_{i}"])

    def test_squashes_other_sizes(self, photo, mask):
        rgb, hole = release.prepare(photo, mask, 64, 3)
        assert rgb.shape == (64, 64, 3)
        assert hole.shape == (64, 64)
        assert hole.sum() > release.prepare(photo, mask, 64, 0)[1].sum()


class TestMasks:
    def test_threshold_is_half_grey(self):
        grey = np.array([[0, 127, 128, 255]], np.uint8)
        np.testing.assert_array_equal(masks.grey_levels(grey) > masks.THRESHOLD, [[False, False, True, True]])
        inverted = masks.grey_levels(grey, invert=True)
        np.testing.assert_array_equal(inverted > masks.THRESHOLD, [[True, True, False, False]])

    @pytest.mark.parametrize(
        ("grey", "message"),
        [
            (np.full((4, 4), 255, np.uint8), "everything is to be repainted"),
            (np.zeros((4, 4), np.uint8), "nothing to repaint"),
            (np.eye(4, dtype=np.uint8), "holds only 0 and 1"),
        ],
    )
    def test_suspicious_masks_warn(self, grey, message):
        with pytest.warns(masks.MaskWarning, match=f"m.png: {message}"):
            out = masks.grey_levels(grey, name="m.png")
        np.testing.assert_array_equal(out > masks.THRESHOLD, grey > 0)

    def test_dilation_is_a_square(self):
        hole = np.zeros((9, 9), bool)
        hole[4, 4] = True
        assert masks.dilate(hole, 0).sum() == masks.dilate(hole, 1).sum() == 1
        np.testing.assert_array_equal(np.argwhere(masks.dilate(hole, 3)), np.argwhere(np.ones((3, 3))) + 3)

    def test_thin_strokes_warn(self):
        hole = np.zeros((64, 64), bool)
        hole[:, 13:15] = True
        with pytest.warns(masks.MaskWarning, match=r"strokes thinner than 24 pixels .* \(mask dilation 45\)"):
            masks.warn_if_thin(hole, 8, 3.0, "m.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks.warn_if_thin(masks.dilate(hole, 15), 8, 3.0, "m.png")


def hole_with(shape, *boxes):
    hole = np.zeros(shape, bool)
    for top, left, bottom, right in boxes:
        hole[top:bottom, left:right] = True
    return hole


def filled(windows):
    """How many windows fill each pixel."""
    count = np.zeros(windows[0].labels.shape, int)
    for window in windows:
        count[window.inside] += window.hole
    return count


class TestWindows:
    def test_model_sized_image_is_one_whole_window(self):
        hole = hole_with((512, 512), (10, 10, 30, 30), (480, 470, 500, 500))
        (window,) = plan_windows(hole, 512)
        assert (window.top, window.left, window.side) == (0, 0, 512)
        np.testing.assert_array_equal(filled([window]), hole)

    def test_small_hole_in_a_large_image_is_not_blown_up(self):
        (window,) = plan_windows(hole_with((2000, 3000), (1000, 1500, 1040, 1530)), 512)
        assert window.side == 512
        assert window.top <= 1000 - 200
        assert window.top + 512 >= 1040 + 200

    def test_large_hole_keeps_half_its_size_around_it(self):
        (window,) = plan_windows(hole_with((4000, 4000), (1000, 1200, 2000, 1900)), 512)
        assert (window.top, window.side) == (500, 2000)

    def test_far_regions_get_windows_of_their_own_and_near_ones_share(self):
        far = hole_with((600, 4000), (10, 10, 60, 60), (300, 3000, 380, 3100))
        windows = plan_windows(far, 512)
        assert len(windows) == 2
        np.testing.assert_array_equal(filled(windows), far)
        near = hole_with((600, 4000), (100, 100, 140, 140), (200, 300, 240, 330))
        assert len(plan_windows(near, 512)) == 1

    def test_explicit_margin(self):
        (window,) = plan_windows(hole_with((900, 900), (400, 400, 440, 420)), 512, margin=10)
        assert window.side == 60
        assert (window.top, window.left) == (390, 380)

    @pytest.mark.parametrize("shape", [(300, 200), (100, 1000), (7, 5), (1, 40), (513, 511)])
    def test_every_hole_pixel_is_in_its_window(self, shape):
        rng = np.random.default_rng(0)
        for _ in range(20):
            hole = rng.random(shape) < 0.02
            hole[rng.integers(shape[0]), rng.integers(shape[1])] = True
            windows = plan_windows(hole, 512)
            np.testing.assert_array_equal(filled(windows), hole)
            assert max(w.side for w in windows) <= max(shape)

    def test_specks_all_over_do_not_explode(self):
        hole = np.random.default_rng(1).random((2000, 2000)) < 0.001
        assert len(plan_windows(hole, 512)) <= 16


class TestCutAndPaste:
    def test_pasting_the_cut_changes_nothing_at_scale_one(self, photo, mask):
        (window,) = plan_windows(mask > 127, 64, margin=10)
        image, _ = crop.cut(photo, mask > 127, window, window.side)
        pasted = crop.paste(photo, image, window, blur=4, match_color=True)
        np.testing.assert_array_equal(pasted, photo)

    @pytest.mark.parametrize("blur", [0, 4])
    @pytest.mark.parametrize("size", [16, 64, 256])
    def test_pixels_out_of_reach_are_untouched_and_the_hole_is_filled(self, photo, mask, blur, size):
        (window,) = plan_windows(mask > 127, 64)
        result = np.full((size, size, 3), 200, np.uint8)
        pasted = crop.paste(photo, result, window, blur=blur, match_color=False)
        hole = mask > 127
        assert (pasted[hole] == 200).all()
        reach = crop.feather(hole, blur * max(1, window.side / size)) > 0
        np.testing.assert_array_equal(pasted[~reach], photo[~reach])
        assert reach.sum() == hole.sum() if blur == 0 else reach.sum() > hole.sum()

    def test_feather_falls_from_one_to_zero(self):
        weight = crop.feather(hole_with((1, 20), (0, 0, 1, 5)), 4)[0]
        assert (weight[:5] == 1).all()
        assert (np.diff(weight[4:9]) < 0).all()
        assert (weight[9:] == 0).all()

    def test_window_beyond_the_edge_mirrors_the_image(self):
        image = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 12, 3), np.uint8)
        hole = hole_with((6, 12), (0, 0, 6, 12))
        (window,) = plan_windows(hole, 512)
        assert (window.top, window.left, window.side) == (-3, 0, 12)
        square, _ = crop.cut(image, hole, window, 12)
        np.testing.assert_array_equal(square[:, 0, 0], [3, 2, 1, 0, 1, 2, 3, 4, 5, 4, 3, 2])

    def test_shrunken_hole_loses_no_pixel(self):
        hole = hole_with((256, 256), (100, 100, 101, 101))
        (window,) = plan_windows(hole, 512, margin=100)
        _, square = crop.cut(np.zeros((256, 256, 3), np.uint8), hole, window, 32)
        assert square.any()

    def test_a_fade_wider_than_the_window_ends_softly_inside_it(self, photo, mask):
        (window,) = plan_windows(mask > 127, 64, margin=6)
        result = np.full((32, 32, 3), 255, np.uint8)
        pasted = crop.paste(photo // 2, result, window, blur=60, match_color=False).astype(int)
        rows, columns = window.inside
        change = (pasted - photo // 2).max(-1)
        frame = np.ones_like(change, bool)
        frame[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = False
        assert change[frame].max() < 0.1 * change.max()

    def test_match_color_removes_a_constant_shift(self, photo, mask):
        (window,) = plan_windows(mask > 127, 64, margin=12)
        image, _ = crop.cut(photo // 2, mask > 127, window, window.side)
        pasted = crop.paste(photo // 2, image + 25, window, blur=0, match_color=True)
        np.testing.assert_array_equal(pasted, photo // 2)


def test_color_shift_without_a_ring_is_zero(photo):
    image = photo.astype(float)
    assert (color_shift(image, image + 9, np.zeros((80, 112), bool)) == 0).all()
    assert (color_shift(image, image + 9, np.ones((80, 112), bool)) == 0).all()


def png_16_bit(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + bytes(5 * 6) for _ in range(4)))
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


class TestPictures:
    def test_no_image_starts_another_program(self, tmp_path, monkeypatch):
        """PIL hands PostScript to Ghostscript, whatever the file is called."""
        started = []
        monkeypatch.setattr("subprocess.check_call", lambda *a, **_: started.append(a))
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **_: started.append(a))
        lines = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
        for read in (read_picture, read_mask):
            (tmp_path / "photo.png").write_bytes(lines)
            with pytest.raises(UserError, match=r"photo\.png: not an image of a kind that is read"):
                read(tmp_path / "photo.png")
        assert not started
        top = Path(__file__).parents[1]
        files = [p for part in ("moebius_jax", "benchmarks", "examples") for p in (top / part).rglob("*.py")]
        opening = [p.name for p in [*files, *top.glob("*.py")] if "Image.open(" in p.read_text()]
        assert opening == ["picture.py"], "open_image is for everyone"

    def test_alpha_passes_through(self, photo, tmp_path):
        alpha = np.arange(80 * 112, dtype=np.uint32).reshape(80, 112).astype(np.uint8)
        Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "a.png")
        picture = read_picture(tmp_path / "a.png")
        np.testing.assert_array_equal(picture.rgb, photo)
        out = np.asarray(picture.with_rgb(255 - photo))
        np.testing.assert_array_equal(out, np.dstack([255 - photo, alpha]))

    def test_grey_stays_grey(self, photo, tmp_path):
        Image.fromarray(photo[..., 0]).save(tmp_path / "g.png")
        picture = read_picture(tmp_path / "g.png")
        np.testing.assert_array_equal(picture.rgb, np.repeat(photo[..., :1], 3, -1))
        out = picture.with_rgb(picture.rgb)
        assert out.mode == "L"
        np.testing.assert_array_equal(out, photo[..., 0])

    def test_exif_orientation_is_applied(self, photo, tmp_path):
        image = Image.fromarray(photo)
        exif = image.getexif()
        exif[0x0112] = 6  # shown a quarter turn clockwise
        image.save(tmp_path / "e.png", exif=exif)
        np.testing.assert_array_equal(read_picture(tmp_path / "e.png").rgb, np.rot90(photo, -1))

    def test_palette_with_transparency(self, photo, tmp_path):
        image = Image.fromarray(photo).quantize(16)
        image.save(tmp_path / "p.png", transparency=0)
        picture = read_picture(tmp_path / "p.png")
        assert picture.alpha is not None
        assert set(np.unique(picture.alpha)) == {0, 255}

    def test_profile_is_kept(self, photo, tmp_path):
        Image.fromarray(photo).save(tmp_path / "i.png", icc_profile=b"profile")
        write_image(tmp_path / "o.png", read_picture(tmp_path / "i.png").with_rgb(photo), overwrite=False)
        assert Image.open(tmp_path / "o.png").info["icc_profile"] == b"profile"

    def test_16_bits_are_refused_by_name(self, tmp_path):
        png_16_bit(tmp_path / "deep.png")
        with pytest.raises(UserError, match=r"deep\.png: 16 bits a channel"):
            read_picture(tmp_path / "deep.png")
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "grey.png")
        with pytest.raises(UserError, match=r"grey\.png: 16 bits a channel"):
            read_picture(tmp_path / "grey.png")

    @pytest.mark.parametrize(("suffix", "width"), [(".bmp", 720), (".bmp", 53), (".tif", 160)])
    def test_8_bits_are_not_mistaken_for_16(self, suffix, width, tmp_path):
        image = np.arange(3 * width, dtype=np.uint32).reshape(1, width, 3).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(read_picture(tmp_path / f"a{suffix}").rgb, image)

    def test_masks_with_transparency_are_refused(self, mask, tmp_path):
        drawn = np.dstack([np.full_like(mask, 255)] * 3 + [mask])
        Image.fromarray(drawn).save(tmp_path / "m.png")
        with pytest.raises(UserError, match=r"m\.png: a mask with transparency is ambiguous"):
            read_mask(tmp_path / "m.png")
        drawn[..., :3], drawn[..., 3] = mask[..., None], 255
        Image.fromarray(drawn).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)

    def test_animations_are_refused(self, photo, tmp_path):
        frames = [Image.fromarray(photo), Image.fromarray(255 - photo)]
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=r"a\.webp: holds 2 frames"):
            read_picture(tmp_path / "a.webp")

    def test_broken_exif_is_named(self, photo, tmp_path):
        Image.fromarray(photo).save(tmp_path / "e.png", exif=b"garbage that is no TIFF header")
        with pytest.raises(UserError, match=r"e\.png: unreadable image"):
            read_picture(tmp_path / "e.png")

    def test_webp_is_lossless(self, photo, tmp_path):
        write_image(tmp_path / "o.webp", Image.fromarray(photo), overwrite=False)
        np.testing.assert_array_equal(Image.open(tmp_path / "o.webp").convert("RGB"), photo)

    def test_other_modes_are_refused_by_name(self, photo, tmp_path):
        Image.fromarray(photo).convert("CMYK").save(tmp_path / "c.jpg")
        with pytest.raises(UserError, match=r"c\.jpg: mode CMYK"):
            read_picture(tmp_path / "c.jpg")
        with pytest.raises(UserError, match="image: mode F"):
            picture_from_pil(Image.fromarray(photo[..., 0].astype(np.float32)))

    def test_unreadable_files_are_named(self, photo, tmp_path):
        (tmp_path / "t.txt.png").write_text("hello")
        with pytest.raises(UserError, match=r"t\.txt\.png: not an image"):
            read_picture(tmp_path / "t.txt.png")
        Image.fromarray(photo).save(tmp_path / "whole.png")
        (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
        with pytest.raises(UserError, match=r"half\.png: unreadable image"):
            read_picture(tmp_path / "half.png")
        with pytest.raises(UserError, match=r"none\.png: no such file"):
            read_mask(tmp_path / "none.png")

    def test_writing_never_leaves_a_half_file(self, photo, tmp_path):
        image = Image.fromarray(photo)
        write_image(tmp_path / "o.png", image, overwrite=False)
        with pytest.raises(UserError, match="exists already"):
            write_image(tmp_path / "o.png", image, overwrite=False)
        with pytest.raises(UserError, match=r"expected one of .*found \.xyz"):
            write_image(tmp_path / "o.xyz", image, overwrite=False)
        for suffix in (".jpg", ".bmp"):
            with pytest.raises(UserError, match="keeps no transparency"):
                write_image(tmp_path / f"o{suffix}", image.convert("RGBA"), overwrite=False)

        class Failing(Image.Image):
            def save(self, path, **_):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")

        with pytest.raises(UserError, match="No space left"):
            write_image(tmp_path / "o.png", Failing(), overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["o.png"]
        np.testing.assert_array_equal(Image.open(tmp_path / "o.png"), photo)


def test_grid_shows_three_panels(photo, mask):
    grid = np.asarray(side_by_side(photo, mask, 255 - photo))
    assert grid.shape == (80, 3 * 112 + 2 * 8, 3)
    np.testing.assert_array_equal(grid[:, :112], photo)
    np.testing.assert_array_equal(grid[:, 120:232, 0], mask)
