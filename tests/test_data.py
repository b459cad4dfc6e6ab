"""Annotation files, random masks, samples, and the order they come in."""

import collections
import json
import pickle
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from synth import GOLDEN

from moebius_jax.data import augment
from moebius_jax.data.augment import AugmentConfig, draw_sample
from moebius_jax.data.config import DataConfig, open_dataset
from moebius_jax.data.datasets import ImageDataset, Source, SyntheticDataset
from moebius_jax.data.latent_cache import CacheInfo, CacheWriter, LatentCache
from moebius_jax.data.loader import Loader, LoaderConfig
from moebius_jax.data.random_masks import PRESETS, mask_generator
from moebius_jax.data.records import Record, read_records
from moebius_jax.data.samples import LatentSample
from moebius_jax.errors import UserError

STATISTICS = json.loads((GOLDEN / "mask_statistics.json").read_text())
SMALL = AugmentConfig(image_size=32, masks=("thick_256",))


@pytest.fixture
def images(tmp_path):
    """Twelve pictures, each of one colour."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (48, 40), (i * 20, 0, 0)).save(folder / f"{i:02d}.png")
    return folder


class TestRandomMasks:
    @pytest.mark.slow
    @pytest.mark.parametrize("preset", sorted(STATISTICS))
    def test_holes_are_distributed_as_the_releases(self, preset):
        expected, draws = STATISTICS[preset], 1000
        rng = np.random.default_rng(0)
        ratios = [mask_generator(preset)(rng, int(preset[-3:])).mean() for _ in range(draws)]
        # Both sides are samples: four standard errors of the difference of their means.
        error = expected["std"] * np.sqrt(1 / draws + 1 / expected["n"])
        assert abs(np.mean(ratios) - expected["mean"]) < 4 * error
        assert np.std(ratios) == pytest.approx(expected["std"], rel=0.1)
        for quantile in ("0.25", "0.5", "0.75", "0.95"):
            # A quantile is a coarser statistic: where boxes take over from strokes it moves by 0.05.
            assert np.quantile(ratios, float(quantile)) == pytest.approx(
                expected["quantiles"][quantile], abs=0.06
            )

    @pytest.mark.parametrize("preset", sorted(PRESETS))
    def test_any_size_and_the_same_generator_the_same_hole(self, preset):
        holes = [mask_generator(preset)(np.random.default_rng(3), 64) for _ in range(2)]
        assert holes[0].shape == (64, 64)
        assert holes[0].dtype == bool
        np.testing.assert_array_equal(*holes)

    @pytest.mark.parametrize("preset", sorted(PRESETS))
    def test_every_true_is_a_byte_of_one(self, preset):
        holes = [mask_generator(preset)(np.random.default_rng(seed), 64) for seed in range(20)]
        assert set(np.unique(np.stack(holes).view(np.uint8))) == {0, 1}

    def test_on_a_wide_picture_strokes_are_those_of_its_shorter_side(self):
        def mean(*shape):
            rng = np.random.default_rng(0)
            return np.mean([PRESETS["medium_512"].draw_on(rng, *shape).mean() for _ in range(100)])

        assert mean(64, 256) == pytest.approx(mean(256, 64), rel=0.3)
        assert mean(64, 256) < 0.6 * mean(64, 64)

    def test_small_free_form_masks_are_smaller(self):
        def mean(preset):
            rng = np.random.default_rng(0)
            return np.mean([mask_generator(preset)(rng, 128).mean() for _ in range(100)])

        assert mean("mat_small") < 0.7 * mean("mat_large")


class TestRecords:
    def test_a_folder_gives_its_images_in_order(self, images):
        assert [r.image.name for r in read_records(images)] == [f"{i:02d}.png" for i in range(12)]

    def test_lines_of_the_release(self, tmp_path):
        file = tmp_path / "train.jsonl"
        file.write_text(
            '{"image": "a.png", "prompt": "background"}\n\n'
            '["key", {"image": "/b.png", "prompt": "foreground", "mask": "m.png"}]\n'
            '{"image": "c.png", "mask": "m.png"}\n'
        )
        assert list(read_records(file)) == [
            Record(image=tmp_path / "a.png"),
            Record(image=tmp_path.__class__("/b.png"), task="foreground", mask=tmp_path / "m.png"),
            Record(image=tmp_path / "c.png", mask=tmp_path / "m.png"),
        ]
        assert read_records(file, tmp_path / "root")[0].image == tmp_path / "root" / "a.png"

    def test_python_notation_as_the_release_takes_it(self, tmp_path):
        file = tmp_path / "train.jsonl"
        file.write_text("{'image': 'a.png', 'prompt': 'background', 'mask': None}\n")
        assert list(read_records(file)) == [Record(image=tmp_path / "a.png")]

    def test_a_sample_takes_nine_bytes_and_can_be_sent_to_workers(self, tmp_path):
        file = tmp_path / "train%d.jsonl"
        line = '{"image": "%s/%06d.jpg", "prompt": "%s", "mask": "%06d.png"}\n'
        with file.open("w") as out:
            for i in range(20_000):
                out.write(line % ("long/" * 30, i, ("background", "foreground")[i % 2], i))
        records = read_records(file)
        assert records[3].image.name == "000003.jpg"  # opened here, and not to be sent
        sent = pickle.dumps(records)
        assert len(sent) < 9 * len(records) + 2000
        there = pickle.loads(sent)
        for i in (0, 7, 19_999, -1):
            assert there[i] == records[i]
        assert records[7].image.name == "000007.jpg"
        assert records[7].mask == tmp_path / "000007.png"
        np.testing.assert_array_equal(records.foreground(), np.arange(1, 20_000, 2))
        file.write_text("cut short")
        with pytest.raises(UserError, match=r"train%d.jsonl, sample 7: "):
            records[7]
        with pytest.raises(UserError, match=r"train%d.jsonl: is another file than when it was first read"):
            pickle.loads(sent)[7]

    def test_a_mark_at_the_beginning_is_no_sample(self, tmp_path):
        file = tmp_path / "train.jsonl"
        file.write_bytes(b'\xef\xbb\xbf\r\n{"image": "a.png"}\r\n\r\n{"image": "b.png"}')
        assert [r.image.name for r in read_records(file)] == ["a.png", "b.png"]
        file.write_bytes(b"\xef\xbb\xbf")
        with pytest.raises(UserError, match="holds no samples"):
            read_records(file)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"train\.jsonl:2: not JSON"),
            ('{"img": "a"}', "expected"),
            ('{{"image": "a"}}', r"train\.jsonl:2: not JSON"),
            ("{1: 2, 'image': 'a'}", r"train\.jsonl:2: the field 1 has no name"),
            ('{"image": "a", "prompt": "sky"}', "prompt is 'sky'"),
            ('{"image": "a", "prompt": "foreground"}', "needs a mask"),
            ('{"image": "a", "mask": 3}', "mask is 3"),
        ],
    )
    def test_wrong_lines_are_named(self, line, message, tmp_path):
        file = tmp_path / "train.jsonl"
        file.write_text(f'{{"image": "a"}}\n{line}\n')
        with pytest.raises(UserError, match=message):
            read_records(file)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            read_records(tmp_path / "none")
        with pytest.raises(UserError, match="no images"):
            read_records(tmp_path)
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(UserError, match="no samples"):
            read_records(tmp_path / "empty.jsonl")


class TestSamples:
    @pytest.fixture
    def record(self, tmp_path):
        """An image whose red is its column and green its row; the mask covers one part of the long side."""
        y, x = np.mgrid[:64, :128].astype(np.uint8)
        Image.fromarray(np.stack([x, y, 0 * x], -1)).save(tmp_path / "image.png")
        mask = np.zeros((64, 128), np.uint8)
        mask[20:40, 90:120] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        return Record(image=tmp_path / "image.png", task="foreground", mask=tmp_path / "mask.png")

    def test_the_crop_shows_half_of_the_hole_at_least(self, record):
        config = AugmentConfig(image_size=64, dilation=0)
        starts = set()
        for seed in range(60):
            sample = draw_sample(record, config, [], np.random.default_rng(seed))
            assert sample.task == 1
            columns = np.flatnonzero(sample.hole.any(0))
            assert 15 <= len(columns) <= 30
            starts.add(int(sample.image[0, :, 0].min()))
            # Hole and image were cut at the same place and flipped together.
            assert set(sample.image[..., 0][sample.hole]) <= set(range(90, 120))
        assert len(starts) > 10

    def test_probabilities(self, record, tmp_path):
        object_mask = tmp_path / "object.png"
        grey = np.full((64, 64), 255, np.uint8)
        grey[:8] = 0
        Image.fromarray(grey).save(object_mask)
        background = Record(image=record.image, task="background", mask=record.mask)
        rng = np.random.default_rng(0)

        def holes(n=30, **changes):
            config = AugmentConfig(**{"image_size": 64, "dilation": 0.0, "flip": 0.0, **changes})
            return [draw_sample(background, config, [object_mask], rng).hole for _ in range(n)]

        top = [h[:8].any() for h in holes(intersection=1.0, random_mask=1.0, masks=("comodgan",))]
        assert not any(top), "the part outside the object stayed"
        assert any(h[:8].any() for h in holes(intersection=0.0, random_mask=1.0, masks=("comodgan",)))
        from_file = holes(intersection=0.0, random_mask=0.0)
        assert all(300 <= h.sum() <= 600 for h in from_file)
        grown = holes(intersection=0.0, random_mask=0.0, dilation=1.0)
        assert min(h.any(1).sum() for h in grown) >= 22
        sizes = {int(h.any(1).sum()) for h in grown}
        assert sizes <= {22, 24, 26, 28, 32}
        assert len(sizes) >= 3

    def test_flipped_is_mirrored_left_to_right(self, record):
        background = Record(image=record.image, task="background", mask=record.mask)
        plain, flipped = (
            draw_sample(
                background,
                AugmentConfig(image_size=64, dilation=0, random_mask=0, flip=flip),
                [],
                np.random.default_rng(0),
            )
            for flip in (0.0, 1.0)
        )
        np.testing.assert_array_equal(flipped.image, plain.image[:, ::-1])
        np.testing.assert_array_equal(flipped.hole, plain.hole[:, ::-1])
        assert (plain.hole != plain.hole[:, ::-1]).any()

    @pytest.mark.parametrize("holes_on", ["square", "image"])
    def test_every_preset_is_drawn_from(self, holes_on, record, monkeypatch):
        masks, drawn = ("thin_512", "medium_512", "thick_512"), collections.Counter()
        config = AugmentConfig(image_size=64, masks=masks, holes_on=holes_on)

        def draw(name, *shape):
            drawn[name] += 1
            return np.ones(shape, bool)

        monkeypatch.setattr(augment, "mask_generator", lambda name: lambda _, size: draw(name, size, size))
        presets = {n: SimpleNamespace(draw_on=lambda _, *shape, n=n: draw(n, *shape)) for n in masks}
        monkeypatch.setattr(augment, "PRESETS", presets)
        for seed in range(60):
            draw_sample(Record(image=record.image), config, [], np.random.default_rng(seed))
        assert sorted(drawn) == sorted(masks)
        assert min(drawn.values()) > 10

    def test_foreground_holes_stay_what_they_are(self, record, tmp_path):
        """Objects are taken out of the holes of backgrounds alone."""
        other = np.zeros((64, 128), np.uint8)
        other[:30] = 255
        Image.fromarray(other).save(tmp_path / "object.png")
        config = AugmentConfig(image_size=64, dilation=0, intersection=1.0)
        alone, among = (
            draw_sample(record, config, objects, np.random.default_rng(0)).hole
            for objects in ([], [tmp_path / "object.png"])
        )
        assert among.sum() == alone.sum()

    def test_images_and_masks_of_different_sizes(self, record):
        """The mask is resized, as the release does it, and that is said once."""
        config = AugmentConfig(image_size=64, dilation=0)
        whole = draw_sample(record, config, [], np.random.default_rng(0)).hole
        Image.open(record.mask).resize((512, 256), Image.Resampling.NEAREST).save(record.mask)
        augment._say_once_that_masks_are_resized.cache_clear()
        with pytest.warns(UserWarning, match="some masks are not of their images' sizes") as said:
            larger = [draw_sample(record, config, [], np.random.default_rng(0)).hole for _ in range(2)]
        assert len(said) == 1
        np.testing.assert_array_equal(larger[0], whole)

    def test_a_mask_of_other_proportions_is_refused(self, record):
        Image.new("L", (64, 64)).save(record.mask)
        with pytest.raises(
            UserError, match=r"mask.png: 64 x 64 pixels, of other proportions than its image's 128"
        ):
            draw_sample(record, SMALL, [], np.random.default_rng(0))

    def test_a_broken_object_leaves_the_hole_as_it_is(self, record, tmp_path):
        background = Record(image=record.image)
        broken = tmp_path / "broken.png"
        broken.write_text("no picture")
        config = AugmentConfig(image_size=64, intersection=1.0)
        with pytest.warns(UserWarning, match=r"broken\.png: .*; holes stay as they are"):
            sample = draw_sample(background, config, [broken], np.random.default_rng(0))
        assert sample.hole.any()

    def test_holes_on_the_whole_image_are_cut_with_it(self, record):
        """Drawn, intersected and grown before a square is cut out, which shows half of them at least."""
        background = Record(image=record.image)
        config = AugmentConfig(image_size=64, masks=("medium_512",), holes_on="image", intersection=1.0)
        right = record.mask.with_name("right.png")
        grey = np.zeros((64, 128), np.uint8)
        grey[:, 64:] = 255
        Image.fromarray(grey).save(right)
        seen = 0
        for seed in range(40):
            sample = draw_sample(background, config, [right], np.random.default_rng(seed))
            columns = set(sample.image[..., 0][sample.hole].tolist())  # red is the column of the whole image
            if max(columns) > 64 + 6:  # else nothing was common, and the hole stayed: grown by 6 at most
                seen += 1
                assert min(columns) >= 64 - 6
        assert seen > 5
        with pytest.raises(
            ValueError, match="holes_on is image and masks has comodgan, which is made for squ"
        ):
            AugmentConfig(masks=("comodgan",), holes_on="image")

    def test_objects_are_masks_of_a_folder_of_a_file_or_the_datas_own(self, record, tmp_path):
        lines = [
            {"image": "image.png", "prompt": "background"},
            {"image": "image.png", "prompt": "foreground", "mask": "mask.png"},
            {"image": "image.png", "prompt": "background", "mask": "other.png"},
        ]
        file = tmp_path / "train.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        folder = tmp_path / "objects"
        folder.mkdir()
        shutil.copy(record.mask, folder / "a.png")

        def objects(masks, path=file):
            return list(
                ImageDataset(Source(path=path, augment=AugmentConfig(foreground_masks=masks)))._objects
            )

        assert objects(None) == []
        assert objects("own") == objects(str(file), tmp_path) == [record.mask]
        assert objects(str(folder)) == [folder / "a.png"]
        for masks, path in (("own", tmp_path), ("own", tmp_path / "none.jsonl")):
            (tmp_path / "none.jsonl").write_text('{"image": "image.png"}')
            with pytest.raises(UserError, match="has no foreground samples, whose masks are wanted"):
                objects(masks, path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"masks": ("thick",)}, "expected one of"),
            ({"flip": 2.0}, "flip is 2.0; expected 1 or less"),
            ({"image_size": 1}, "8 or"),
        ],
    )
    def test_wrong_configurations(self, changes, message):
        with pytest.raises(ValueError, match=message):
            AugmentConfig(**changes)


class TestLoader:
    def batches(self, images, count=6, seed=5, warn=print, fraction=0.5, workers=0, **options):
        loader = Loader(
            ImageDataset(Source(path=images, augment=SMALL)),
            LoaderConfig(max_bad_fraction=fraction, workers=workers, threads=2),
            seed=seed,
            global_batch=4,
            warn=warn,
            **options,
        )
        result = [next(loader) for _ in range(count)]
        loader.close()
        return result

    def test_an_epoch_holds_every_image_once_and_the_next_another_order(self, images):
        colours = np.concatenate([b.samples.image[:, 0, 0, 0] for b in self.batches(images)]).tolist()
        first, second = colours[:12], colours[12:]
        assert sorted(first) == sorted(second) == [20 * i for i in range(12)]
        assert first != second

    def test_it_goes_on_where_it_stopped(self, images):
        whole = self.batches(images)
        rest = self.batches(images, count=2, first_batch=4)
        same(whole[4:], rest)

    @pytest.mark.slow
    def test_workers_change_nothing(self, images):
        same(self.batches(images, count=4), self.batches(images, count=4, workers=2))

    def test_processes_share_the_same_batches(self, images):
        parts = [self.batches(images, process=p, processes=2) for p in (0, 1)]
        for whole, *pieces in zip(self.batches(images), *parts, strict=True):
            order = np.argsort(np.concatenate([p.index for p in pieces]))
            joined = jax.tree.map(lambda *leaves, order=order: np.concatenate(leaves)[order], *pieces)
            jax.tree.map(np.testing.assert_array_equal, joined, whole)

    def test_bad_images_are_named_once_and_replaced(self, images):
        (images / "03.png").write_bytes(b"not a picture")
        said = []
        # One bad image is allowed however small the folder and the fraction.
        batches = self.batches(images, count=12, warn=said.append, fraction=0.001)
        assert len(said) == 1
        assert "03.png" in said[0]
        assert all(len(b.samples.image) == 4 for b in batches)

    def test_too_many_bad_images_end_the_run(self, images):
        for i in range(3):
            (images / f"0{i}.png").unlink()
            (images / f"0{i}.png").touch()
        with pytest.raises(UserError, match=r"of 12 items cannot be read, more than max_bad_fraction = 0.1"):
            self.batches(images, count=12, fraction=0.1)
        with pytest.raises(UserError, match="max_bad_fraction = 0"):
            self.batches(images, count=12, fraction=0.0)

    def test_nothing_readable(self, images):
        for path in images.iterdir():
            path.write_bytes(b"")
        with pytest.raises(UserError, match=r"10 items in a row cannot be read; .*\.png: not an image"):
            self.batches(images, fraction=1.0)

    def test_batches_that_cannot_be_shared(self):
        with pytest.raises(UserError, match="multiple of the 3 processes"):
            Loader(
                SyntheticDataset(Source(latent_shape=(8, 8, 4))),
                LoaderConfig(),
                seed=0,
                global_batch=4,
                processes=3,
            )


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


class TestLatentCache:
    @pytest.fixture
    def cache(self, tmp_path):
        info = CacheInfo(samples=3, side=4, vae="x", made_of={})
        writer = CacheWriter(tmp_path, info, LatentSample.blank((4, 4, 4)))
        rng = np.random.default_rng(0)
        batch = LatentSample(
            moments=rng.random((3, 4, 4, 8)),
            masked_moments=rng.random((3, 4, 4, 8)),
            hole=rng.random((3, 4, 4)) > 0.5,
            task=np.array([0, 1, 0]),
        )
        writer.add(LatentSample(*(v[:2] for v in batch)))
        writer.add(LatentSample(*(v[2:] for v in batch)))
        writer.close()
        return tmp_path, batch

    def test_what_was_written_is_read(self, cache):
        folder, batch = cache
        read = LatentCache(folder)
        assert len(read) == 3
        for i in range(3):
            for ours, value in zip(read[i], batch, strict=True):
                np.testing.assert_array_equal(ours, value[i].astype(ours.dtype))

    def test_holes_with_the_picture_in_them_are_refused(self, cache):
        np.save(cache[0] / "hole.npy", (cache[1].hole * np.uint8(255)).view(bool))
        with pytest.raises(UserError, match=r"\(sample 0\): encoded with the picture in its hole"):
            LatentCache(cache[0])

    def test_workers_are_sent_the_folder_not_the_arrays(self, cache):
        read = LatentCache(cache[0])
        assert len(pickle.dumps(read)) < 500
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(read))[1].hole, read[1].hole)

    def test_of_another_size(self, cache):
        with pytest.raises(UserError, match="latents of side 4; the network is trained at 8"):
            open_dataset(DataConfig(kind="latents", path=str(cache[0])), (8, 8, 4))
        with pytest.raises(UserError, match="latents with 4 channels; the network's have 8"):
            open_dataset(DataConfig(kind="latents", path=str(cache[0])), (4, 4, 8))

    def test_half_a_cache_is_none(self, tmp_path):
        info = CacheInfo(samples=2, side=4, vae="x", made_of={})
        writer = CacheWriter(tmp_path, info, LatentSample.blank((4, 4, 4)))
        with pytest.raises(ValueError, match="0 samples were added, 2 announced"):
            writer.close()
        with pytest.raises(UserError, match="not a folder of cached latents"):
            LatentCache(tmp_path)

    def test_damaged(self, cache):
        (cache[0] / "latents.json").write_text("{}")
        with pytest.raises(UserError, match=r"latents\.json: samples: missing field"):
            LatentCache(cache[0])

    def test_damaged_arrays(self, cache):
        with pytest.raises(UserError, match=r"hole\.npy: not a folder of cached latents"):
            LatentCache(cache[0] / "hole.npy")
        np.save(cache[0] / "hole.npy", np.zeros((3, 4, 5), bool))
        with pytest.raises(UserError, match=r"damaged cache of latents \(hole is bool\[3, 4, 5\]; expected"):
            LatentCache(cache[0])
        (cache[0] / "hole.npy").write_bytes(b"")
        with pytest.raises(UserError, match="damaged cache of latents"):
            LatentCache(cache[0])


def test_hidden_files_and_folders_called_like_pictures_are_none(images):
    (images / ".partial-1-2-3.png").write_bytes(b"half")
    (images / "album.png").mkdir()
    assert len(read_records(images)) == 12


def test_no_data_is_said_so():
    with pytest.raises(UserError, match=r"pass data\.path=FOLDER"):
        open_dataset(DataConfig(), (64, 64, 4))
