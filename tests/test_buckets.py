"""gs://… in the places that know it, against an emulator of Google's storage."""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import draw_photos
from PIL import Image
from storage_server import storage_server
from test_cli_train import LIMIT_S, ROOT
from test_processes import free_port

from moebius_jax import buckets
from moebius_jax import outbox as outbox_module
from moebius_jax.buckets import ArrayInBucket, fetched, joined, location
from moebius_jax.cli import elsewhere
from moebius_jax.cli.cache_latents import main as cache_latents
from moebius_jax.cli.elsewhere import worked_on_here
from moebius_jax.cli.evaluate import main as evaluate
from moebius_jax.cli.sample import main as sample
from moebius_jax.data.augment import AugmentConfig
from moebius_jax.data.datasets import ImageDataset, LatentDataset, Source
from moebius_jax.data.latent_cache import CacheInfo, CacheWriter
from moebius_jax.data.samples import LatentSample
from moebius_jax.errors import UserError
from moebius_jax.imaging.picture import read_picture, write_image
from moebius_jax.inpaint.model_folder import find_model
from moebius_jax.outbox import Outbox, folder_for
from moebius_jax.training.result import require_room_for_model
from moebius_jax.weights.folder import load_numpy
from moebius_jax.weights.load import load_vae

BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The environment of programs that are to use it; this one does."""
    with storage_server() as environment, pytest.MonkeyPatch.context() as patch:
        environment["HF_HOME"] = str(tmp_path_factory.mktemp("home"))
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield environment
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture
def storage(emulator, monkeypatch, tmp_path):  # noqa: ARG001 (has to run)
    """The bucket, empty, and a cache of this test's own."""
    monkeypatch.setattr(buckets, "_cache", lambda: tmp_path / "cache")
    found = buckets.storage()
    for name in found.find(BUCKET):
        found.rm_file(name)
    return found


def names(storage, folder):
    storage.invalidate_cache()
    return sorted(name.removeprefix(f"bucket/{folder}/") for name in storage.find(f"{BUCKET}/{folder}"))


class TestAddress:
    @pytest.mark.parametrize("address", ["s3://bucket/x", "file:///x", "https://host/x", "hf://datasets/x"])
    def test_of_another_kind(self, address):
        with pytest.raises(ValueError, match="expected a path of this machine or gs://BUCKET/PATH"):
            location(address)

    @pytest.mark.parametrize("address", ["gs://", "gs:///"])
    def test_of_no_bucket(self, address):
        with pytest.raises(ValueError, match=r"^expected gs://BUCKET/PATH$"):
            location(address)

    def test_needs_its_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(ValueError, match=re.escape('pip install "moebius-jax[gcs]"')):
            location("gs://bucket/x")

    def test_of_this_machine(self, tmp_path):
        assert location(str(tmp_path)) == tmp_path

    def test_storage_is_epaths_own(self, storage):
        """Or either would go by listings from before the other wrote."""
        from etils.epath import backend

        assert backend.fsspec_backend.fs(f"{BUCKET}/x") is storage

    def test_joined(self, tmp_path):
        root = location(f"{BUCKET}/data")
        for name, expected in {
            "a/b.png": f"{BUCKET}/data/a/b.png",
            "../images/b.png": f"{BUCKET}/images/b.png",
            "gs://other/b.png": "gs://other/b.png",
            "/disk/b.png": "/disk/b.png",
        }.items():
            assert str(joined(root, name)) == expected
        assert joined(tmp_path, "../b.png") == tmp_path / "../b.png"
        assert str(joined(tmp_path, "gs://other/b.png")) == "gs://other/b.png"
        for place in (root, tmp_path):
            with pytest.raises(UserError, match=r"^s3://x/b.png: expected a path of this machine or gs://"):
                joined(place, "s3://x/b.png")

    def test_writable(self, storage):
        buckets.require_writable(location(f"{BUCKET}/run"))
        assert names(storage, "run") == []


class TestFetched:
    def test_folder(self, storage):
        storage.pipe(f"{BUCKET}/net/config.json", b"{}")
        storage.pipe(f"{BUCKET}/net/weights/d/x", b"123")
        copy = fetched(f"{BUCKET}/net")
        assert copy.name == "net"
        assert (copy / "weights/d/x").read_bytes() == b"123"

    def test_file(self, storage):
        storage.pipe(f"{BUCKET}/list.jsonl", b"line")
        assert fetched(f"{BUCKET}/list.jsonl").read_bytes() == b"line"

    def test_once_until_it_changes(self, storage, monkeypatch):
        storage.pipe(f"{BUCKET}/net/x", b"1")
        first = fetched(f"{BUCKET}/net")
        with monkeypatch.context() as patch:
            patch.setattr(storage, "get_file", None)
            assert fetched(f"{BUCKET}/net") == first
        storage.pipe(f"{BUCKET}/net/x", b"2")
        assert (fetched(f"{BUCKET}/net") / "x").read_bytes() == b"2"
        assert (first / "x").read_bytes() == b"1"

    def test_interrupted_leaves_no_copy(self, storage, monkeypatch, tmp_path):
        storage.pipe(f"{BUCKET}/net/x", b"1")
        storage.pipe(f"{BUCKET}/net/y", b"1")
        get = storage.get_file

        def failing(source, dest):
            if source.endswith("y"):
                raise OSError("connection reset")
            return get(source, dest)

        monkeypatch.setattr(storage, "get_file", failing)
        with pytest.raises(UserError, match=r"^gs://bucket/net: cannot be reached \(connection reset\)$"):
            fetched(f"{BUCKET}/net")
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]

    def test_several_at_a_time(self, storage, monkeypatch):
        for name in "ab":
            storage.pipe(f"{BUCKET}/net/{name}", name.encode())
        both, get = threading.Barrier(2, timeout=20), storage.get_file
        monkeypatch.setattr(storage, "get_file", lambda *args: both.wait() * 0 or get(*args))
        copy = fetched(f"{BUCKET}/net")
        assert [(copy / name).read_text() for name in "ab"] == ["a", "b"]

    def test_same_content_at_another_place(self, storage):
        for place in "ab":
            storage.pipe(f"{BUCKET}/{place}/net/x", b"1")
        assert fetched(f"{BUCKET}/a/net") != fetched(f"{BUCKET}/b/net")

    def test_another_process_was_faster(self, storage, monkeypatch):
        storage.pipe(f"{BUCKET}/net/x", b"1")
        get = storage.get_file

        def slowly(source, dest):
            monkeypatch.undo()
            fetched(f"{BUCKET}/net")
            get(source, dest)

        cache = buckets._cache()
        monkeypatch.setattr(storage, "get_file", slowly)
        monkeypatch.setattr(buckets, "_cache", lambda: cache)
        assert (fetched(f"{BUCKET}/net") / "x").read_bytes() == b"1"

    def test_name_that_leads_elsewhere(self, storage, tmp_path):
        storage.pipe(f"{BUCKET}/net/a/../../../../escaped", b"1")
        with pytest.raises(UserError, match=r"^gs://bucket/net: holds 'a/.*', which leads out of it$"):
            fetched(f"{BUCKET}/net")
        assert not list(tmp_path.rglob("escaped"))

    @pytest.mark.usefixtures("storage")
    def test_nothing_there(self):
        with pytest.raises(UserError, match=r"^gs://bucket/none: no such file or folder$"):
            fetched(f"{BUCKET}/none")

    def test_network(self, storage, tmp_path, vae_mini):
        from moebius_jax.weights.load import save_network

        save_network(tmp_path / "vae", vae_mini)
        storage.put(f"{tmp_path}/vae", f"{BUCKET}/vae", recursive=True)
        assert load_vae(f"{BUCKET}/vae").config == vae_mini.config
        storage.pipe(f"{BUCKET}/vae/config.json", b"{}")
        with pytest.raises(UserError, match=r"config.json: format: missing field"):
            load_vae(f"{BUCKET}/vae")


class TestArrays:
    def test_rows(self, storage):
        array = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float16)
        with storage.open(f"{BUCKET}/a.npy", "wb") as file:
            np.save(file, array)
        ours = ArrayInBucket(location(f"{BUCKET}/a.npy"))
        assert (ours.shape, ours.dtype) == (array.shape, array.dtype)
        for i in (0, 3, 4, -1):
            np.testing.assert_array_equal(ours[i], array[i])
        np.testing.assert_array_equal(ours.whole(), array)
        with pytest.raises(IndexError):
            ours[5]

    @pytest.mark.parametrize("array", [np.float32(1), np.asfortranarray(np.ones((2, 2))), np.array([{}])])
    def test_of_no_rows(self, storage, array):
        with storage.open(f"{BUCKET}/a.npy", "wb") as file:
            np.save(file, array)
        with pytest.raises(ValueError, match="holds no array of numbers"):
            ArrayInBucket(location(f"{BUCKET}/a.npy"))


class TestData:
    def test_folder_of_images(self, storage, tmp_path):
        draw_photos(tmp_path / "photos", 3)
        storage.put(f"{tmp_path}/photos", f"{BUCKET}/photos", recursive=True)
        augment = AugmentConfig(image_size=64)
        here, there = (
            ImageDataset(Source(path=path, augment=augment))
            for path in (tmp_path / "photos", location(f"{BUCKET}/photos"))
        )
        assert [str(name) for name in there.names] == [f"{BUCKET}/photos/{name.name}" for name in here.names]
        for i in range(3):
            for a, b in zip(
                here.draw(i, rng(i)), pickle.loads(pickle.dumps(there)).draw(i, rng(i)), strict=True
            ):
                np.testing.assert_array_equal(a, b)

    def test_json_lines(self, storage, tmp_path):
        draw_photos(tmp_path / "photos", 2)
        photos = sorted((tmp_path / "photos").iterdir())
        for photo in photos:
            storage.put_file(str(photo), f"{BUCKET}/data/{photo.name}")
        lines = [{"image": photos[0].name}, {"image": f"{BUCKET}/data/{photos[1].name}"}]
        storage.pipe(f"{BUCKET}/data/list.jsonl", "\n".join(map(json.dumps, lines)).encode())
        found = ImageDataset(
            Source(path=location(f"{BUCKET}/data/list.jsonl"), augment=AugmentConfig(image_size=64))
        )
        assert [str(name) for name in found.names] == [f"{BUCKET}/data/{photo.name}" for photo in photos]
        assert found.draw(1, rng(0)).image.shape == (64, 64, 3)

    def test_masks_of_objects(self, storage):
        storage.pipe(f"{BUCKET}/data/a.png", b"")
        storage.pipe(f"{BUCKET}/masks/m.png", b"")
        augment = AugmentConfig(image_size=64, foreground_masks=f"{BUCKET}/masks")
        found = ImageDataset(Source(path=location(f"{BUCKET}/data"), augment=augment))
        assert list(map(str, found._objects)) == [f"{BUCKET}/masks/m.png"]

    def test_broken_image_is_named(self, storage):
        storage.pipe(f"{BUCKET}/x.png", b"no image")
        with pytest.raises(UserError, match=r"^gs://bucket/x.png: not an image of a kind that is read"):
            read_picture(location(f"{BUCKET}/x.png"))
        with pytest.raises(UserError, match=r"^gs://bucket/y.png: no such file$"):
            read_picture(location(f"{BUCKET}/y.png"))

    @pytest.mark.usefixtures("storage")
    @pytest.mark.parametrize("path", ["none", "none.jsonl"])
    def test_nothing_there(self, path):
        with pytest.raises(UserError, match=rf"^gs://bucket/{path}: no such f"):
            ImageDataset(Source(path=location(f"{BUCKET}/{path}")))

    def test_cached_latents(self, storage, tmp_path):
        folder = tmp_path / "latents"
        folder.mkdir()
        generator = rng(0)
        samples = LatentSample(
            *(generator.normal(size=(5, 8, 8, 8)).astype(np.float16) for _ in range(2)),
            hole=generator.random((5, 8, 8)) < 0.5,
            task=np.arange(5, dtype=np.int32) % 2,
        )
        info = CacheInfo(samples=5, side=8, vae="x", made_of={})
        writer = CacheWriter(folder, info, LatentSample(*(leaf[0] for leaf in samples)))
        writer.add(samples)
        writer.close()
        storage.put(str(folder), f"{BUCKET}/latents", recursive=True)
        storage.put(str(folder), f"{BUCKET}/less", recursive=True)
        storage.rm_file(f"{BUCKET}/less/hole.npy")
        with pytest.raises(UserError, match=r"^gs://bucket/less: not a folder .* \(hole.npy is missing\)$"):
            LatentDataset(Source(path=location(f"{BUCKET}/less"), latent_shape=(8, 8, 4)))
        there = Source(path=location(f"{BUCKET}/latents"), latent_shape=(8, 8, 4))
        found = pickle.loads(pickle.dumps(LatentDataset(there)))
        for i in range(5):
            for a, b in zip(found.draw(i, rng(0)), samples, strict=True):
                np.testing.assert_array_equal(a, b[i])
        changed = bytearray(storage.cat_file(f"{BUCKET}/latents/hole.npy"))
        changed[-1] ^= 1
        storage.pipe(f"{BUCKET}/latents/hole.npy", bytes(changed))
        found.draw(3, rng(0))
        with pytest.raises(UserError, match=r"^gs://bucket/latents \(sample 4\): not what was written"):
            found.draw(4, rng(0))


class TestOutbox:
    @pytest.fixture
    def outbox(self, storage):  # noqa: ARG002 (has to run)
        outbox = Outbox(location(f"{BUCKET}/run"))
        yield outbox
        outbox.close()
        assert not outbox.folder.exists()

    def write(self, outbox, *files):
        for name in files:
            (outbox.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (outbox.folder / name).write_text(name)

    def test_sends_what_is_new_or_longer(self, storage, outbox):
        self.write(outbox, "a", "b/c", ".partial-x")
        outbox.send()
        assert names(storage, "run") == ["a", "b/c"]
        (outbox.folder / "a").write_text("a longer one")
        storage.pipe(f"{BUCKET}/run/b/c", b"not sent again")
        outbox.send()
        assert storage.cat_file(f"{BUCKET}/run/a") == b"a longer one"
        assert storage.cat_file(f"{BUCKET}/run/b/c") == b"not sent again"

    @pytest.mark.parametrize("method", ["pipe_file", "rm_file"])
    def test_interrupted_model_is_none(self, storage, outbox, monkeypatch, method):
        """Neither while one is sent, nor while an old one is taken away."""
        marks = {"model/pipeline.json", "model/unet/config.json"}
        model = {*marks, "model/unet/weights/x", "model/unet/weights/z"}
        self.write(outbox, *model)
        if method == "rm_file":
            outbox.send(anew="model")
        with monkeypatch.context() as patch:
            self.fail(patch, storage, method, 2)
            with pytest.raises(UserError, match=r"^gs://bucket/run: cannot be reached \(gone\)$"):
                outbox.send(anew="model")
        assert len(names(storage, "run")) == 2
        assert not marks & set(names(storage, "run"))
        outbox.send(anew="model")
        assert set(names(storage, "run")) == model

    def test_what_says_what_it_is_comes_first_or_last(self, storage, outbox, monkeypatch):
        real, begun, ended = storage.pipe_file, [], []

        def noted(address, *args, **options):
            begun.append((address.removeprefix(f"{BUCKET}/run/"), len(ended)))
            real(address, *args, **options)
            ended.append(address)

        monkeypatch.setattr(storage, "pipe_file", noted)
        self.write(outbox, "z/run.json", "a/config.json", "a/pipeline.json", *"bcdefghijklm")
        outbox.send()
        assert begun[0] == ("z/run.json", 0)
        assert {name for name, _ in begun[1:13]} == {*"bcdefghijklm"}
        assert begun[1][1] == 1  # none began before that was there
        assert begun[13:] == [("a/config.json", 13), ("a/pipeline.json", 14)]  # nor these before all others

    def fail(self, patch, storage, method, at):
        real, calls = getattr(storage, method), []

        def failing(*args, **_):
            calls.append(args)
            if len(calls) > at:
                raise OSError("gone")
            return real(*args)

        patch.setattr(storage, method, failing)

    def test_file_grows_while_it_is_sent(self, storage, outbox, monkeypatch):
        """As TensorBoard's do."""
        self.write(outbox, "events")
        real = storage.pipe_file

        def slowly(address, content):
            with (outbox.folder / "events").open("a") as file:
                file.write(" and more")
            real(address, content)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "pipe_file", slowly)
            outbox.send()
        assert storage.cat_file(f"{BUCKET}/run/events") == b"events"
        outbox.send()
        assert storage.cat_file(f"{BUCKET}/run/events") == b"events and more"

    def test_half_a_model_is_replaced_and_another_s_folder_is_not(self, storage):
        run = location(f"{BUCKET}/run")
        require_room_for_model(run)
        storage.pipe(f"{BUCKET}/run/model/unet/weights/x", b"half")
        require_room_for_model(run)
        storage.pipe(f"{BUCKET}/run/model/notes.txt", b"mine")
        with pytest.raises(UserError, match=r"^gs://bucket/run/model: not replaced, it holds other .*notes"):
            require_room_for_model(run)

    def test_what_is_large_is_sent_from_disk(self, storage, outbox, monkeypatch):
        monkeypatch.setattr(outbox_module, "_AT_ONCE", 3)
        monkeypatch.setattr(storage, "pipe_file", None)
        self.write(outbox, "large")
        outbox.send()
        assert storage.cat_file(f"{BUCKET}/run/large") == b"large"

    def test_old_files_of_a_model_go(self, storage, outbox):
        storage.pipe(f"{BUCKET}/run/model/unet/weights/old", b"x")
        storage.pipe(f"{BUCKET}/run/other", b"x")
        self.write(outbox, "model/pipeline.json")
        outbox.send(anew="model")
        assert names(storage, "run") == ["model/pipeline.json", "other"]

    def test_of_this_machine_is_the_folder(self, tmp_path):
        outbox = Outbox(tmp_path)
        assert outbox.folder == tmp_path
        outbox.send(anew="model")
        outbox.close()
        assert tmp_path.exists()


class TestFolderFor:
    OURS = ("latents.json", "x.npy")

    def fill(self, dest, content="new", **options):
        with folder_for(dest, ours=self.OURS, **options) as folder:
            for name in self.OURS:
                (folder / name).write_text(content)

    @pytest.mark.usefixtures("storage")
    def test_the_same_here_and_there(self, tmp_path):
        for dest in (tmp_path / "cache", location(f"{BUCKET}/cache")):
            self.fill(dest, overwrite=False)
            with pytest.raises(UserError, match=f"^{dest}: exists already"):
                self.fill(dest, overwrite=False)
            self.fill(dest, "newer", overwrite=True)
            assert (dest / "x.npy").read_text() == "newer"
            (dest / "mine.txt").write_text("mine")
            with pytest.raises(UserError, match=r"cache: not replaced, it holds other things .*mine\.txt"):
                self.fill(dest, overwrite=True)
            assert (dest / "latents.json").read_text() == "newer"

    def test_what_was_interrupted_is_none_and_is_replaced(self, storage, monkeypatch):
        dest = location(f"{BUCKET}/cache")
        with monkeypatch.context() as patch:
            real = storage.pipe_file
            patch.setattr(
                storage, "pipe_file", lambda name, data: real(name, data) if "x.npy" in name else 1 / 0
            )
            with pytest.raises(UserError, match="cannot be reached") as failed:
                self.fill(dest, overwrite=False)
        assert names(storage, "cache") == ["x.npy"]
        assert (Path(re.search(r"what was to be sent is in (\S+)", str(failed.value))[1]) / "x.npy").exists()
        self.fill(dest, overwrite=False)
        assert names(storage, "cache") == ["latents.json", "x.npy"]


@pytest.mark.slow
def test_sample_from_bucket_to_bucket(storage, tmp_path, tiny_folder, capsys):
    """What it leaves there is to the byte what it leaves here, and is only replaced where it is ours."""
    for i, photo in enumerate(sorted(draw_photos(tmp_path / "photos", 3).iterdir())):
        grey = np.zeros((80, 96), np.uint8)
        grey[20:40, 10 * i : 10 * i + 30] = 255
        Image.fromarray(grey).save(photo.with_stem(f"{photo.stem}_mask"))
    storage.put(f"{tmp_path}/photos", f"{BUCKET}/photos", recursive=True)

    def run(root, *options):
        folders = (f"--image={root}/photos", f"--mask={root}/photos", f"--output={root}/results")
        usual = (f"--model={tiny_folder}", "--num-inference-steps=2", "--no-compilation-cache", "--grid")
        return sample([*folders, *usual, *options])

    assert run(tmp_path) == run(BUCKET) == 0
    here = sorted((tmp_path / "results").iterdir())
    assert names(storage, "results") == [file.name for file in here]
    for file in here:
        assert storage.cat_file(f"{BUCKET}/results/{file.name}") == file.read_bytes()
    storage.rm_file(f"{BUCKET}/results/00_grid.png")
    storage.rm_file(f"{BUCKET}/results/01.png")
    storage.put_file(f"{tmp_path}/photos/02.png", f"{BUCKET}/results/02.png")
    capsys.readouterr()
    assert run(BUCKET) == 0
    assert "2 of 3 results exist already" in capsys.readouterr().out
    assert names(storage, "results") == [file.name for file in here]
    assert run(BUCKET, "--overwrite") == 1
    err = capsys.readouterr().err
    assert f"1 not done:\n  {BUCKET}/results/02.png: not replaced, it is no picture we wrote" in err
    assert storage.cat_file(f"{BUCKET}/results/02.png") == (tmp_path / "photos/02.png").read_bytes()


@pytest.mark.slow
def test_evaluate_in_a_bucket(storage, tmp_path, tiny_pipeline, tiny_folder, capsys, monkeypatch):
    """Painted there, gone on with, and scored; its results are to the byte those of a run on this machine."""
    monkeypatch.setattr("moebius_jax.cli.evaluate.load_pipeline", lambda *_: tiny_pipeline)
    storage.put(f"{draw_photos(tmp_path / 'photos', 3)}", f"{BUCKET}/photos", recursive=True)

    def run(root, *options):
        folders = ("custom", f"--images={root}/photos", f"--output={root}/out", "--size=64")
        usual = (f"--model={tiny_folder}", "--num-inference-steps=2", "--no-compilation-cache")
        return evaluate([*folders, *usual, "--metrics", "l1", *options])

    assert run(tmp_path) == run(BUCKET) == 0
    out = capsys.readouterr().out
    assert f"report: {BUCKET}/out/report.html" in out
    assert f"{BUCKET}/out/results: painted 3" in out
    document = json.loads(storage.cat_file(f"{BUCKET}/out/report.json"))
    assert document["sources"]["masks"]["folder"] == f"{BUCKET}/out/masks"
    assert document["sources"]["images"]["folder"] == f"{BUCKET}/photos"
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*") if f.is_file()}
    assert {"results/run.json", "report.html", "results/scores.csv", "results/00.png", "masks/00.png"} < files
    assert set(names(storage, "out")) == {name for name in files if not Path(name).name.startswith(".")}
    results = sorted(name for name in files if name.endswith((".png", ".csv", "run.json")))
    for name in results:
        assert storage.cat_file(f"{BUCKET}/out/{name}") == (tmp_path / "out" / name).read_bytes()
    for name in ("results/01.png", "report.html", "masks/masks.json"):  # as if it had been killed in between
        storage.rm_file(f"{BUCKET}/out/{name}")
    assert run(BUCKET) == 0
    assert "painted 1" in capsys.readouterr().out
    assert "masks/masks.json" in names(storage, "out")
    assert set(names(storage, "out")) >= {"results/01.png", "report.html"}
    assert run(BUCKET, "--seed=3") == 1
    assert (
        f"error: {BUCKET}/out/results: holds results with seed 0, asked for is 3" in capsys.readouterr().err
    )
    score = ["score", f"--pred={BUCKET}/out/results", f"--gt={BUCKET}/photos", "--metrics", "l1"]
    assert evaluate(score) == 1
    assert f"error: {BUCKET}/out/results/00.png: the result is 64 x 64 pixels" in capsys.readouterr().err
    assert evaluate([*score, f"--gt={BUCKET}/none", "--beside=nothing"]) == 1
    assert "error: beside is 'nothing'" in capsys.readouterr().err  # before anything is copied
    assert evaluate([*score, f"--output={BUCKET}/photos/x"]) == 1
    assert f"error: {BUCKET}/photos/x: is in the folder of inputs" in capsys.readouterr().err


@pytest.mark.usefixtures("storage")
class TestElsewhere:
    def test_what_is_done_is_kept_whatever_ends_it(self, storage):
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))

        def work():
            with worked_on_here(args):
                (args.output / "a.txt").write_text("done")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            work()
        assert names(storage, "out") == ["a.txt"]
        assert not args.output.exists()

    def test_results_are_sent_now_and_then(self, storage, monkeypatch):
        monkeypatch.setattr(elsewhere, "_EVERY_S", -1.0)
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))
        with worked_on_here(args) as here:
            for i in here.sending(lambda items, **_: items)(range(3), desc="x"):
                assert len(names(storage, "out")) == i
                (args.output / f"{i}.txt").write_text("done")

    def test_sigterm_ends_it_as_well(self, storage):
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))
        before = signal.getsignal(signal.SIGTERM)

        def work():
            with worked_on_here(args):
                (args.output / "a.txt").write_text("done")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

        with pytest.raises(SystemExit) as ended:
            work()
        assert ended.value.code == 143
        assert names(storage, "out") == ["a.txt"]
        assert signal.getsignal(signal.SIGTERM) is before

    @pytest.mark.parametrize("trouble", [None, UserError("broken"), KeyboardInterrupt()])
    def test_what_cannot_be_sent_stays_here(self, storage, monkeypatch, capsys, trouble):
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))

        def work():
            with worked_on_here(args):
                (args.output / "a.txt").write_text("done")
                monkeypatch.setattr(storage, "pipe_file", lambda *_, **__: 1 / 0)
                if trouble:
                    raise trouble

        expected = KeyboardInterrupt if isinstance(trouble, KeyboardInterrupt) else UserError
        with pytest.raises(expected) as caught:
            work()
        told = capsys.readouterr().err if trouble else str(caught.value)
        assert f"what was to be sent is in {args.output}" in told
        assert (args.output / "a.txt").read_text() == "done"
        shutil.rmtree(args.output)

    def test_a_bad_moment_is_waited_for(self, storage, monkeypatch):
        monkeypatch.setattr(elsewhere, "_EVERY_S", -1.0)
        args, send = argparse.Namespace(output=location(f"{BUCKET}/out")), storage.pipe_file

        def work():
            with worked_on_here(args) as here:
                for i in here.sending(lambda items, **_: items)(range(2), desc="x"):
                    (args.output / f"{i}.txt").write_text("done")
                    monkeypatch.setattr(storage, "pipe_file", send if i else lambda *_, **__: 1 / 0)

        with pytest.warns(UserWarning, match="it is sent with what comes next"):
            work()
        assert names(storage, "out") == ["0.txt", "1.txt"]

    def test_another_evaluation_of_the_same_name_is_refused(self, storage):
        def work(theirs):
            args = argparse.Namespace(output=location(f"{BUCKET}/{theirs}"))
            with worked_on_here(args):
                for name in ("a.png", "run.json"):
                    (args.output / name).write_text("seed 0")
                storage.pipe_file(f"{BUCKET}/{theirs}/run.json", theirs.encode())  # meanwhile
            return args.output

        work("seed 0")
        assert names(storage, "seed 0") == ["a.png", "run.json"]
        with pytest.raises(UserError, match=r"run\.json: exists already; another process .* is in") as caught:
            work("seed 3")
        assert names(storage, "seed 3") == ["run.json"]  # ours would have been the first to go
        shutil.rmtree(str(caught.value).rpartition(" ")[2])

    def test_half_of_what_is_being_taken_is_not_sent(self, storage, monkeypatch):
        storage.pipe_file(f"{BUCKET}/out/a.png", b"whole")
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))

        def half(_, dest):
            Path(dest).write_bytes(b"wh")
            raise KeyboardInterrupt

        monkeypatch.setattr(storage, "get_file", half)
        with pytest.raises(KeyboardInterrupt), worked_on_here(args):
            pass
        assert storage.cat_file(f"{BUCKET}/out/a.png") == b"whole"

    def test_what_was_taken_is_not_sent_nor_what_is_hidden(self, storage, monkeypatch):
        storage.pipe_file(f"{BUCKET}/out/a.png", b"whole")
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))
        with worked_on_here(args):
            assert (args.output / "a.png").read_bytes() == b"whole"
            (args.output / ".partial-x").mkdir()
            (args.output / ".partial-x" / "b.png").write_bytes(b"ha")
            monkeypatch.setattr(storage, "pipe_file", lambda *_, **__: 1 / 0)
        assert names(storage, "out") == ["a.png"]

    @pytest.mark.parametrize(
        ("there", "message"),
        [("out/../../x", "leads out of it"), ("out", "gs://bucket/out: is a file, expected a folder")],
    )
    def test_what_is_there_does_not_fit(self, storage, there, message):
        storage.pipe_file(f"{BUCKET}/{there}", b"x")
        args = argparse.Namespace(output=location(f"{BUCKET}/out"))
        with pytest.raises(UserError, match=message), worked_on_here(args):
            pass

    def test_a_folder_beside_the_inputs(self, storage):
        storage.pipe_file(f"{BUCKET}/photos/a.png", b"x")
        args = argparse.Namespace(output=location(f"{BUCKET}/photos2"), images=location(f"{BUCKET}/photos"))
        with worked_on_here(args, "images"):
            assert (args.images / "a.png").is_file()

    def test_names_and_what_is_not_elsewhere(self, tmp_path):
        args = argparse.Namespace(output=tmp_path, masks=None)
        with worked_on_here(args, "masks"):
            assert (args.output, args.masks) == (tmp_path, None)
        args = argparse.Namespace(output=None, masks=location(f"{BUCKET}/none"))
        with pytest.raises(UserError, match="gs://bucket/none: no such file"), worked_on_here(args, "masks"):
            pass


def test_an_object_of_anothers_is_not_replaced(storage):
    """Also where a listing from before it was written says that there is none."""
    path = location(f"{BUCKET}/results/a.png")
    storage.pipe(f"{BUCKET}/results/b.png", b"x")
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]
    with ThreadPoolExecutor(1) as other:  # which has its own view of the bucket
        other.submit(lambda: type(storage)(skip_instance_cache=True).pipe(str(path), b"theirs")).result()
    with pytest.raises(UserError, match=r"a\.png: exists already"):
        write_image(path, Image.new("RGB", (4, 4)), overwrite=False)
    assert storage.cat_file(str(path)) == b"theirs"


@pytest.mark.parametrize(
    ("image", "output", "message"),
    [
        ("gs://bucket/nothing", "gs://bucket/out", "gs://bucket/nothing: no such image file or folder"),
        (
            "gs://bucket/photo.png",
            "gs://bucket/photo.png",
            "gs://bucket/photo.png: the result would have the",
        ),
        ("s3://bucket/photo.png", "out.png", "expected a path of this machine or gs://BUCKET/PATH"),
    ],
)
def test_sample_with_wrong_places(storage, tmp_path, capsys, image, output, message):
    draw_photos(tmp_path / "photos", 1)
    for name in ("photo", "mask"):
        storage.put_file(f"{tmp_path}/photos/00.png", f"{BUCKET}/{name}.png")
    try:
        status = sample([f"--image={image}", f"--mask={BUCKET}/mask.png", f"--output={output}"])
    except SystemExit as error:
        status = error.code
    assert status
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_latents_are_cached_into_a_bucket(storage, tmp_path, capsys):
    data = f"data.path={draw_photos(tmp_path / 'photos', 2)}"
    for root in (tmp_path, BUCKET):
        assert cache_latents(["tests/tiny_run.py", f"{root}/latents", data, "--draws=1"]) == 0
    assert f"2 samples of 2 images: {BUCKET}/latents" in capsys.readouterr().out
    for name in names(storage, "latents"):
        assert storage.cat_file(f"{BUCKET}/latents/{name}") == (tmp_path / "latents" / name).read_bytes()
    assert len(names(storage, "latents")) == len(list((tmp_path / "latents").iterdir()))


def rng(seed):
    return np.random.default_rng(seed)


def train(emulator, *arguments):
    """Status and what it said."""
    program = [sys.executable, "train.py", "tests/tiny_run.py", *map(str, arguments)]
    environment = os.environ | emulator
    del environment["EPATH_USE_TF"]  # the programs see to it
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["FAST_COMPILE"]}
    done = subprocess.run(
        program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.long
def test_run_in_a_bucket(emulator, storage, tmp_path):
    """Stopped, gone on from after its newest checkpoint was damaged, equal to one that lies here."""
    draw_photos(tmp_path / "photos", 6)
    storage.put(f"{tmp_path}/photos", f"{BUCKET}/photos", recursive=True)
    common = ("loss.terms=task", "data.kind=images", "checkpoint.every=2", "log.every=1")
    here = (*common, f"data.path={tmp_path}/photos", "--workdir", tmp_path / "run")
    there = (*common, f"data.path={BUCKET}/photos", "--workdir", f"{BUCKET}/run")
    assert train(emulator, *here, "steps=6")[0] == 0
    status, err = train(emulator, *there, "steps=4")
    assert status == 0, err
    assert {"config.json", "model/pipeline.json"} < set(names(storage, "run"))
    assert any("tfevents" in name for name in names(storage, "run"))
    assert "finished: gs://bucket/run/model" in err
    inside = [name for name in names(storage, "run") if name.startswith("checkpoints/step_4/state/")]
    for name in inside:
        storage.rm_file(f"{BUCKET}/run/{name}")
    status, err = train(emulator, *there, "steps=6")
    assert status == 0, err
    assert "checkpoints/step_4: damaged, going back to the one before" in err
    assert "going on from step 2 of gs://bucket/run" in err
    assert any(name.startswith("damaged_step_4") for name in names(storage, "run"))
    assert any(name.startswith("checkpoints/step_4/state/") for name in names(storage, "run"))  # made anew
    model = find_model(f"{BUCKET}/run/model", variant=None, vae=None, cache_dir=None, track=lambda x, **_: x)
    ours, expected = load_numpy(model.unet), load_numpy(tmp_path / "run/model/unet")
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value)
    for change, was in {"seed=1": "seed=0", "student.prediction_type=v_prediction": "epsilon"}.items():
        status, err = train(emulator, *there, "steps=6", change)
        assert status == 1
        last = err.strip().splitlines()[-1]
        assert re.match(
            rf"error: {BUCKET}/run/checkpoints/step_6: of a run with .*{was}; this one has", last
        ), err


@pytest.mark.long
def test_two_processes_in_a_bucket(emulator, storage):
    """Each writes its part; what is damaged is put aside once, and both go on from the one before."""

    def both(steps):
        address = f"127.0.0.1:{free_port()}"
        common = ["--workdir", f"{BUCKET}/run", "--coordinator", address, "--num-processes", 2]
        common += ["fsdp=2", "checkpoint.every=2", f"steps={steps}"]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda i: train(emulator, *common, "--process-id", i), range(2)))

    for status, err in both(4):
        assert status == 0, err
    damaged = [name for name in names(storage, "run") if name.startswith("checkpoints/step_4/state/")]
    assert any("process_1" in name for name in damaged)
    for name in damaged:
        storage.rm_file(f"{BUCKET}/run/{name}")
    (status, err), (other, errors) = both(6)
    assert (status, other) == (0, 0), err + errors
    assert "checkpoints/step_4: damaged, going back to the one before" in err
    assert "going on from step 2 of gs://bucket/run" in err
    found = names(storage, "run")
    assert len({name.split("/")[0] for name in found if name.startswith("damaged_step_4")}) == 1
    for expected in ("checkpoints/step_4/state/", "checkpoints/step_6/state/", "model/pipeline.json"):
        assert any(name.startswith(expected) for name in found)
