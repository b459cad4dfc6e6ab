"""Pictures, released files, folders and outputs made to break things, each of which once did."""

import fcntl
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import synth
import torch
from hostile import limit, png, refused  # noqa: F401 (a fixture)
from PIL import Image
from safetensors.numpy import save_file

from moebius_jax import UserError
from moebius_jax.cli.masks import main as masks
from moebius_jax.cli.sample import main as sample
from moebius_jax.cli.terminal import run
from moebius_jax.data.augment import AugmentConfig, draw_sample
from moebius_jax.data.records import Record
from moebius_jax.files import partial_of, replace_when_complete, sole_user
from moebius_jax.imaging.picture import read_picture, write_image
from moebius_jax.inpaint.pairing import plan_tasks
from moebius_jax.inpaint.stream import InpaintOptions, Item, inpaint_stream
from moebius_jax.weights import checksums, convert_file
from moebius_jax.weights.convert import is_converted
from moebius_jax.weights.folder import load_numpy
from moebius_jax.weights.release_files import open_release_file

TINY = Path(str(files("moebius_jax") / "tiny"))
ROOT = Path(__file__).parents[1]


def png_header(width, height):
    """A picture that claims a size and holds no pixels."""

    def chunk(kind, content):
        size, check = (struct.pack(">I", n) for n in (len(content), zlib.crc32(kind + content)))
        return size + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


class TestPictures:
    def test_pipes_and_devices_are_not_read(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        for name in ("pipe.png", "zero.png"):
            refused("no ordinary file", read_picture, tmp_path / name)

    def test_giant_files_are_not_read(self, tmp_path):
        with (tmp_path / "a.png").open("wb") as file:
            file.truncate(2**31 + 1)  # takes no room on the disk
        refused("2,147,483,649 bytes", read_picture, tmp_path / "a.png")

    def test_claimed_sizes(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(png_header(2**30, 2**30))
        refused("a.png: unreadable image", read_picture, path)
        path.write_bytes(png_header(13_000, 13_000))
        record, rng = Record(image=path), np.random.default_rng(0)
        refused("169 megapixels", draw_sample, record, AugmentConfig(), [], rng)

    def test_narrow_pictures_are_no_samples(self, tmp_path):
        record, rng = Record(image=png(tmp_path / "a.png", (3000, 2))), np.random.default_rng(0)
        refused("3000 x 2 pixels", draw_sample, record, AugmentConfig(), [], rng)

    def test_other_programs_files_are_kept(self, tmp_path):
        path = png(tmp_path / "a.png")
        before, ours = path.read_bytes(), Image.new("RGB", (8, 8))
        refused("a.png: not replaced, it is no picture we wrote", write_image, path, ours, overwrite=True)
        assert path.read_bytes() == before
        for name in ("b.png", "b.jpg", "b.webp", "b.tif", "b.bmp"):
            write_image(tmp_path / name, ours, overwrite=False)
            write_image(tmp_path / name, ours, overwrite=True)

    def test_formats_without_room(self, tmp_path):
        wide = Image.new("RGB", (17_000, 2))
        refused(r"\.webp has room for 16383", write_image, tmp_path / "a.webp", wide, overwrite=False)
        assert not list(tmp_path.iterdir())

    def test_a_hole_too_large_is_one_problem_of_many(self, tiny_pipeline):
        long = np.zeros((2, 20_000, 3), np.uint8)
        items = [Item(rgb=long, mask=np.full(long.shape[:2], 255, np.uint8), name="long.png")]
        (result,) = inpaint_stream(tiny_pipeline.sampler, items, InpaintOptions(), None, batch_size=1)
        assert "long.png: the hole and what is around it need a square of 20000" in str(result.error)


class TestPairing:
    def plan(self, image, mask, output):
        return plan_tasks(image, mask, output, seed=0, num_samples=1)

    def test_no_photograph_is_a_result(self, tmp_path):
        for name in ("cat.jpg", "cat.png"):
            png(tmp_path / name)
        mask = png(tmp_path.parent / f"{tmp_path.name}_mask.png")
        refused("cat.png: the result would have the name of an input", self.plan, tmp_path, mask, tmp_path)

    def test_an_image_is_not_its_own_mask(self, tmp_path):
        png(tmp_path / "a.png")
        png(tmp_path / "a_mask.png")
        tasks, _ = self.plan(tmp_path / "a.png", tmp_path, tmp_path / "out")
        assert tasks[0].mask.name == "a_mask.png"

    def test_a_loop_of_links_is_one_problem_of_many(self, tmp_path):
        (tmp_path / "in").mkdir()
        image = png(tmp_path / "in/a.png")
        (tmp_path / "in/b.png").symlink_to("b.png")
        tasks, _ = self.plan(tmp_path / "in", image, tmp_path / "out")
        assert [task.image.name for task in tasks] == ["a.png", "b.png"]
        refused("b.png: unreadable image", read_picture, tmp_path / "in/b.png")
        (tmp_path / "loop").symlink_to("loop")
        refused("loop.*links", self.plan, image, image, tmp_path / "loop")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--num-samples", 10**9, "--num-samples is 1000000000; expected 10000 or fewer"),
        ("--model", "", "--model is empty"),
        ("--image", "x" * 300 + ".png", "File name too long"),
        ("--mask-dilation", -1, "mask_dilation is -1"),
    ],
)
def test_options_of_sample(tmp_path, capsys, option, value, message):
    image = png(tmp_path / "a.png")
    given = {"--image": image, "--mask": image, "--output": tmp_path / "o.png", "--model": "tiny"}
    given[option] = value
    assert sample([str(x) for pair in given.items() for x in pair]) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("option", ["--size", "--count"])
def test_sizes_of_mask_sets(tmp_path, capsys, option):
    argv = ["lama_thin", "--output", str(tmp_path / "m"), "--count", "1", option, str(2**70)]
    assert masks(argv) == 1
    assert f"{option[2:]} is {2**70}; expected " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class TestOutputs:
    def test_names_no_file_can_have(self, capsys):
        def program():
            raise OSError(36, "File name too long", "x" * 300)

        assert run(program) == 1
        assert capsys.readouterr().err.startswith("error: xxx")

    @pytest.mark.slow
    @pytest.mark.parametrize(("to", "status"), [("| head -c 0", 141), ("> /dev/full", 1)])
    def test_nobody_reads_it(self, to, status):
        command = f"{sys.executable} train.py tests/tiny_run.py --print-config {to}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == status
        assert "Traceback" not in done.stderr


class TestReplacing:
    def test_a_killed_replacement_is_undone(self, tmp_path):
        """Between its two renamings nothing bears the name; the next process puts it back."""
        dest, dead = tmp_path / "model", subprocess.Popen(["true"])
        dead.wait()
        partial = partial_of(dest)
        old = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-") + ".old")
        old.mkdir()
        (old / "weights").write_text("precious")
        with (
            pytest.raises(UserError, match="exists already"),
            replace_when_complete(dest, overwrite=False, ours=("weights",)),
        ):
            pass
        assert (dest / "weights").read_text() == "precious"
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def test_kinds_are_not_exchanged(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("x")
        os.mkfifo(tmp_path / "pipe")
        kinds = {"folder": ((), "a folder"), "file": (("a",), "a file"), "pipe": ((), "no ordinary")}
        for name, (ours, found) in kinds.items():
            with (
                pytest.raises(UserError, match=f"{name}: not replaced, it is {found}"),
                replace_when_complete(tmp_path / name, overwrite=True, ours=ours),
            ):
                pass

    def test_one_process_a_folder(self, tmp_path):
        with sole_user(tmp_path):
            refused("another process is using this folder", sole_user(tmp_path).__enter__)
        with sole_user(tmp_path):
            pass

    def test_a_new_folder_that_stays_empty_is_not_left(self, tmp_path):
        with sole_user(tmp_path / "new"):
            refused("another process is using this folder", sole_user(tmp_path / "new").__enter__)
            assert (tmp_path / "new").exists()
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("made_anew", [False, True])
    def test_a_folder_that_went_while_it_was_being_locked(self, tmp_path, monkeypatch, made_anew):
        real, lock = fcntl.flock, tmp_path / "new" / ".lock"

        def late(*arguments):
            lock.unlink()
            if made_anew:
                lock.touch()
            real(*arguments)

        monkeypatch.setattr(fcntl, "flock", late)
        refused("another process is using this folder", sole_user(tmp_path / "new").__enter__)

    def test_other_folders_stay(self, tmp_path):
        (tmp_path / "others").mkdir()
        with sole_user(tmp_path / "others"), sole_user(tmp_path / "used"):
            (tmp_path / "used" / "file").touch()
        assert (tmp_path / "others").is_dir()
        assert (tmp_path / "used" / "file").exists()


class TestReleaseFiles:
    @pytest.mark.parametrize(
        "content",
        [
            *(b"junk", b"a", b"PK\x03\x04junk", pickle.dumps([1])),
            *(b"\x80\x02.", b"\x80\x02\x87.", b"\x80\x02}]Ns."),  # pickles of nothing
        ],
    )
    def test_bytes_that_are_none(self, tmp_path, content):
        (tmp_path / "f.bin").write_bytes(content)
        refused("f.bin: ", open_release_file, tmp_path / "f.bin")

    def test_a_damaged_part_of_an_archive(self, tmp_path):
        """torch maps a tensor's bytes without a look at the archive's checksum of them."""
        path = tmp_path / "f.bin"
        torch.save({"a": torch.full((1000,), 7.0)}, path)
        content = bytearray(path.read_bytes())
        content[content.index(np.float32(7).tobytes() * 3) + 4] ^= 1
        path.write_bytes(content)
        refused("data/0 is damaged", open_release_file, path)

    def test_a_few_bytes_repeated_for_gigabytes(self, tmp_path):
        torch.save({"a": torch.zeros(1).expand(2**30)}, tmp_path / "f.bin")
        refused(r"tensor a of \[1073741824\] is stored in 4 bytes", open_release_file, tmp_path / "f.bin")
        one = torch.zeros(100_000)
        torch.save({f"a{i}": one for i in range(100)}, tmp_path / "g.bin")
        refused("claims to hold 40,000,000 bytes", open_release_file, tmp_path / "g.bin")

    @pytest.mark.parametrize("content", [{"a": []}, {"a": 1}, {1: "b"}])
    def test_maps_of_moving_averages(self, tmp_path, content):
        torch.save({"ema_buffers": {"b": torch.zeros(1)}, "ema_name_map": content}, tmp_path / "f.bin")
        refused("ema_name_map maps", open_release_file, tmp_path / "f.bin")

    @pytest.mark.parametrize("number", [2000, 10**9])
    def test_layers_with_gaps(self, tmp_path, number):
        state = synth.state_dict("vae_mini")
        state[f"encoder.down_blocks.0.resnets.{number}.conv1.weight"] = np.zeros(3, np.float32)
        save_file(state, tmp_path / "f.safetensors")
        refused("and one of a higher number", convert_file, tmp_path / "f.safetensors", tmp_path / "out")

    def test_a_source_inside_its_destination(self, tmp_path):
        (tmp_path / "out").mkdir()
        source = tmp_path / "out/f.safetensors"
        save_file(synth.state_dict("vae_mini"), source)
        refused("lies in", convert_file, source, tmp_path / "out", overwrite=True)
        assert source.exists()

    def test_names_that_are_no_text_and_going_on(self, tmp_path):
        source, out = tmp_path / os.fsdecode(b"\xff.safetensors"), tmp_path / "out"
        save_file(synth.state_dict("vae_mini"), tmp_path / "f.safetensors")
        (tmp_path / "f.safetensors").rename(source)
        assert not is_converted(source, out, dtype="float32")
        convert_file(source, out)
        load_numpy(out)
        assert is_converted(source, out, dtype="float32")
        assert not is_converted(source, out, dtype="float16")

    def test_pipes_among_the_weights(self, tmp_path):
        shutil.copytree(TINY / "vae", tmp_path / "vae")
        (tmp_path / "vae" / checksums.FILE).unlink()
        (tmp_path / "vae/weights/manifest.ocdbt").unlink()
        os.mkfifo(tmp_path / "vae/weights/manifest.ocdbt")
        refused("manifest.ocdbt: is no ordinary file", load_numpy, tmp_path / "vae")
