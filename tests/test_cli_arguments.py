"""What is asked for on a command line arrives where the work is done, every option of it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moebius_jax.cli import cache_latents, convert, demo, evaluate, export, sample
from moebius_jax.errors import UserError
from moebius_jax.evaluation.protocols import PROTOCOLS
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions

FROM_PRETRAINED = "moebius_jax.inpaint.pipeline.MoebiusInpaintPipeline.from_pretrained"
MODEL = {
    "variant": "ft_ffhq",
    "revision": "v1",
    "vae": Path("own_vae"),
    "dtype": "bfloat16",
    "stream_dtype": "float32",
    "vae_dtype": "float16",
}
SAMPLING = {
    "num_inference_steps": 7,
    "strength": 0.6,
    "guidance_scale": 3.5,
    "scheduler": "dpmpp_2m",
}


@pytest.fixture
def stops_at(monkeypatch):
    """Replaces a function: its arguments are kept, and the program ends there with an error."""

    def replace(target: str) -> SimpleNamespace:
        call = SimpleNamespace(args=None, options=None)

        def stop(*args, **options):
            call.args, call.options = args, options
            raise UserError("far enough")

        monkeypatch.setattr(target, stop)
        return call

    return replace


@pytest.fixture
def paths(tmp_path):
    """An image, a mask, and where to write."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((64, 64), 255, np.uint8)).convert("RGB").save(tmp_path / name / "a.png")
    return [
        f"--image={tmp_path}/images/a.png",
        f"--mask={tmp_path}/masks/a.png",
        f"--output={tmp_path}/o.png",
    ]


def typed(**options) -> list[str]:
    """Options as they are typed."""
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        words += {True: [f"--{option}"], False: [f"--no-{option}"]}.get(value, [f"--{option}", str(value)])
    return words


def without(given: dict, *names: str) -> dict:
    return {name: value for name, value in given.items() if name not in names}


def test_which_model(paths, stops_at):
    call = stops_at(FROM_PRETRAINED)
    assert sample.main([*paths, *typed(model="a/b", **MODEL), "--no-verify"]) == 1
    assert call.args == ("a/b",)
    assert without(call.options, "track") == {**MODEL, "verify": False}
    assert sample.main([*paths, *typed(model="a/b")]) == 1
    nothing = {"variant": None, "revision": None, "vae": None, "stream_dtype": None, "verify": True}
    assert without(call.options, "track") == {**nothing, "dtype": "auto", "vae_dtype": "auto"}


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (demo.main, []),
        (evaluate.main, ["custom", "--images={}/images", "--output={}/out", "--metrics=l1", "--size=64"]),
    ],
)
@pytest.mark.usefixtures("paths")
def test_which_model_of_the_others(main, arguments, tmp_path, stops_at):
    call = stops_at(FROM_PRETRAINED)
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert main([*arguments, *typed(model="a/b", **MODEL), "--no-verify"]) == 1
    assert call.args == ("a/b",)
    assert without(call.options, "track") == {**MODEL, "verify": False}


def test_what_to_paint(paths, stops_at, monkeypatch):
    about_masks = {
        "mode": "release",
        "invert_mask": True,
        "mask_dilation": 3,
        "mask_blur": 2.5,
        "padding_mask_crop": 70,
        "match_color": False,
    }
    model = SimpleNamespace(
        defaults=SamplingOptions(noise_offset=0.5),
        unet=SimpleNamespace(config=SimpleNamespace(channels=(1,))),
        sampler=SimpleNamespace(image_size=64),
    )
    monkeypatch.setattr(FROM_PRETRAINED, lambda *_, **__: model)
    call = stops_at("moebius_jax.inpaint.files.inpaint_files")
    asked = typed(**about_masks, **SAMPLING, refine=0.4, batch_size=3, seed=9)
    assert sample.main([*paths, *asked, "--model=tiny", "--grid", "--overwrite"]) == 1
    pipe, (task,), options, sampling = call.args
    assert pipe is model
    assert task.seed == 9
    assert options == InpaintOptions(**about_masks)
    assert sampling == SamplingOptions(**SAMPLING, refine=0.4, truncate=True, noise_offset=0.5)
    assert without(call.options, "advance") == {"batch_size": 3, "overwrite": True, "grid": True}
    assert sample.main([*paths, "--model=tiny"]) == 1
    _, (task,), options, sampling = call.args
    assert (task.seed, options, sampling) == (0, InpaintOptions(), model.defaults)
    assert without(call.options, "advance") == {"batch_size": 1, "overwrite": False, "grid": False}


def test_what_to_evaluate(tmp_path, stops_at):
    call = stops_at("moebius_jax.evaluation.run.Benchmark")
    folders = {name: tmp_path / name for name in ("images", "output", "inception")}
    drawn = {"mask_kind": "mat_large", "mask_seed": 3}
    others = {"mask_blur": 2.0, "count": 5, "seed": 9, "batch_size": 3, "size": 128}
    asked = typed(**folders, **drawn, **others, **SAMPLING)
    asked += ["--mask-ratio", "0.2", "0.4", "--metrics", "l1", "fid", "--small-fid", "--sample-only"]
    assert evaluate.main(["custom", *asked]) == 1
    expected = {**folders, **drawn, **others, **SAMPLING, "mask_ratio": (0.2, 0.4)}
    expected |= {"metrics": ("l1", "fid"), "small_fid": True, "protocol": PROTOCOLS["custom"]}
    assert {name: getattr(call.args[0], name) for name in expected} == expected
    assert not call.options["scores"]

    stored = {"masks": tmp_path / "masks", "pair_by": "order"}
    assert (
        evaluate.main(["celebahq", *typed(**folders, **stored), "--invert-masks", "--steps-sweep", "5"]) == 1
    )
    expected = {**stored, "invert_masks": True, "steps_sweep": (5,), "protocol": PROTOCOLS["celebahq"]}
    assert {name: getattr(call.args[0], name) for name in expected} == expected
    assert call.options["scores"]


def test_what_to_score(tmp_path, stops_at):
    call = stops_at("moebius_jax.evaluation.existing.score_existing")
    folders = {name: tmp_path / name for name in ("pred", "gt", "masks", "inception")}
    others = {"size": 64, "batch_size": 3, "pair_by": "order", "beside": "celebahq"}
    asked = ["--small-fid", "--invert-masks", "--metrics", "l1", "fid"]
    assert evaluate.main(["score", *typed(**folders, **others), *asked]) == 1
    expected = {**folders, **others, "small_fid": True, "invert_masks": True, "metrics": ("l1", "fid")}
    assert {name: getattr(call.args[0], name) for name in expected} == expected


def test_what_to_export(tmp_path, stops_at, monkeypatch):
    call = stops_at(FROM_PRETRAINED)
    model = without(MODEL, "stream_dtype", "vae_dtype")
    assert export.main(["a/b", str(tmp_path / "out"), *typed(**model), "--no-verify"]) == 1
    assert call.args == ("a/b",)
    assert call.options == {**model, "vae_dtype": "bfloat16", "verify": False}
    monkeypatch.setattr(FROM_PRETRAINED, lambda *_, **__: None)
    call = stops_at("moebius_jax.export.write.export_model")
    asked = ["--no-guidance", "--batch-size=3", "--overwrite"]
    assert export.main(["a/b", str(tmp_path / "out"), *asked]) == 1
    _, folder, options = call.args
    assert folder == tmp_path / "out"
    assert (options.format, options.batch, options.guided) == ("stablehlo", 3, False)
    assert call.options["overwrite"]


def test_what_to_convert(tmp_path, stops_at):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"")
    call = stops_at("moebius_jax.weights.convert.convert_file")
    asked = {"dtype": "float16", "base": tmp_path / "base.bin", "overwrite": True, "allow_nonfinite": True}
    assert convert.main([str(source), str(tmp_path / "out"), *typed(**asked)]) == 1
    assert call.args == (source, tmp_path / "out")
    assert without(call.options, "track") == asked
    call = stops_at("moebius_jax.weights.convert.export_file")
    assert convert.main([str(tmp_path), *typed(export=tmp_path / "out.bin", overwrite=True)]) == 1
    assert call.args == (tmp_path, tmp_path / "out.bin")
    assert call.options == {"overwrite": True}


def test_what_to_cache(tmp_path, stops_at):
    call = stops_at("moebius_jax.training.caching.cache_latents")
    asked = {"draws": 3, "batch_size": 5, "overwrite": True}
    arguments = ["configs/debug.py", str(tmp_path / "out"), "data.path=photos", "seed=4"]
    assert cache_latents.main([*arguments, *typed(**asked)]) == 1
    config, folder = call.args
    assert folder == tmp_path / "out"
    assert (config.data.kind, str(config.data.path), config.seed) == ("images", "photos", 4)
    assert without(call.options, "warn", "track") == asked


def test_what_to_serve(stops_at, monkeypatch):
    monkeypatch.setattr(FROM_PRETRAINED, lambda *_, **__: "a pipeline")
    limits = {"max_megapixels": 3.0, "max_results": 2}
    painter = stops_at("moebius_jax.demo.painter.Painter")
    assert demo.main(["--model=tiny", *typed(**limits)]) == 1
    assert painter.args == ("a pipeline",)
    assert painter.options == limits
    monkeypatch.setattr("moebius_jax.demo.painter.Painter", lambda *_, **__: None)
    monkeypatch.setattr("moebius_jax.demo.page.build", lambda _: None)
    page = stops_at("moebius_jax.demo.page.launch")
    assert demo.main(["--model=tiny", "--host=0.0.0.0", "--port=8080", "--max-megabytes=7"]) == 1
    address = page.args[1]
    assert (address.host, address.port, address.max_megabytes) == ("0.0.0.0", 8080, 7.0)
