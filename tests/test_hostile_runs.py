"""Configurations, data, results and runs made to break things, each of which once did."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hostile import limit, png, refused  # noqa: F401 (a fixture)
from PIL import Image

from benchmarks import kills
from moebius_jax import UNetConfig, UserError
from moebius_jax.data.latent_cache import CacheInfo, CacheWriter, LatentCache
from moebius_jax.data.records import read_records
from moebius_jax.data.samples import LatentSample
from moebius_jax.evaluation.cases import Case
from moebius_jax.evaluation.paint import require_own_results, result_mark
from moebius_jax.imaging.picture import write_image
from moebius_jax.models import VAEConfig
from moebius_jax.training.config_file import load_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (UNetConfig, {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        (UNetConfig, {"channels": (10**9,), "transformers": (True,)}, r"channels.0 is 1000000000"),
        (UNetConfig, {"ffn_ratio": 1e-300}, "ffn_ratio is 1e-300"),
        (UNetConfig, {"ffn_ratio": 1e300}, r"ffn_ratio is 1e\+300"),
        (UNetConfig, {"embedding_dim": 10**27}, "embedding_dim is 1000"),
        (UNetConfig, {"window": 1_000_001}, "window is 1000001"),
        (UNetConfig, {"platform": "x"}, "platform is 'x'"),
        (VAEConfig, {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        (VAEConfig, {"channels": (32,) * 200}, "channels"),
    ],
)
def test_networks_beyond_any(kind, changes, message):
    with pytest.raises(UserError, match=message):
        kind(**changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("exit(0)", "SystemExit: 0"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("def get_config(): exit()", "SystemExit"),
        ("def get_config(): raise GeneratorExit", "GeneratorExit"),
        ("def get_config(): raise ValueError('a\\nb')", "c.py: a$"),
        ("def get_config(): raise ValueError", "c.py: ValueError"),
    ],
)
def test_configurations_that_leave(tmp_path, content, message):
    (tmp_path / "c.py").write_text(content)
    refused(message, load_config, tmp_path / "c.py", [])


def test_configurations_that_are_none(tmp_path):
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    for name in ("folder.py", "pipe.py"):
        refused("found no ordinary file", load_config, tmp_path / name, [])
    refused("File name too long", load_config, "x" * 5000, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "a.jsonl:1: not JSON"),
        (json.dumps({"image": "a.png", "maks": "m.png"}), "unknown field 'maks'; did you mean mask"),
        (json.dumps({"image": "a" * 10_000}), "a path of 10,000 characters"),
        (json.dumps({"image": "a.png", "prompt": "x" * 10**6}), r"prompt is 'x{78}…; expected"),
    ],
)
def test_annotations(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    refused(message, read_records, tmp_path / "a.jsonl")


def test_annotations_that_are_no_file_of_lines(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused("no ordinary file", read_records, tmp_path / "pipe.jsonl")
    refused("an image; expected a folder", read_records, png(tmp_path / "a.png"))
    (tmp_path / "mark.jsonl").write_text('\ufeff{"image": "a\u2028b.png"}\n', encoding="utf-8")
    assert [record.image.name for record in read_records(tmp_path / "mark.jsonl")] == ["a\u2028b.png"]


class TestCachedLatents:
    @pytest.fixture
    def folder(self, tmp_path):
        blank = LatentSample.blank((8, 8, 4))
        writer = CacheWriter(tmp_path, CacheInfo(samples=3, side=8, vae="x", made_of={}), blank)
        batch = LatentSample(*(np.stack([leaf] * 3) for leaf in blank))
        moments = np.random.default_rng(0).random(batch.moments.shape).astype(np.float16)
        writer.add(batch._replace(moments=moments))
        writer.close()
        return tmp_path

    def test_a_changed_byte_is_one_sample_named(self, folder):
        content = bytearray((folder / "moments.npy").read_bytes())
        content[-1] ^= 1
        (folder / "moments.npy").write_bytes(content)
        cache = LatentCache(folder)
        assert cache[0].moments.any()
        with pytest.raises(UserError, match=r"\(sample 2\): not what was written"):
            cache[2]

    @pytest.mark.parametrize(
        ("file", "array", "message"),
        [
            ("task.npy", np.full(3, 7, np.int32), "task holds 7; expected 0 to 1"),
            ("task.npy", np.full(3, -1, np.int32), "task holds -1"),
            ("moments.npy", np.zeros((3, 8, 8, 8)), "moments are float64"),
            ("masked_moments.npy", np.zeros((3, 8, 8, 8), np.float32), "masked_moments is float32"),
            ("moments.npy", np.float16(1), "moments.npy holds no array"),
            ("crc32.npy", np.zeros(2, np.uint32), r"crc32.npy is \[2\]; expected \[3\]"),
        ],
    )
    def test_arrays_of_another_kind(self, folder, file, array, message):
        np.save(folder / file, array)
        refused(message, LatentCache, folder)

    def test_pipes_and_headers(self, folder):
        content = bytearray((folder / "hole.npy").read_bytes())
        content[60] ^= 255
        (folder / "hole.npy").write_bytes(content)
        refused("damaged cache of latents", LatentCache, folder)
        (folder / "hole.npy").unlink()
        os.mkfifo(folder / "hole.npy")
        refused("hole.npy is no ordinary file", LatentCache, folder)


def test_results_are_what_was_painted(tmp_path):
    rng, cases = np.random.default_rng(0), []
    for name in ("a", "b"):
        truth, result = tmp_path / name, tmp_path / f"{name}.png"
        case = Case(name=name, truth=truth, mask=None, mask_name=name, result=result)
        rgb = rng.integers(0, 256, (8, 8, 3), np.uint8)
        write_image(result, Image.fromarray(rgb), overwrite=False, mark=result_mark(case, rgb))
        cases.append(case)
    require_own_results(cases)
    shutil.copy(cases[0].result, cases[1].result)
    refused("b.png: not what was painted for b; remove it", require_own_results, cases)
    Image.new("RGB", (8, 8)).save(cases[1].result)
    refused("b.png: not what was painted for b", require_own_results, cases)


@pytest.mark.slow
class TestRuns:
    """Of train.py, in this process."""

    @pytest.fixture
    def train(self, monkeypatch, capfd):
        from train import main

        signal.alarm(0)
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        monkeypatch.chdir(ROOT)

        def start(*arguments):
            usual = ["tests/tiny_run.py", "vae=none", "loss.terms=task", "--no-compilation-cache"]
            return main([*usual, *map(str, arguments)]), capfd.readouterr().err

        return start

    def test_exploded_weights_are_not_saved(self, train, tmp_path):
        options = ["optimizer.name=adamw", "optimizer.learning_rate=1000", "optimizer.weight_decay=1e37"]
        status, err = train("--workdir", tmp_path, *options, "checkpoint.every=1", "steps=3")
        assert status == 1
        assert "step 1: parameter_norm is" in err
        assert "Traceback" not in err
        assert not list((tmp_path / "checkpoints").glob("step_*"))
        assert not (tmp_path / "model").exists()

    @pytest.mark.long
    def test_what_changed_is_told_and_foreign_files_stay(self, train, tmp_path):
        assert train("--workdir", tmp_path / "w", "steps=1")[0] == 0
        status, err = train("--workdir", tmp_path / "w", "steps=2", "noise_offset=0.5", "optimizer.b1=0.5")
        assert status == 0
        assert "warning: noise_offset was 0.0357 so far, it is 0.5 from here on" in err
        assert "warning: optimizer.b1 was 0.9" in err
        assert "steps was" not in err
        for name in ("config.json", "model/mine.txt", "checkpoints"):
            workdir = tmp_path / name.replace("/", "_")
            (workdir / name).parent.mkdir(parents=True)
            (workdir / name).write_text("mine")
            status, err = train("--workdir", workdir, "steps=1")
            assert status == 1, name
            assert err.splitlines()[-1].startswith(f"error: {workdir}")
            assert (workdir / name).read_text() == "mine"

    def test_too_much_for_the_machine(self, train, tmp_path):
        status, err = train("--workdir", tmp_path / "w", "student.channels=65536", "steps=1")
        assert status == 1
        assert "parameters, averages and optimiser take" in err
        assert not (tmp_path / "w").exists()


def test_what_kills_are_tried_on_can_be_made(tmp_path):
    """benchmarks/kills.py itself is too long for here; its released file was once one no program reads."""
    kills.prepare(tmp_path)
    assert (tmp_path / "released.safetensors").stat().st_size > 10e6  # 5.6 M weights
