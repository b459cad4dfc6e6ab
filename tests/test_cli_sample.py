"""`sample.py` as a person types it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_jax.cli.sample import _require_possible, main
from moebius_jax.errors import UserError
from moebius_jax.imaging.grid import GAP, is_grid
from moebius_jax.imaging.picture import write_image
from moebius_jax.inpaint.pairing import plan_tasks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(photo, mask, tmp_path):
    """Three images, and masks for them; one is named with _mask."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, name in enumerate(("a", "b", "c")):
        Image.fromarray(np.roll(photo, 9 * i, 1)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{name}{'_mask' if name == 'b' else ''}.png")
    return tmp_path


@pytest.fixture
def sample(files, tiny_folder, capsys):
    """Runs sample.py in this process on the tiny pipeline; returns status, stdout and stderr."""

    def run(*arguments, image="images", mask="masks", output="out"):
        status = main(
            [
                *(
                    "--image",
                    str(files / image),
                    "--mask",
                    str(files / mask),
                    "--output",
                    str(files / output),
                ),
                *("--model", str(tiny_folder), "--num-inference-steps", "2", "--no-compilation-cache"),
                *arguments,
            ]
        )
        return status, *capsys.readouterr()

    return run


def assert_grid_of(output, image, mask):
    """Its panels, from the left: what was given, what was to be painted, what came out."""
    grid = np.asarray(Image.open(output.with_name(f"{output.stem}_grid.png")))
    for i, file in enumerate((image, mask, output)):
        panel = np.asarray(Image.open(file).convert("RGB"))
        left = i * (panel.shape[1] + GAP)
        np.testing.assert_array_equal(grid[:, left : left + panel.shape[1]], panel)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.slow
def test_folder_in_folder_out(sample, files):
    status, out, _ = sample("--grid")
    assert status == 0
    assert names(files / "out") == [f"{n}{g}.png" for n in "abc" for g in ("", "_grid")]
    assert [p.name for p in sorted((files / "out").iterdir()) if is_grid(p)] == [
        f"{n}_grid.png" for n in "abc"
    ]
    assert "3 results in" in out
    assert "images/s" in out
    assert "of compiling" in out
    for name in "abc":
        result = np.asarray(Image.open(files / f"out/{name}.png"))
        image = np.asarray(Image.open(files / f"images/{name}.png"))
        assert result.shape == image.shape
        np.testing.assert_array_equal(result[:20], image[:20])
        assert (result[35:45, 45:60] != image[35:45, 45:60]).any()
        mask = files / f"masks/{name}{'_mask' if name == 'b' else ''}.png"
        assert_grid_of(files / f"out/{name}.png", files / f"images/{name}.png", mask)


@pytest.mark.slow
def test_a_picture_comes_out_the_same_alone(sample, files):
    sample("--batch-size", "8", "--seed", "5")
    sample(
        "--batch-size", "8", "--seed", "5", image="images/b.png", mask="masks/b_mask.png", output="alone.png"
    )
    np.testing.assert_array_equal(Image.open(files / "alone.png"), Image.open(files / "out/b.png"))


@pytest.mark.slow
def test_one_mask_serves_all_and_existing_results_are_kept(sample, files):
    sample(image="images/a.png", mask="masks/a.png", output="out/a.png")
    before = (files / "out/a.png").stat().st_mtime_ns
    status, out, _ = sample(mask="masks/a.png")
    assert status == 0
    assert "1 of 3 results exist already and are kept" in out
    assert (files / "out/a.png").stat().st_mtime_ns == before
    status, _, _ = sample("--overwrite", mask="masks/a.png")
    assert status == 0
    assert (files / "out/a.png").stat().st_mtime_ns > before
    status, out, _ = sample(mask="masks/a.png")
    assert status == 0
    assert "3 of 3 results exist already" in out


@pytest.mark.slow
def test_samples_have_seeds_of_their_own(sample, files):
    status, _, _ = sample("--num-samples", "2", "--seed", "9", image="images/a.png", mask="masks/a.png")
    assert status == 0
    assert names(files / "out") == ["a_0.png", "a_1.png"]
    sample("--seed", "10", image="images/a.png", mask="masks/a.png", output="ten/a.png")
    second = np.asarray(Image.open(files / "out/a_1.png"))
    np.testing.assert_array_equal(second, Image.open(files / "ten/a.png"))
    assert (second != np.asarray(Image.open(files / "out/a_0.png"))).any()


@pytest.mark.slow
def test_failures_are_listed_and_the_rest_is_done(sample, files, photo):
    (files / "images/broken.png").write_bytes(b"not a picture")
    Image.fromarray(np.full((80, 112), 255, np.uint8)).save(files / "masks/broken.png")
    Image.fromarray(photo).save(files / "images/lonely.png")
    Image.fromarray(photo[:40]).save(files / "images/small.png")
    Image.open(files / "masks/a.png").save(files / "masks/small.png")
    Image.open(files / "masks/a.png").save(files / "masks/stray.png")
    status, out, err = sample()
    assert status == 1
    assert "3 results in" in out
    assert names(files / "out") == ["a.png", "b.png", "c.png"]
    report = err[err.index("4 not done:") :]
    assert f"{files}/images/lonely.png: no mask lonely.* in" in report
    assert f"{files}/masks/stray.png: no image goes with this mask" in report
    assert f"{files}/images/broken.png: not an image" in report
    assert (
        f"{files}/masks/small.png: the mask is 112 x 80 pixels and {files}/images/small.png is 112 x 40"
        in report
    )
    assert "Traceback" not in err


@pytest.mark.slow
def test_masks_that_look_wrong_warn(sample, files):
    Image.fromarray(np.zeros((80, 112), np.uint8)).save(files / "masks/a.png")
    status, _, err = sample(image="images/a.png", mask="masks/a.png", output="o.png")
    assert status == 0
    assert f"warning: {files}/masks/a.png: nothing to repaint, no pixel is brighter than mid-grey" in err
    np.testing.assert_array_equal(Image.open(files / "o.png"), Image.open(files / "images/a.png"))


@pytest.mark.parametrize(
    ("arguments", "paths", "message"),
    [
        ([], {"image": "nowhere"}, "nowhere: no such image file or folder"),
        ([], {"mask": "nowhere.png"}, "nowhere.png: no such mask file or folder"),
        ([], {"output": "out.png"}, "is a folder, so the output must be one too"),
        (["--num-samples", "0"], {}, "--num-samples is 0; expected 1 or more"),
        (["--seed", "-3"], {}, "--seed is -3"),
        (["--strength", "0"], {}, "strength is 0.0"),
        (["--num-inference-steps", "5000"], {}, "num_inference_steps is 5000"),
        (["--mask-dilation", "-1"], {}, "mask_dilation is -1"),
        (["--process-id", "2"], {}, "--process-id is 2; expected 0 to 0"),
        (["--variant", "ft_ffhq"], {}, "holds one model"),
        (["--model", "/nowhere/at/all"], {}, "neither a folder nor a Hub repository"),
        (["--model", "owner/nowhere"], {}, "the Hub cannot be reached"),
        (["--mask-blur", "nan"], {}, "mask_blur is nan"),
        (["--guidance-scale", "nan"], {}, "guidance_scale is nan"),
        ([], {"image": "images/a.png", "mask": "masks/a.png", "output": "out.gif"}, "found .gif"),
        ([], {"output": "images"}, "the result would have the name of an input"),
    ],
)
def test_mistakes_are_one_line(sample, files, arguments, paths, message):
    status, out, err = sample(*arguments, **paths)
    assert status == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err + out
    assert not (files / "out").exists()


def test_empty_folder(sample, files):
    (files / "empty").mkdir()
    status, _, err = sample(image="empty")
    assert status == 1
    assert "no images here (looked for .png" in err


def test_without_the_hub_the_packaged_model_paints(files, monkeypatch, capsys):
    arguments = ["--image", str(files / "images/a.png"), "--mask", str(files / "masks/a.png")]
    arguments += ["--output", str(files / "o.png"), "--no-compilation-cache"]
    monkeypatch.setenv("HF_HOME", str(files / "hf"))
    for named in (["--model", "hustvl/Moebius"], ["--variant", "ft_ffhq"]):
        assert main([*arguments, *named]) == 1
        assert "the Hub cannot be reached" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "painting with tiny, the small network that comes along" in capsys.readouterr().err
    arguments[arguments.index(str(files / "o.png"))] = str(files / "told.png")
    told = [
        "--scheduler",
        "ddim_trailing",
        "--num-inference-steps",
        "1",
        "--strength",
        "1",
        "--refine",
        "0.5",
    ]
    assert main([*arguments, *told]) == 0
    ours, theirs = (np.asarray(Image.open(files / name)) for name in ("o.png", "told.png"))
    np.testing.assert_array_equal(ours, theirs)  # tiny's own way of being sampled


@pytest.mark.slow
def test_several_processes_share_the_files(files, tiny_folder):
    def start(i):
        return subprocess.Popen(
            [
                *(
                    sys.executable,
                    "sample.py",
                    "--image",
                    str(files / "images"),
                    "--mask",
                    str(files / "masks"),
                ),
                *("--output", str(files / "out"), "--model", str(tiny_folder), "--num-inference-steps", "2"),
                *("--no-compilation-cache", "--num-processes", "2", "--process-id", str(i)),
            ],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": os.environ["FAST_COMPILE"]},
            stdout=subprocess.PIPE,
            text=True,
        )

    processes = [start(0), start(1)]
    outputs = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert "2 results in" in outputs[0]
    assert "1 result in" in outputs[1]
    assert names(files / "out") == ["a.png", "b.png", "c.png"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--mask-dilation" in out


@pytest.mark.slow
def test_grids_of_earlier_results_are_made_without_the_model(sample, files):
    sample(image="images/a.png", mask="masks/a.png", output="out")
    status, _, _ = sample(
        "--grid", "--model", "/nowhere", image="images/a.png", mask="masks/a.png", output="out"
    )
    assert status == 0
    assert names(files / "out") == ["a.png", "a_grid.png"]
    assert [is_grid(files / "out" / name) for name in ("a.png", "a_grid.png")] == [False, True]
    assert_grid_of(files / "out/a.png", files / "images/a.png", files / "masks/a.png")


@pytest.mark.slow
def test_transparency_and_jpeg_do_not_go_together(sample, files, photo):
    Image.fromarray(np.dstack([photo, photo[..., 0]])).save(files / "images/a.png")
    status, out, err = sample(image="images/a.png", mask="masks/a.png", output="o.jpg")
    assert status == 1
    assert "0 results in" in out
    assert "o.jpg: .jpg keeps no transparency" in err
    # The model's square has none to keep.
    status, _, err = sample("--mode", "release", image="images/a.png", mask="masks/a.png", output="o.jpg")
    assert status == 0, err
    assert Image.open(files / "o.jpg").size == (64, 64)


def test_what_is_not_ours_is_refused_before_anything_is_painted(sample, files, monkeypatch):
    Image.open(files / "images/b.png").save(files / "o.png")
    painted = []
    monkeypatch.setattr(
        "moebius_jax.inpaint.files.inpaint_stream", lambda _, items, *__, **___: painted.extend(items) or []
    )
    status, _, err = sample("--overwrite", image="images/a.png", mask="masks/a.png", output="o.png")
    assert status == 1
    assert "o.png: " in err
    assert not painted


class TestPairing:
    def touch(self, folder, *names):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        return folder

    def test_same_stem_twice_is_refused(self, tmp_path):
        images = self.touch(tmp_path / "i", "a.png", "a.jpg", "b.png")
        masks = self.touch(tmp_path / "m", "a.png", "b.png")
        tasks, problems = plan_tasks(images, masks, tmp_path / "o", seed=0, num_samples=1)
        assert [t.image.name for t in tasks] == ["a.jpg", "b.png"]
        assert problems == [f"{images}/a.png: same name as a.jpg; rename one image"]

    def test_exact_stem_wins_and_hidden_files_are_left_out(self, tmp_path):
        images = self.touch(tmp_path / "i", "a.png", ".hidden.png", "notes.txt")
        masks = self.touch(tmp_path / "m", "a_mask.png", "a.png")
        tasks, problems = plan_tasks(images, masks, tmp_path / "o", seed=0, num_samples=1)
        assert [t.mask.name for t in tasks] == ["a.png"]
        assert problems == [f"{masks}/a_mask.png: no image goes with this mask"]

    def test_images_and_masks_may_share_a_folder(self, tmp_path):
        both = self.touch(tmp_path / "d", "a.png", "a_mask.png", "b.jpg", "b-mask.png", "green_mask.png")
        tasks, problems = plan_tasks(both, both, tmp_path / "o", seed=0, num_samples=1)
        assert [(t.image.name, t.mask.name) for t in tasks] == [
            ("a.png", "a_mask.png"),
            ("b.jpg", "b-mask.png"),
        ]
        assert problems == [f"{both}/green_mask.png: no mask green_mask.* in {both}"]

    def test_one_image_takes_its_mask_from_a_folder_of_many(self, tmp_path):
        image = self.touch(tmp_path / "i", "a.png") / "a.png"
        masks = self.touch(tmp_path / "m", "a.png", "b.png", "b.jpg")
        tasks, problems = plan_tasks(image, masks, tmp_path / "o.png", seed=0, num_samples=1)
        assert [t.mask.name for t in tasks] == ["a.png"]
        assert not problems

    def test_a_grid_and_a_result_of_one_name_are_refused(self, tmp_path):
        images = self.touch(tmp_path / "i", "cat.png", "cat_grid.png")
        mask = self.touch(tmp_path / "m", "m.png") / "m.png"
        with pytest.raises(UserError, match=r"cat_grid\.png: is also the name of the grid of cat\.png"):
            plan_tasks(images, mask, tmp_path / "o", seed=0, num_samples=1, grid=True)

    def test_results_beside_their_images_are_no_inputs_the_next_time(self, tmp_path):
        images = self.touch(tmp_path / "i", "a.jpg")
        mask = self.touch(tmp_path / "m", "m.png") / "m.png"
        write_image(images / "a.png", Image.new("RGB", (4, 4)), overwrite=False)
        (task,), _ = plan_tasks(images, mask, images, seed=0, num_samples=1)
        assert (task.image.name, task.output.name) == ("a.jpg", "a.png")
        Image.new("RGB", (4, 4)).save(images / "a.png")  # somebody's own
        with pytest.raises(UserError, match=r"a\.png: the result would have the name of an input"):
            plan_tasks(images, mask, images, seed=0, num_samples=1)

    def test_index_depends_on_the_name_only(self, tmp_path):
        few = self.touch(tmp_path / "few", "b.png")
        many = self.touch(tmp_path / "many", "a.png", "b.png", "c.png")
        mask = self.touch(tmp_path / "m", "m.png") / "m.png"
        (alone,), _ = plan_tasks(few, mask, tmp_path / "o", seed=0, num_samples=1)
        together, _ = plan_tasks(many, mask, tmp_path / "o", seed=0, num_samples=1)
        assert together[1].index == alone.index
        assert len({t.index for t in together}) == 3

    def test_seeds_wrap(self, tmp_path):
        image = self.touch(tmp_path / "i", "a.png") / "a.png"
        mask = self.touch(tmp_path / "m", "m.png") / "m.png"
        tasks, _ = plan_tasks(image, mask, tmp_path / "o.png", seed=2**32 - 1, num_samples=2)
        assert [t.seed for t in tasks] == [2**32 - 1, 0]
        assert [t.output.name for t in tasks] == ["o_0.png", "o_1.png"]

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="no such image"):
            plan_tasks(tmp_path / "x", tmp_path, tmp_path, seed=0, num_samples=1)


@pytest.mark.parametrize("options", [["--strength=2"], ["--scheduler=x"], ["--num-inference-steps=0"]])
def test_what_no_model_can_do_is_said_before_one_is_loaded(sample, monkeypatch, options):
    monkeypatch.setattr("moebius_jax.cli.sample.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    assert sample(*options)[0] == 1


def test_a_share_may_be_small_where_the_model_decides_of_how_many():
    asked = dict.fromkeys(("num_inference_steps", "guidance_scale", "scheduler", "refine"))
    _require_possible({**asked, "strength": 0.02})
    with pytest.raises(UserError, match=r"strength 0\.02 of 20 steps leaves none"):
        _require_possible({**asked, "strength": 0.02, "num_inference_steps": 20})


def test_moebius_train_is_the_program():
    code = "import sys; from moebius_jax.cli.train import main; sys.argv[1:] = ['nowhere.py']; main()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: nowhere.py: no such configuration")


NOT_FOR_EVERYONE = ("app.py", "profile_model.py")  # a page, a benchmark


@pytest.mark.parametrize("program", sorted({p.name for p in ROOT.glob("*.py")} - {*NOT_FOR_EVERYONE}))
def test_help_does_not_wait_for_jax(program):
    code = f"""
import runpy
import sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_path("{program}", run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
