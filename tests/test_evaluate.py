"""`evaluate.py` as a person types it: a small model, small pictures, from images to report."""

import csv
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy import ndimage
from test_metrics import pictures

import moebius_jax
from moebius_jax import MoebiusInpaintPipeline, UserError
from moebius_jax.cli import evaluate as evaluation_program
from moebius_jax.cli.evaluate import main
from moebius_jax.cli.masks import main as draw_masks
from moebius_jax.evaluation import existing, paint, run
from moebius_jax.evaluation.benchmark import BenchmarkSettings
from moebius_jax.evaluation.cases import list_pictures
from moebius_jax.evaluation.protocols import PROTOCOLS
from moebius_jax.evaluation.published import GUIDANCE, QUALITY
from moebius_jax.files import partial_of
from moebius_jax.imaging.grid import write_grid
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions
from moebius_jax.weights.tensors import digest

ROOT = Path(__file__).parents[1]
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # come with scikit-image
HALF, ANY = (0.4, 0.5), (0, 1)
SIZE = 96  # larger than the tiny model's square of 64
QUICK = ("--metrics", "psnr", "l1", "--num-inference-steps", "2", "--no-compilation-cache")


@pytest.fixture
def images(tmp_path):
    """Five pictures of three sizes, one in a subfolder, one with an alpha channel."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    found = pictures(5, size=160)
    Image.fromarray(found[0]).save(folder / "a.png")
    Image.fromarray(found[1][:, :120]).save(folder / "b.jpg")
    Image.fromarray(found[2]).resize((SIZE, SIZE)).save(folder / "c.png")
    Image.fromarray(found[3]).save(folder / "more/a.png")
    Image.fromarray(np.dstack([found[4], found[4][..., :1]])).save(folder / "z.png")
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    """The tiny pipeline on eight devices, loaded once."""
    return MoebiusInpaintPipeline.from_pretrained(tiny_folder)


@pytest.fixture
def evaluate(images, loaded, tiny_folder, tmp_path, capsys, monkeypatch):
    """Runs evaluate.py on the tiny pipeline; returns status, stdout and stderr."""
    monkeypatch.setattr("moebius_jax.cli.evaluate.load_pipeline", lambda *_: loaded)

    def run(*arguments, protocol="custom", output="out", quick=QUICK):
        common = ("--images", images, "--model", tiny_folder, "--size", SIZE, "--output", tmp_path / output)
        status = main([str(a) for a in (protocol, *common, *quick, *arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def shown(monkeypatch):
    """What reports show of a picture: functions from a name to original, result and hole, in their order."""
    found = []
    for program in (run, existing):
        make = program.case_loader
        monkeypatch.setattr(
            program, "case_loader", lambda *a, make=make, **k: found.append(make(*a, **k)) or found[-1]
        )
    return found


def report(folder):
    return json.loads((folder / "report.json").read_text())


def dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def results(folder):
    """The pictures of a folder; not the hidden one that a killed process was writing."""
    files = sorted(f for f in folder.rglob("*.png") if not f.name.startswith("."))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.slow
class TestBenchmark:
    def test_from_images_to_report(self, evaluate, images, tiny_pipeline, tmp_path, inception_folder):
        out = tmp_path / "out"
        status, text, _ = evaluate(
            "--metrics", "fid", "ids", "lpips", "psnr", "ssim", "l1", "--small-fid",
            "--inception", inception_folder / "converted",
        )  # fmt: skip
        assert status == 0
        assert "painted 5 in" in text
        assert sorted(results(out / "results")) == ["a.png", "b.png", "c.png", "more/a.png", "z.png"]
        for name in results(out / "results"):
            result = np.asarray(Image.open(out / "results" / name))
            hole = np.asarray(Image.open(out / "masks" / name).convert("L")) > 127
            assert result.shape == (SIZE, SIZE, 3)
            if name == "c.png":  # of the protocol's size: taken as it is, and kept outside the hole
                truth = np.asarray(Image.open(images / name))
                same = (result == truth).all(-1)
                # The soft edge: 4 pixels of the model's 64, here of 96.
                assert same[ndimage.distance_transform_edt(~hole) > 4 * SIZE / 64].all()
                assert same[hole].mean() < 0.5
        document = report(out)
        assert document["runs"][0]["all"]["count"] == 5
        keys = ("fid", "p_ids", "u_ids", "lpips_alex", "lpips_vgg", "psnr", "ssim", "l1")
        for key in keys:
            assert isinstance(document["runs"][0]["all"][key]["whole"], float)
            assert isinstance(document["runs"][0]["all"][key]["hole"], float)
            assert key in document["methods"]
        assert sum(row["count"] for row in document["runs"][0]["bins"]) == 5
        # All it takes to repeat it.
        sources = document["sources"]
        assert sources["model"]["unet_sha256"] == digest(tiny_pipeline.unet)
        assert sources["model"]["vae_sha256"] == digest(tiny_pipeline.vae)
        assert sources["masks"]["sha256"] == sources["masks"]["set_sha256"]
        assert sources["masks"]["set_kind"] == "mat_large"
        assert sources["images"]["count"] == 5
        assert len(sources["inception"]["sha256"]) == 64
        assert document["versions"]["jax"]
        assert document["runs"][0]["settings"]["sampling"]["num_inference_steps"] == 2
        assert document["command"][:3] == ["python", "evaluate.py", "custom"]
        with (out / "results/scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["a", "b", "c", "more/a", "z"]
        mean = np.mean([float(row["l1_hole"]) for row in rows])
        assert mean == pytest.approx(document["runs"][0]["all"]["l1"]["hole"], rel=1e-4)
        markdown = (out / "report.md").read_text()
        assert "| FID ↓ |" in markdown
        assert sources["masks"]["sha256"] in markdown

    def test_again_paints_nothing_and_scores_the_same(self, evaluate, tmp_path):
        evaluate()
        first = report(tmp_path / "out")
        status, out, _ = evaluate()
        assert status == 0
        assert "5 of 5 results exist already" in out
        assert report(tmp_path / "out")["runs"][0]["all"] == first["runs"][0]["all"]

    def test_stopped_and_continued_is_the_same_to_the_bit(self, evaluate, tmp_path):
        evaluate("--batch-size", 8)
        whole = results(tmp_path / "out")
        evaluate("--batch-size", 8, "--sample-only", output="resumed")
        for name in ("results/b.png", "results/z.png"):
            (tmp_path / "resumed" / name).unlink()
        status, out, _ = evaluate("--batch-size", 8, output="resumed")
        assert status == 0
        assert "3 of 5 results exist already" in out
        assert results(tmp_path / "resumed") == whole
        a, b = report(tmp_path / "out"), report(tmp_path / "resumed")
        assert a["runs"][0]["all"] == b["runs"][0]["all"]

    @pytest.mark.long
    def test_killed_and_continued(self, tiny_folder, tmp_path):
        """Photographs: a process of its own, killed with -9 while it paints, continued by two at once."""
        images, out = tmp_path / "photos", tmp_path / "out"
        images.mkdir()
        for name in PHOTOS:
            photo = getattr(skimage.data, name)()
            for i in range(6):
                Image.fromarray(photo[40 * i :, 60 * i :]).save(images / f"{name}_{i}.jpg", quality=95)
        arguments = (
            "custom", "--images", images, "--model", tiny_folder, "--size", SIZE, "--output", out, *QUICK,
            "--batch-size", 1, "--num-inference-steps", 40,
        )  # fmt: skip
        environment = {**os.environ, "XLA_FLAGS": os.environ["FAST_COMPILE"], "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "evaluate.py", *map(str, arguments)], cwd=ROOT, env=environment
        )
        # What an earlier process, killed in the middle of a write, may have left.
        remains = out / "results" / partial_of(images).name.replace(str(os.getpid()), str(dead_process()))
        remains.parent.mkdir(parents=True)
        remains.write_bytes(b"half")
        until = time.time() + 240
        while not results(out / "results") and time.time() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        painted = results(out / "results")
        assert 0 < len(painted) < 24
        for data in painted.values():
            assert data.endswith(b"IEND\xaeB`\x82")  # whole files only
        whole = tuple(tmp_path / "whole" if a == out else a for a in arguments)
        processes = [
            subprocess.Popen(
                [sys.executable, "evaluate.py", *map(str, a)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for a in (arguments, (*arguments, "--sample-only"), whole)
        ]
        ended = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], ended
        for text, _ in ended[:2]:
            assert "of 24 results exist already" in text
        assert report(out)["runs"][0]["all"]["count"] == 24
        # To the bit what a run without an end in between makes.
        assert results(out / "results") == results(tmp_path / "whole/results")
        assert not list(out.rglob(".*"))  # nothing of the killed run is left
        assert report(out)["runs"][0]["all"] == report(tmp_path / "whole")["runs"][0]["all"]

    def test_processes_share_the_work(self, evaluate, tmp_path):
        evaluate("--sample-only", "--num-processes", 2, "--process-id", 0)
        assert len(results(tmp_path / "out/results")) == 3
        status, _, err = evaluate("--num-processes", 2, "--process-id", 1)
        assert status == 1
        assert "several processes paint (--sample-only); score afterwards with one" in err
        evaluate("--sample-only", "--num-processes", 2, "--process-id", 1)
        status, out, _ = evaluate()
        assert status == 0
        assert "5 of 5 results exist already" in out

    def test_each_seed_has_pictures_of_its_own(self, evaluate, tmp_path):
        for seed in (0, 1):
            evaluate("--seed", seed, "--count", 1, "--sample-only", output=f"seed_{seed}")
        first, second = (results(tmp_path / f"seed_{seed}/results") for seed in (0, 1))
        assert first.keys() == second.keys() == {"a.png"}
        assert first != second

    def test_painted_as_the_paper_has_it(self, evaluate, monkeypatch):
        """The paper speaks of no matching of colours; the soft edge is asked for."""
        asked = []

        def painting(_, __, inpainting, ___, **options):
            asked.append((inpainting, options["batch_size"]))
            return []

        monkeypatch.setattr(run, "paint", painting)
        evaluate("--sample-only", "--mask-blur", 3, "--batch-size", 9)
        assert asked == [(InpaintOptions(mask_blur=3.0, match_color=False), 16)]  # of eight devices

    def test_as_many_are_scored_at_a_time_as_asked(self, evaluate, monkeypatch):
        asked = []

        def scorer(*_, **options):
            asked.append(options["batch_size"])
            raise UserError("far enough")

        monkeypatch.setattr("moebius_jax.evaluation.settings.Scorer", scorer)
        evaluate("--batch-size", 9)
        assert asked == [9]

    def test_stored_set_is_reused_and_recognised(self, evaluate, shown, tmp_path):
        evaluate()
        masks = tmp_path / "out/masks"
        status, _, _ = evaluate("--masks", masks, output="second")
        assert status == 0
        first, second = report(tmp_path / "out"), report(tmp_path / "second")
        assert first["sources"]["masks"]["sha256"] == second["sources"]["masks"]["sha256"]
        assert first["runs"][0]["all"] == second["runs"][0]["all"]
        # By order: the hash is that of the masks, whatever they are paired with.
        evaluate("--masks", masks, "--pair-by", "order", "--seed", 1, output="third")
        assert report(tmp_path / "third")["sources"]["masks"]["sha256"] == first["sources"]["masks"]["sha256"]
        # Inverted files of the same holes.
        inverted = tmp_path / "inverted"
        for file in masks.rglob("*.png"):
            target = inverted / file.relative_to(masks)
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(255 - np.asarray(Image.open(file).convert("L"))).save(target)
        evaluate("--masks", inverted, "--invert-masks", output="fourth")
        for _, _, hole in (shown[0]("a"), shown[-1]("a")):
            np.testing.assert_array_equal(hole, np.asarray(Image.open(masks / "a.png").convert("L")) > 127)
        fourth = report(tmp_path / "fourth")
        assert fourth["runs"][0]["all"] == first["runs"][0]["all"]
        assert fourth["sources"]["masks"]["sha256"] == first["sources"]["masks"]["sha256"]
        # A changed set is not the set its masks.json speaks of.
        Image.fromarray(np.eye(SIZE, dtype=bool)).save(masks / "a.png")
        status, _, err = evaluate("--masks", masks, output="fifth")
        assert status == 1
        assert "the set was changed" in err
        assert not (tmp_path / "fifth/results").exists()  # said before anything is painted

    def test_masks_changed_under_a_run(self, evaluate, tmp_path):
        """Files of the same names and sizes: they are known by what is in them."""
        for name, row in (("one", 20), ("two", 60)):
            for image in ("a", "b", "c", "more/a", "z"):
                hole = np.zeros((SIZE, SIZE), np.uint8)
                hole[row : row + 20] = 255
                file = tmp_path / name / f"{image}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(hole).save(file)
        assert evaluate("--masks", tmp_path / "one")[0] == 0
        status, _, err = evaluate("--masks", tmp_path / "two")
        assert status == 1
        assert "holds results with masks" in err

    def test_black_and_white_masks_are_said(self, evaluate, tmp_path):
        for image, value in (("a", 0), ("b", 255), ("c", 255), ("more/a", 128), ("z", 128)):
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[10:40, 10:40] = 255 if value == 128 else 0
            file = tmp_path / "masks" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask if value == 128 else np.full_like(mask, value)).save(file)
        status, _, err = evaluate("--masks", tmp_path / "masks")
        assert status == 0
        assert "1 of 5 masks have no hole and count for whole pictures only; the first is that of a" in err
        assert "2 of 5 masks are all hole (is black the hole? --invert-masks); the first is that of b" in err
        assert any("2 of 5 masks are all hole" in line for line in report(tmp_path / "out")["departures"])
        summary = report(tmp_path / "out")["runs"][0]["all"]
        assert math.isfinite(summary["psnr"]["whole"])  # one picture is its original
        rows = list(csv.DictReader((tmp_path / "out/results/scores.csv").open()))
        assert [row["psnr"] == "inf" for row in rows] == [True, False, False, False, False]
        assert rows[0]["psnr_hole"] == ""

    def test_pictures_as_they_are(self, evaluate, images, tmp_path):
        """Pictures of several sizes, with masks of the same ones named `_mask`."""
        masks = tmp_path / "own"
        holes = {}
        for name, file in list_pictures(images).items():
            width, height = Image.open(file).size
            hole = np.zeros((height, width), bool)
            hole[20:50, 30:70] = True
            (masks / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(hole).save(masks / f"{name}_mask.png")
            holes[name] = hole
        status, _, _ = evaluate("--size", "original", "--masks", masks)
        assert status == 0
        for name, hole in holes.items():
            result = np.asarray(Image.open(tmp_path / f"out/results/{name}.png"))
            assert result.shape == (*hole.shape, 3)
        document = report(tmp_path / "out")
        assert document["preparation"] == "as they are"
        assert document["runs"][0]["settings"]["size"] == "original"
        status, _, err = evaluate("--masks", masks, output="other")
        assert status == 1
        assert "4 of 5 inputs cannot be used" in err  # one picture has the size
        assert "--size original leaves them as they are" in err
        evaluate("--size", "original", "--masks", masks, "--count", 5, protocol="celebahq", output="celebahq")
        said = report(tmp_path / "celebahq")["departures"]
        assert "size original, the protocol has 512" in said

    def test_from_python(self, images, loaded, tmp_path):
        """`moebius_jax.evaluate` gives the program's figures, and writes its files where it is told to."""
        settings = {"size": SIZE, "num_inference_steps": 2, "metrics": ("psnr", "l1")}
        result = moebius_jax.evaluate(loaded, images, **settings)
        assert isinstance(result, moebius_jax.EvaluationReport)
        assert result.summary["count"] == 5
        page = result.write(tmp_path / "written")
        assert page.stat().st_size > 10_000
        assert report(tmp_path / "written")["runs"][0]["all"] == result.document["runs"][0]["all"]
        kept = moebius_jax.evaluate(loaded, images, output=tmp_path / "out", **settings)
        assert kept.summary == result.summary
        assert len(results(tmp_path / "out/results")) == 5
        with pytest.raises(UserError, match="protocol is 'ffhd'; expected one of places2_test"):
            moebius_jax.evaluate(loaded, images, protocol="ffhd")
        with pytest.raises(UserError, match="colour: unknown field"):
            moebius_jax.evaluate(loaded, images, colour=1)

    def test_weights_that_say_what_they_are(self, evaluate, loaded, tiny_folder, tmp_path, monkeypatch):
        """The variant recorded at conversion is compared with the protocol's, however the model is named."""
        model = tmp_path / "model"
        shutil.copytree(tiny_folder, model)
        config = json.loads((model / "unet/config.json").read_text())
        config["source"] = {**config.get("source", {}), "variant": "ft_places2"}
        (model / "unet/config.json").write_text(json.dumps(config))
        named = MoebiusInpaintPipeline.from_pretrained(model, verify=False)
        monkeypatch.setattr(loaded, "variant", named.variant)  # which has its programs compiled
        evaluate("--count", 5, protocol="celebahq")
        assert "weights ft_places2, the protocol has ft_celebahq" in report(tmp_path / "out")["departures"]

    def test_sweeps(self, evaluate, shown, tmp_path):
        status, out, _ = evaluate("--guidance-sweep", 1, 2.5, "--count", 2, protocol="places2_test")
        assert status == 0
        assert "guidance_1.0 (2 images" in out
        document = report(tmp_path / "out")
        assert [r["label"] for r in document["runs"]] == ["guidance_1.0", "guidance_2.5"]
        assert document["shown"] == 1  # the protocol's scale
        _, result, _ = shown[0]("a")
        np.testing.assert_array_equal(result, Image.open(tmp_path / "out/guidance_2.5/a.png"))
        assert document["published"]["guidance"][2] == {"guidance_scale": 2.5, "fid": 9.48, "lpips": 0.207}
        text = (tmp_path / "out/report.md").read_text()
        assert "| guidance scale | PSNR ↑ | L1 ↓ | published FID | published LPIPS |" in text
        psnr, l1 = (document["runs"][1]["all"][key]["whole"] for key in ("psnr", "l1"))
        assert f"| 2.5 | {psnr:.2f} | {l1:.4f} | 9.48 | 0.207 |" in text
        assert (tmp_path / "out/guidance_1.0/scores.csv").is_file()
        a, b = (results(tmp_path / f"out/guidance_{s}") for s in ("1.0", "2.5"))
        assert a.keys() == b.keys()
        assert a != b
        quick = ("--metrics", "l1", "--no-compilation-cache")
        evaluate("--steps-sweep", 2, 3, "--count", 1, output="steps", quick=quick)
        assert [r["label"] for r in report(tmp_path / "steps")["runs"]] == ["steps_2", "steps_3"]
        evaluate("--scheduler-sweep", "--count", 1, output="schedulers")
        assert report(tmp_path / "schedulers")["sweep"] == "scheduler"

    def test_own_images_have_the_models_settings(self, evaluate, loaded, monkeypatch, tmp_path):
        monkeypatch.setattr(loaded, "defaults", SamplingOptions(num_inference_steps=2, strength=1.0))
        quick = ("--metrics", "l1", "--no-compilation-cache")
        assert evaluate("--count", 1, quick=quick)[0] == 0
        document = report(tmp_path / "out")
        assert document["runs"][0]["settings"]["sampling"] == dataclasses.asdict(loaded.defaults)
        assert any("starts from pure noise" in line for line in document["choices"])

    def test_departures_from_a_protocol_are_said(self, evaluate, tmp_path):
        status, _, _ = evaluate("--count", 3, "--guidance-scale", 3, protocol="celebahq")
        assert status == 0
        said = report(tmp_path / "out")["departures"]
        assert said[0] == "3 images, the protocol has 3,000"
        assert said[1] == "the first 3 by name of 5 images"
        (tmp_path / "thin").mkdir()
        draw_masks(["lama_thin", "--size", str(SIZE), "--count", "5", "--output", str(tmp_path / "thin/set")])
        arguments = ("--count", 3, "--masks", tmp_path / "thin/set", "--pair-by", "order", "--mask-blur", 0)
        evaluate(*arguments, protocol="celebahq", output="thin/out")
        more = report(tmp_path / "thin/out")["departures"]
        assert "masks lama_thin 0.0 to 1.0, the protocol has mat_large 0.0 to 1.0" in more
        assert "mask blur 0.0, our default is 4.0 (the paper names none)" in more
        # Pixels are looked at, too: large masks for a protocol of 40 to 50 %.
        evaluate("--count", 5, protocol="celebahq", output="all")
        masks = ("--count", 5, "--masks", tmp_path / "all/masks")
        evaluate(*masks, protocol="places2_test", output="other")
        more = report(tmp_path / "other")["departures"]
        assert any("masks have a hole outside the protocol's 40% to 50% (the mean" in line for line in more)
        for part in (
            "num inference steps 2, the protocol has 20",
            f"size {SIZE}, the protocol has 512",
            "guidance scale 3.0, the protocol has 2.0",
            "masks drawn from their published description",
            "the network is neither Moebius nor PixelHacker",
        ):
            assert any(part in line for line in said), part
        text = (tmp_path / "out/report.md").read_text()
        assert "| Moebius, published | 5.39 | 0.122 | Tables 1 and 4 |" in text
        assert "| PixelHacker, published | 4.75 | 0.115 | Tables 1 and 4 |" in text


@pytest.mark.slow
class TestBenchmarkErrors:
    """One line that names what is wrong, exit status 1, nothing lost."""

    def one_line(self, outcome, *parts):
        status, _, err = outcome
        assert status == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        for part in parts:
            assert str(part) in err, err

    def test_counts(self, evaluate, images):
        self.one_line(
            evaluate(protocol="ffhq"), images, "5 images, 10000 are needed", "--count 5 evaluates these"
        )
        self.one_line(evaluate("--count", 9), "5 images, 9 are needed")
        self.one_line(evaluate("--count", 0), "--count is 0; expected 1 or more")

    def test_settings_out_of_range_leave_nothing(self, evaluate, tmp_path):
        for option, value in (
            ("num_inference_steps", 0),
            ("mask_blur", -1.0),
            ("strength", 2.0),
            ("guidance_scale", "nan"),
        ):
            outcome = evaluate(f"--{option.replace('_', '-')}", value, quick=QUICK[:3])
            self.one_line(outcome, option, value)
        self.one_line(evaluate("--process-id", 2), "--process-id is 2; expected 0 to 0")
        self.one_line(evaluate("--coordinator", "x:1"), "--coordinator is for --distributed")
        self.one_line(evaluate("--steps-sweep", "--strength", 0.1, quick=QUICK[:3]), "strength")
        self.one_line(evaluate("--mask-kind", "blobs"), "mask_kind is 'blobs'")
        self.one_line(evaluate("--mask-seed", -1), "mask_seed is -1; expected 0 or more")
        self.one_line(evaluate("--mask-ratio", 0.5, 0.4), "ratio is 0.5 to 0.4")
        self.one_line(evaluate("--size", 20, "--metrics", "lpips"), "20 x 20 pixels; LPIPS needs 31")
        self.one_line(evaluate("--steps-sweep", 0, quick=QUICK[:3]), "num_inference_steps is 0")
        self.one_line(evaluate("--size", "original"), "--size original needs --masks")
        assert not (tmp_path / "out").exists()

    def test_fid(self, evaluate, tmp_path, inception_folder, tiny_folder):
        self.one_line(
            evaluate("--metrics", "fid", "l1"),
            "fid needs --inception DIR",
            "convert_weights.py",
            "--metrics l1",
        )
        weights = inception_folder / "converted"
        self.one_line(
            evaluate("--metrics", "fid", "--inception", weights),
            "fid of 5 images: expected 2048 or more",
            "--small-fid",
        )
        self.one_line(
            evaluate("--metrics", "fid", "--inception", weights, "--small-fid", "--count", 1),
            "fid of 1 images: expected 2 or more",
        )
        self.one_line(
            evaluate("--metrics", "fid", "--inception", tiny_folder / "unet", "--small-fid"),
            "holds a",
            "expected an Inception network",
        )
        self.one_line(
            evaluate("--metrics", "fid", "--inception", tmp_path / "no", "--small-fid"), "no such folder"
        )

    def test_folders(self, evaluate, images, tmp_path):
        (tmp_path / "empty").mkdir()
        self.one_line(evaluate("--images", tmp_path / "empty"), "no images here")
        self.one_line(evaluate("--images", tmp_path / "none"), "no such folder of images")
        self.one_line(evaluate("--images", images / "a.png"), "is a file, expected folder of images")
        self.one_line(evaluate("--output", images / "a.png"), "a.png: is in the folder of inputs")
        (tmp_path / "file").write_text("")
        self.one_line(evaluate("--output", tmp_path / "file"), "file: cannot be written to (File exists)")
        self.one_line(evaluate("--masks", tmp_path / "none"), "no such folder of masks")
        self.one_line(evaluate("--output", images / "out"), "is in the folder of inputs")
        (images / "gone.png").symlink_to(tmp_path / "gone.png")
        self.one_line(evaluate(), "gone.png: a link to a file that is not there")
        (images / "gone.png").unlink()
        odd = images / os.fsdecode(b"\xff.png")
        odd.write_bytes((images / "a.png").read_bytes())
        self.one_line(evaluate(), "is not plain text; rename it")
        odd.unlink()
        Image.fromarray(pictures(1)[0]).save(images / "a.jpg")
        self.one_line(evaluate(), "same name as a.jpg")

    def test_masks(self, evaluate, images, tmp_path):
        evaluate()
        masks = tmp_path / "out/masks"
        (masks / "b.png").unlink()
        self.one_line(evaluate("--masks", masks, output="x"), f"{masks}: no mask b.*", "--pair-by order")
        self.one_line(evaluate("--masks", masks, "--pair-by", "order", output="x"), "4 masks for 5 images")
        self.one_line(
            evaluate("--mask-kind", "mat_small", output="out"),
            "drawn with kind mat_large, asked for is mat_small",
        )
        self.one_line(
            evaluate("--masks", masks, "--invert-masks", "--pair-by", "order", "--count", 3, output="x"),
            "masks.json: says white",
            "leave out --invert-masks",
        )
        self.one_line(evaluate("--mask-kind", "blobs", output="x"), "mask_kind is 'blobs'; expected one of")
        self.one_line(evaluate("--invert-masks", output="x"), "are for --masks")
        self.one_line(evaluate("--masks", masks, "--mask-seed", 1, output="x"), "leave out --masks")
        self.one_line(evaluate("--masks", images, output="x"), "holds images and masks; give masks a folder")

    def test_a_mask_of_another_size_or_an_unreadable_image(self, evaluate, images, tmp_path):
        evaluate("--sample-only")
        masks = tmp_path / "masks"
        (tmp_path / "out/masks").rename(masks)
        (masks / "masks.json").unlink()
        whole = (masks / "b.png").read_bytes()
        Image.fromarray(np.eye(50, dtype=bool)).save(masks / "b.png")
        self.one_line(
            evaluate("--masks", masks, output="other"),
            f"b.png: the mask is 50 x 50 pixels, expected {SIZE} x {SIZE}, to which images are resized",
        )
        (masks / "b.png").write_bytes(whole)
        (images / "c.png").write_bytes(b"no picture")
        self.one_line(
            evaluate("--masks", masks, output="other"),
            f"{images / 'c.png'}: not an image of a kind that is read",
        )
        Image.fromarray(pictures(1)[0]).convert("CMYK").save(images / "b.jpg")
        status, _, err = evaluate("--masks", masks, output="other")
        assert status == 1
        assert "2 of 5 inputs cannot be used:" in err
        assert re.search(rf"{images / 'b.jpg'}: .*CMYK.*; expected 8-bit RGB", err)
        assert not (tmp_path / "other/results").exists()  # said before anything is painted

    def test_what_fails_while_painting_is_listed(self, evaluate, images, tmp_path, monkeypatch):
        """A file that vanishes after the inputs were checked: the others are done, and kept."""
        painting = run.paint

        def lose_one(*arguments, **options):
            (images / "c.png").rename(tmp_path / "c.png")
            return painting(*arguments, **options)

        monkeypatch.setattr(run, "paint", lose_one)
        status, _, err = evaluate()
        assert status == 1
        assert "1 not done:" in err
        assert f"{images / 'c.png'}: " in err
        assert sorted(results(tmp_path / "out/results")) == ["a.png", "b.png", "more/a.png", "z.png"]
        assert not (tmp_path / "out/report.json").exists()  # there is no report of a part
        monkeypatch.undo()
        (tmp_path / "c.png").rename(images / "c.png")

    def test_a_full_disk_stops_the_painting(self, evaluate, monkeypatch):
        written = []

        def write(path, *_, **__):
            written.append(path)
            raise UserError(f"{path}: cannot be written (No space left on device)")

        monkeypatch.setattr(paint, "write_image", write)
        self.one_line(evaluate("--batch-size", 1), "cannot be written (No space left on device)")
        assert len(written) == 1

    def test_a_run_that_painted_nothing_binds_nobody(self, evaluate, loaded, tmp_path, monkeypatch):
        """A batch that does not fit into memory: the same with a smaller one goes on."""

        def fail(*_, **__):
            raise UserError("sampling does not fit in the device's memory; use a smaller batch size")

        with monkeypatch.context() as patch:
            patch.setattr(type(loaded.sampler), "__call__", fail)
            assert evaluate("--batch-size", 16)[0] == 1
        assert not results(tmp_path / "out/results")
        assert evaluate("--batch-size", 8)[0] == 0

    def test_another_run_begins_meanwhile(self, evaluate, monkeypatch):
        """Settings are claimed with the first result; who comes second is refused, and mixes in nothing."""
        painting = run.paint

        def be_second(*arguments, **options):
            monkeypatch.undo()
            monkeypatch.setattr(evaluation_program, "load_pipeline", first_pipeline)
            assert evaluate("--sample-only")[0] == 0
            return painting(*arguments, **options)

        first_pipeline = evaluation_program.load_pipeline
        monkeypatch.setattr(run, "paint", be_second)
        status, _, err = evaluate("--seed", 1)
        assert status == 1
        assert "holds results with seed 0, asked for is 1" in err

    def test_other_settings_are_not_mixed_in(self, evaluate, tmp_path):
        evaluate("--sample-only")
        self.one_line(evaluate("--seed", 1), "holds results with seed 0, asked for is 1")
        self.one_line(
            evaluate("--guidance-scale", 3),
            "holds results with sampling.guidance_scale 2.5, asked for is 3.0",
        )
        (tmp_path / "out/results/z.png").rename(tmp_path / "z.png")
        self.one_line(evaluate("--batch-size", 16), "holds results with batch_size 8, asked for is 16")
        (tmp_path / "z.png").rename(tmp_path / "out/results/z.png")
        assert evaluate("--batch-size", 16)[0] == 0  # nothing remains to be painted
        assert report(tmp_path / "out")["runs"][0]["settings"]["batch_size"] == 8
        self.one_line(evaluate("--guidance-scale", 3, "--guidance-sweep"), "has no place in a sweep over it")
        (tmp_path / "foreign/results").mkdir(parents=True)
        (tmp_path / "foreign/results/letter.txt").write_text("dear")
        self.one_line(evaluate(output="foreign"), "is not empty and not from an evaluation")
        for text, problem in (("{", "not JSON"), ("[]", "found []; expected an object")):
            (tmp_path / "out/results/run.json").write_text(text)
            self.one_line(evaluate(), f"run.json: {problem}")
        (tmp_path / "out/results/run.json").unlink()
        (tmp_path / "out/results/run.json").mkdir()
        self.one_line(evaluate(), "run.json: cannot be read")

    def test_other_reports_are_not_replaced(self, evaluate, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/report.md").write_text("my notes")
        self.one_line(evaluate(), "report.md: is not from evaluate.py custom")
        assert (tmp_path / "out/report.md").read_text() == "my notes"
        assert evaluate(output="second")[0] == 0
        self.one_line(
            evaluate("--count", 2, protocol="ffhq", output="second"),
            "report.json: is not from evaluate.py ffhq",
        )

    def test_a_report_is_replaced_whole_or_not_at_all(self, evaluate, tmp_path, monkeypatch):
        evaluate()
        before = {f.name: f.read_bytes() for f in (tmp_path / "out").glob("report.*")}
        monkeypatch.setattr(Path, "write_text", self.full_disk(Path.write_text))
        self.one_line(evaluate(), "cannot be written (No space left on device)")
        assert {f.name: f.read_bytes() for f in (tmp_path / "out").glob("report.*")} == before
        assert not list((tmp_path / "out").rglob(".partial*"))

    @staticmethod
    def full_disk(write_text):
        def write(path, text, **options):
            if path.suffix == ".html":
                raise OSError(errno.ENOSPC, "No space left on device")
            return write_text(path, text, **options)

        return write

    def test_a_damaged_result_is_named(self, evaluate, tmp_path):
        evaluate("--sample-only")
        (tmp_path / "out/results/c.png").write_bytes(b"no picture")
        self.one_line(evaluate(), "results/c.png: not an image of a kind that is read")


class TestScore:
    @pytest.fixture
    def score(self, tmp_path, capsys):
        """Two folders of four pictures, the second blurred, and masks."""
        rng = np.random.default_rng(0)
        for name in ("gt", "pred", "masks"):
            (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures(4)):
            Image.fromarray(picture).save(tmp_path / f"gt/{i}.png")
            noisy = np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / f"pred/{i}.png")
            hole = np.zeros((SIZE, SIZE), bool)
            hole[: 20 * (i + 1)] = True
            Image.fromarray(hole).save(tmp_path / f"masks/{i}.png")

        def run(*arguments, metrics=("psnr", "l1")):
            folders = ("--pred", tmp_path / "pred", "--gt", tmp_path / "gt")
            status = main([str(a) for a in ("score", *folders, "--metrics", *metrics, *arguments)])
            return status, *capsys.readouterr()

        return run

    def test_prints_figures_and_writes_nothing(self, score, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        status, out, _ = score()
        assert status == 0
        assert "scores (4 images" in out
        assert "PSNR ↑" in out
        assert sorted(tmp_path.rglob("*")) == before

    def test_report_with_masks_beside_a_protocol(self, score, tmp_path):
        out = tmp_path / "out"
        status, _, _ = score("--masks", tmp_path / "masks", "--output", out, "--beside", "ffhq")
        assert status == 0
        document = report(out)
        assert [(r["low"], r["count"]) for r in document["runs"][0]["bins"]] == [
            (0.2, 1),
            (0.4, 1),
            (0.6, 1),
            (0.8, 1),
        ]
        text = (out / "report.md").read_text()
        assert "| Moebius, published | 8.15 | 0.231 |" in text
        assert "4 images, the protocol has 10,000" in text
        assert "pictures of 96 x 96 pixels, the protocol has 256 x 256" in text
        assert "<svg" in (out / "report.html").read_text()

    def test_masks_whose_black_is_the_hole(self, score, shown, tmp_path):
        score("--masks", tmp_path / "masks", "--output", tmp_path / "white")
        for mask in (tmp_path / "masks").iterdir():
            Image.fromarray(~np.asarray(Image.open(mask))).save(mask)
        score("--masks", tmp_path / "masks", "--invert-masks", "--output", tmp_path / "black")
        white, black = report(tmp_path / "white"), report(tmp_path / "black")
        assert white["runs"][0]["all"] == black["runs"][0]["all"]
        assert black["sources"]["masks"]["polarity"] == "black is the hole"
        _, _, hole = shown[1]("1")
        assert hole[:40].all()
        assert not hole[40:].any()

    def test_grids_beside_results_are_none(self, score, tmp_path):
        write_grid(tmp_path / "pred/0.png", *pictures(3), overwrite=False)
        status, out, _ = score()
        assert status == 0
        assert "scores (4 images" in out
        Image.new("RGB", (300, 96)).save(tmp_path / "pred/1_grid.png")
        TestBenchmarkErrors().one_line(score(), f"{tmp_path / 'gt'}: no original 1_grid.*")

    def test_identical_pictures_are_infinitely_alike(self, score, tmp_path):
        status, out, _ = score("--pred", tmp_path / "gt", "--output", tmp_path / "out")
        assert status == 0
        assert "∞" in out
        assert report(tmp_path / "out")["runs"][0]["all"]["psnr"]["whole"] == "Infinity"

    def test_errors(self, score, tmp_path):
        one_line = TestBenchmarkErrors().one_line
        pred, gt = tmp_path / "pred", tmp_path / "gt"
        (pred / "2.png").rename(tmp_path / "2.png")
        one_line(score(), f"{pred}: no result 2.*")
        one_line(score("--pred", gt, "--gt", pred), f"{pred}: no original 2.*")
        Image.open(tmp_path / "2.png").resize((50, 60)).save(pred / "2.png")
        one_line(score(), "2.png: the result is 50 x 60 pixels and its image 96 x 96; they must agree")
        (pred / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:300])
        one_line(score(), "2.png: unreadable image")
        one_line(score("--beside", "custom"), "beside is 'custom'; expected one of places2_test")
        one_line(score("--invert-masks"), "are for --masks, which is missing")
        one_line(score("--batch-size", 0), "--batch-size is 0")
        one_line(score("--output", pred / "out"), "is in the folder of inputs")
        one_line(score(metrics=("fid",)), "--inception")
        for folder in (pred, gt):
            for file in folder.iterdir():
                Image.fromarray(pictures(1)[0][:30, :40]).save(file)
        one_line(score(metrics=("lpips",)), "0.png: 40 x 30 pixels; LPIPS needs 31 or more each way")


@pytest.mark.parametrize(
    ("name", "count", "size", "kind", "ratio", "variant", "guidance", "moebius", "pixelhacker"),
    [
        ("places2_test", 10_000, 512, "lama_medium", HALF, "ft_places2", 2.5, (9.48, 0.207), (8.59, 0.203)),
        ("places2_large", 36_500, 512, "mat_large", ANY, "ft_places2", 2.5, (2.35, 0.173), (2.05, 0.169)),
        ("places2_small", 36_500, 512, "mat_small", ANY, "ft_places2", 2.5, (0.92, 0.091), (0.82, 0.088)),
        ("places2_256", 36_500, 256, "comodgan", ANY, "ft_places2", 2.5, (14.13, 0.470), (9.25, 0.367)),
        ("celebahq", 3_000, 512, "mat_large", ANY, "ft_celebahq", 2.0, (5.39, 0.122), (4.75, 0.115)),
        ("ffhq", 10_000, 256, "lama_thick", ANY, "ft_ffhq", 2.0, (8.15, 0.231), (6.35, 0.229)),
        ("lvis", 10_000, 512, "lama_medium", HALF, "ft_places2", 2.5, (17.81, 0.309), (13.84, 0.305)),
        ("deepfakeface", 3_000, 512, "mat_large", ANY, "ft_celebahq", 2.0, (15.32, 0.173), (15.50, 0.172)),
    ],
)  # fmt: skip
def test_protocols_are_the_papers(name, count, size, kind, ratio, variant, guidance, moebius, pixelhacker):
    protocol = PROTOCOLS[name]
    assert (protocol.count, protocol.size, protocol.masks.size) == (count, size, size)
    assert protocol.masks.kind == kind
    assert (protocol.masks.min_ratio, protocol.masks.max_ratio) == ratio
    assert (protocol.variant, protocol.guidance_scale) == (variant, guidance)
    published = [(row.model, row.fid, row.lpips) for row in QUALITY[name]]
    assert published == [("Moebius", *moebius), ("PixelHacker", *pixelhacker)]


def test_there_are_eight_protocols_and_the_guidance_of_two():
    assert set(PROTOCOLS) == {*QUALITY, "custom"}
    assert len(QUALITY) == 8
    for name, scales in GUIDANCE.items():
        scale = PROTOCOLS[name].guidance_scale
        assert scales[scale] == (QUALITY[name][0].fid, QUALITY[name][0].lpips)


def test_own_images_are_painted_as_the_model_has_it_and_a_protocols_as_the_paper(tmp_path):
    own = SamplingOptions(
        num_inference_steps=1, strength=1.0, scheduler="ddim_trailing", guidance_scale=1.0, refine=0.5
    )

    def usual(protocol, **asked):
        settings = {"images": tmp_path, "output": tmp_path, "size": SIZE, "metrics": ("l1",), **asked}
        return BenchmarkSettings(protocol=PROTOCOLS[protocol], **settings).usual_sampling(own)

    assert usual("custom") == own
    assert usual("custom", num_inference_steps=1) == own  # at the release's strength, no step
    assert usual("custom", strength=0.8, num_inference_steps=9).refine == 0.5
    assert usual("celebahq") == SamplingOptions(guidance_scale=2.0)
    assert usual("celebahq", strength=1.0) == SamplingOptions(guidance_scale=2.0, strength=1.0)


def test_pictures_behind_links_are_found(tmp_path):
    """Datasets are often put together of links; one may even lead to itself."""
    (tmp_path / "disk/places").mkdir(parents=True)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "disk/places/a.png")
    (tmp_path / "data/.hidden").mkdir(parents=True)
    Image.fromarray(pictures(1)[0]).save(tmp_path / "data/.hidden/b.png")
    (tmp_path / "data/places").symlink_to(tmp_path / "disk/places")
    (tmp_path / "data/itself").symlink_to(tmp_path / "data")
    (tmp_path / "disk/places/other").symlink_to(tmp_path / "disk/more")
    (tmp_path / "disk/more").mkdir()
    (tmp_path / "disk/more/back").symlink_to(tmp_path / "disk/places")
    assert list(list_pictures(tmp_path / "data")) == ["places/a"]


def test_without_its_extra_it_says_what_to_install(evaluate, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else name)
    status, _, err = evaluate()
    assert status == 1
    assert 'sklearn missing; install the eval extra: pip install "moebius-jax[eval]"' in err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in (*QUALITY, "custom", "score", "convert_weights.py"):
        assert name in out
