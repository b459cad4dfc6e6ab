"""`MoebiusInpaintPipeline`: what comes in, what comes out, and what must stay as it was."""

import dataclasses
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import synth
from conftest import TINY_UNET, TINY_VAE
from PIL import Image

from moebius_jax import MoebiusInpaintPipeline, UNetConfig, UserError
from moebius_jax.diffusion.draws import draw_noise, sample_keys
from moebius_jax.diffusion.solvers import DDIM
from moebius_jax.imaging import masks
from moebius_jax.inpaint import model_folder, pipeline
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions
from moebius_jax.models.precision import auto_dtype, auto_vae_dtype
from moebius_jax.sharding import make_mesh
from moebius_jax.weights.tensors import abstract_network, fill, network_tensors

STEPS = {"num_inference_steps": 2, "output_type": "np"}


def far_from(mask, pixels):
    """Where no hole is within so many pixels."""
    return ~masks.dilate(mask > 127, 2 * pixels + 1)


class TestAnySize:
    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [(80, 112), (64, 64), (33, 47), (300, 200), (20, 150), (9, 7)])
    def test_same_size_and_untouched_outside(self, tiny_pipeline, shape):
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        mask = np.zeros(shape, np.uint8)
        mask[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] // 2 + 1] = 255
        (out,) = tiny_pipeline(image, mask, **STEPS).images
        assert out.shape == image.shape
        np.testing.assert_array_equal(out[mask == 0], image[mask == 0])
        assert (out[mask > 0] != image[mask > 0]).any()

    def test_only_an_edge_that_shows_is_soft(self):
        assert InpaintOptions().blur == 0
        assert InpaintOptions(match_color=False).blur == InpaintOptions(mode="release").blur == 4
        assert InpaintOptions(mode="release", match_color=True).blur == 0
        assert InpaintOptions(mask_blur=2).blur == InpaintOptions(mask_blur=2, match_color=False).blur == 2

    def test_thin_strokes_are_told_in_the_images_pixels(self, tiny_pipeline):
        """A window of 320 pixels on the model's 64, whose network sees every eighth."""
        image, mask = np.zeros((320, 320, 3), np.uint8), np.zeros((320, 320), np.uint8)
        mask[4:316, 20:24] = 255
        with pytest.warns(masks.MaskWarning) as told:
            tiny_pipeline([image, image], mask, padding_mask_crop=4, **STEPS)
        assert len(told) == 2, "one for each image, about the one mask"
        for warning in told:
            assert re.match(r"mask 0: strokes thinner than 40 pixels .*dilation 75\)", str(warning.message))

    def test_feather_reaches_no_further_than_it_says(self, tiny_pipeline, photo, mask):
        (out,) = tiny_pipeline(photo, mask, mask_blur=4, padding_mask_crop=8, **STEPS).images
        keep = far_from(mask, 5)
        np.testing.assert_array_equal(out[keep], photo[keep])
        near = ~keep & (mask == 0)
        assert (out[near] != photo[near]).any()

    def test_far_regions_are_both_filled(self, tiny_pipeline):
        image = np.full((100, 900, 3), 90, np.uint8)
        mask = np.zeros((100, 900), np.uint8)
        mask[40:60, 20:40] = mask[10:30, 850:880] = 255
        batches = []
        original = tiny_pipeline.sampler.__class__.__call__

        def watch(self, images, *args):
            batches.append(len(images))
            return original(self, images, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_pipeline.sampler.__class__, "__call__", watch)
            (out,) = tiny_pipeline(image, mask, mask_blur=0, **STEPS).images
        assert batches == [1, 1]
        for hole in (np.s_[40:60, 20:40], np.s_[10:30, 850:880]):
            assert (out[hole] != 90).any()
        np.testing.assert_array_equal(out[mask == 0], 90)

    def test_alpha_and_grey(self, tiny_pipeline, photo, mask):
        alpha = Image.fromarray(np.dstack([photo, photo[..., 0]]))
        (out,) = tiny_pipeline(alpha, Image.fromarray(mask), num_inference_steps=2).images
        assert out.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(out)[..., 3], photo[..., 0])
        (grey,) = tiny_pipeline(
            Image.fromarray(photo[..., 1]), Image.fromarray(mask), num_inference_steps=2
        ).images
        assert grey.mode == "L"
        keep = far_from(mask, 10)
        np.testing.assert_array_equal(np.asarray(grey)[keep], photo[..., 1][keep])


class TestMasks:
    def test_black_returns_the_image(self, tiny_pipeline, photo):
        with pytest.warns(masks.MaskWarning, match="nothing to repaint"):
            (out,) = tiny_pipeline(photo, np.zeros((80, 112), np.uint8), **STEPS).images
        np.testing.assert_array_equal(out, photo)

    def test_invert(self, tiny_pipeline, photo, mask):
        (out,) = tiny_pipeline(photo, 255 - mask, invert_mask=True, **STEPS).images
        np.testing.assert_array_equal(out, tiny_pipeline(photo, mask, **STEPS).images[0])

    def test_bool_float_and_zero_one_masks_mean_the_same(self, tiny_pipeline, photo, mask):
        reference = tiny_pipeline(photo, mask, **STEPS).images[0]
        for other in (mask > 0, (mask > 0).astype(np.float32)):
            np.testing.assert_array_equal(tiny_pipeline(photo, other, **STEPS).images[0], reference)
        with pytest.warns(masks.MaskWarning, match="holds only 0 and 1"):
            np.testing.assert_array_equal(tiny_pipeline(photo, mask // 255, **STEPS).images[0], reference)

    def test_dilation_repaints_more(self, tiny_pipeline, photo, mask):
        (out,) = tiny_pipeline(photo, mask, mask_dilation=9, mask_blur=0, **STEPS).images
        changed = (out != photo).any(-1)
        assert not changed[masks.dilate(mask > 127, 9) == 0].any()
        assert changed[(mask == 0) & masks.dilate(mask > 127, 9)].any()


@pytest.mark.slow
class TestBatches:
    def test_item_of_a_batch_is_the_item_alone(self, tiny_pipeline, photo, mask):
        images = [photo, 255 - photo, photo[:, :64]]
        holes = [mask, mask, mask[:, :64]]
        together = tiny_pipeline(images, holes, seed=7, batch_size=4, **STEPS).images
        for i in range(3):
            (alone,) = tiny_pipeline(
                images[i], holes[i], seed=7, image_indices=[i], batch_size=4, **STEPS
            ).images
            np.testing.assert_array_equal(alone, together[i])

    def test_noise_of_the_callers_own(self, tiny_pipeline, photo, mask):
        """What would have been drawn, handed in, gives the same; one noise may serve all."""
        keys = sample_keys(np.array([(7, i, 0) for i in range(2)], np.uint32))
        noise = np.asarray(draw_noise(keys, TINY_UNET.latent_shape, 0.0357))
        drawn = tiny_pipeline([photo, photo], mask, seed=7, **STEPS).images
        given = tiny_pipeline([photo, photo], mask, seed=7, latents=noise, noise_offset=9.0, **STEPS).images
        stepped = tiny_pipeline(
            [photo, photo], mask, seed=7, latents=noise, callback_on_step_end=lambda *_: {}, **STEPS
        ).images
        for other in (drawn, stepped):  # the draws here and in the sampler are two programs
            assert np.abs(np.int32(other) - np.int32(given)).max() <= 1
        options = {"seed": [7, 7], "image_indices": [0, 0]}
        a, b = tiny_pipeline([photo, photo], mask, latents=noise[1], **options, **STEPS).images
        np.testing.assert_array_equal(a, b)
        assert (a != drawn[0]).any()

    def test_noise_for_a_hole_in_several_squares_is_refused(self, tiny_pipeline):
        wide = np.zeros((64, 400, 3), np.uint8)
        holes = np.zeros((64, 400), np.uint8)
        holes[20:30, 5:15] = holes[20:30, 380:390] = 255
        noise = np.zeros(TINY_UNET.latent_shape)
        with pytest.raises(UserError, match="image 0: its hole takes 2 squares, and latents are for one"):
            tiny_pipeline(wide, holes, latents=noise, **STEPS)

    def test_seeds_of_their_own(self, tiny_pipeline, photo, mask):
        a, b = tiny_pipeline([photo, photo], mask, seed=[3, 4], **STEPS).images
        assert (a != b).any()
        (alone,) = tiny_pipeline(photo, mask, seed=4, batch_size=2, **STEPS).images
        np.testing.assert_array_equal(alone, b)

    def test_more_images_than_the_batch_keep_their_order(self, tiny_pipeline, mask):
        images = [np.full((64, 64, 3), 20 * i, np.uint8) for i in range(5)]
        out = tiny_pipeline(images, mask[:64, :64], mask_blur=0, batch_size=2, **STEPS).images
        assert [int(o[0, 0, 0]) for o in out] == [0, 20, 40, 60, 80]

    def test_sharded_over_eight_devices(self, tiny_pipeline, photo, mask):
        images = [np.roll(photo, i, 1) for i in range(3)]
        wide = MoebiusInpaintPipeline(
            tiny_pipeline.unet, tiny_pipeline.vae, mesh=make_mesh(jax.devices("cpu"))
        )
        for a, b in zip(
            wide(images, mask, **STEPS).images, tiny_pipeline(images, mask, **STEPS).images, strict=True
        ):
            assert np.abs(a.astype(int) - b).max() <= 1


@pytest.fixture(scope="module")
def pipe(student_mini, vae_mini):
    return MoebiusInpaintPipeline(student_mini, vae_mini, mesh=make_mesh(jax.devices()[:1]))


class TestRelease:
    """`mode="release"` on the golden run's inputs; its numbers are in test_sampling and test_imaging."""

    @pytest.mark.slow
    def test_golden_run(self, pipe, monkeypatch):
        """The release's draws in place of ours give the release's pictures."""
        from moebius_jax.inpaint import sampler

        vectors = synth.golden("pipeline_mini")

        def normal(i, *shape):
            return jax.numpy.asarray(synth.nhwc(synth.inputs(f"pipe.draw.{i}", shape)))

        noise = normal(2, 2, 4, 32, 32) + 0.0357 * normal(3, 2, 4, 1, 1)
        monkeypatch.setattr(sampler, "draw_normal", lambda _keys, draw, _shape: normal(draw, 2, 4, 32, 32))
        out = {}
        for kind, options in (
            ("plain", {"paste": False}),
            ("paste", {}),
            ("compensate", {"match_color": True}),
        ):
            out[kind] = pipe(
                [vectors["image_0"], vectors["image_1"]],
                [vectors["mask_0"], vectors["mask_1"]],
                mode="release",
                num_inference_steps=5,
                guidance_scale=2.0,
                latents=noise,
                output_type="np",
                **options,
            ).images
        for kind, images in out.items():
            for i, image in enumerate(images):
                difference = np.abs(image.astype(int) - vectors[f"{kind}_{i}"])
                assert difference.max() <= 1
                assert (difference == 0).mean() >= 0.999

    def test_other_sizes_are_squashed(self, tiny_pipeline, photo, mask):
        (out,) = tiny_pipeline(photo, mask, mode="release", **STEPS).images
        assert out.shape == (64, 64, 3)


@pytest.mark.slow
def test_context_and_latents_of_other_sizes(photo, mask):
    """Eight tokens a category and eight channels; a VAE of other channels is refused."""
    sizes = {"context_length": 8, "vocab_size": 16, "in_channels": 17, "out_channels": 8}
    unet, vae = TINY_UNET.replace(**sizes), dataclasses.replace(TINY_VAE, latent_channels=8)
    mesh = make_mesh(jax.devices()[:1])
    pipe = MoebiusInpaintPipeline.untrained(unet, vae, mesh=mesh)
    (result,) = pipe(photo, mask, **STEPS).images
    assert result.shape == photo.shape
    assert (result[mask > 0] != photo[mask > 0]).any()
    with pytest.raises(UserError, match="latents have 8 channels, the VAE's 4"):
        MoebiusInpaintPipeline.untrained(unet, TINY_VAE, mesh=mesh)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "stretch"}, "mode is 'stretch'; expected 'crop' or 'release'"),
            ({"mask_blur": -1}, "mask_blur is -1"),
            ({"padding_mask_crop": -5}, "padding_mask_crop is -5"),
            ({"paste": False}, "needs mode='release'"),
            ({"output_type": "latent"}, "output_type is 'latent'"),
            ({"seed": -1}, "seed is -1; expected whole numbers from 0 to"),
            ({"seed": [1, 2]}, "1 images, 2 seeds"),
            ({"strength": 2.0}, "strength is 2.0"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"scheduler": "euler"}, "scheduler is 'euler'"),
            ({"mask_blur": float("nan")}, "mask_blur is nan"),
            ({"mask_dilation": 2.5}, "mask_dilation is 2.5; expected a whole number"),
            ({"guidance_scale": float("inf")}, "guidance_scale is inf; expected a finite number"),
            ({"noise_offset": "much"}, "noise_offset is 'much'"),
            ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
            ({"batch_size": -1}, "batch_size is -1"),
            ({"seed": 1.5}, "seed is 1.5; expected whole numbers"),
            ({"latents": np.zeros((4, 8, 8))}, r"latents have shape \(4, 8, 8\); expected \(8, 8, 4\) or"),
            ({"latents": np.full((8, 8, 4), np.nan)}, "latents hold NaN"),
        ],
    )
    def test_bad_values_are_named(self, tiny_pipeline, photo, mask, options, message):
        with pytest.raises(UserError, match=message):
            tiny_pipeline(photo, mask, **options)

    def test_numbers_may_be_numpys(self):
        options = SamplingOptions(guidance_scale=np.float32(2.5), num_inference_steps=np.int64(4))
        assert (options.guidance_scale, options.num_inference_steps) == (2.5, 4)
        assert InpaintOptions(mask_blur=np.int64(3), mask_dilation=np.uint8(2)).mask_dilation == 2

    def test_bad_images_are_named(self, tiny_pipeline, photo, mask):
        with pytest.raises(UserError, match="mask 0: the mask is 64 x 80 pixels and image 0 is 112 x 80"):
            tiny_pipeline(photo, mask[:, :64])
        with pytest.raises(UserError, match="2 images and 3 masks"):
            tiny_pipeline([photo] * 2, [mask] * 3)
        with pytest.raises(UserError, match="image 1: an array of int32"):
            tiny_pipeline([photo, photo.astype(np.int32)], mask)
        with pytest.raises(UserError, match=r"image 0: floating-point values from 0.0 to 255.0"):
            tiny_pipeline(photo.astype(float) * 0 + np.eye(80, 112)[..., None] * 255, mask)
        with pytest.raises(UserError, match=r"image 0: an array of shape \(2, 80, 112, 3\)"):
            tiny_pipeline(np.stack([photo, photo]), mask)
        with pytest.raises(UserError, match=r"an image or mask is 'photo\.png'"):
            tiny_pipeline("photo.png", mask)
        with pytest.raises(UserError, match=r"image 0: an array of shape \(0, 5\) has no pixels"):
            tiny_pipeline(np.zeros((0, 5)), mask)
        with pytest.raises(UserError, match="no images given"):
            tiny_pipeline([], mask)

    @pytest.mark.slow
    def test_nan_names_the_image(self, tiny_pipeline, photo, mask):
        def poison(_pipe, _step, _timestep, tensors):
            return {"latents": tensors["latents"].at[1].set(np.nan)}

        with pytest.raises(UserError, match="image 1: the network produced NaN"):
            tiny_pipeline([photo, photo], mask, callback_on_step_end=poison, **STEPS)

    @pytest.mark.slow
    def test_callback_arguments(self, tiny_pipeline, photo, mask):
        seen = []
        tiny_pipeline(
            photo,
            mask,
            num_inference_steps=3,
            strength=1.0,
            callback_on_step_end=lambda pipe, i, t, tensors: seen.append(
                (pipe is tiny_pipeline, i, t, set(tensors))
            ),
        )
        assert seen == [(True, i, t, {"latents"}) for i, t in enumerate((666, 333, 0))]


@pytest.mark.slow
class TestLoading:
    def test_saved_and_loaded_is_the_same(self, tiny_pipeline, tiny_folder, photo, mask):
        loaded = MoebiusInpaintPipeline.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]))
        np.testing.assert_array_equal(
            loaded(photo, mask, **STEPS).images[0], tiny_pipeline(photo, mask, **STEPS).images[0]
        )

    def test_saving_again_needs_overwrite(self, tiny_pipeline, tiny_folder):
        with pytest.raises(UserError, match="exists already"):
            tiny_pipeline.save_pretrained(tiny_folder)
        tiny_pipeline.save_pretrained(tiny_folder, overwrite=True)

    def test_what_is_someone_elses_is_not_replaced(self, tiny_pipeline, tmp_path):
        (tmp_path / "README.md").write_text("# mine")
        with pytest.raises(UserError, match="not replaced, it is no pipeline we wrote"):
            tiny_pipeline.save_pretrained(tmp_path, overwrite=True)
        assert (tmp_path / "README.md").read_text() == "# mine"

    def test_converted_layouts(self, tiny_folder, tmp_path):
        shutil.copytree(tiny_folder / "unet", tmp_path / "hub/ft_ffhq")
        with pytest.raises(UserError, match=r"no VAE beside it .*name a converted one"):
            MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub", variant="ft_ffhq")
        shutil.copytree(tiny_folder / "vae", tmp_path / "hub/vae")
        assert (
            MoebiusInpaintPipeline.from_pretrained(
                tmp_path / "hub", variant="ft_ffhq"
            ).defaults.guidance_scale
            == 2.0
        )
        assert MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub/ft_ffhq").defaults.guidance_scale == 2.5
        with pytest.raises(UserError, match="is one converted U-Net; leave out variant"):
            MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub/ft_ffhq", variant="ft_ffhq")
        with pytest.raises(UserError, match="nor the variant pretrained/"):
            MoebiusInpaintPipeline.from_pretrained(tmp_path / "hub")

    @pytest.mark.parametrize(
        ("config", "recorded", "guidance"),
        [
            (UNetConfig.teacher(), None, 4.5),
            (UNetConfig.ablation(1), None, 2.5),
            (UNetConfig.student(), "pretrained", 2.5),
            (UNetConfig.student(), "ft_ffhq", 2.0),
            (UNetConfig.student(), "ft_celebahq", 2.0),
            (UNetConfig.student(), "somebody's", 2.5),
        ],
    )
    def test_some_weights_have_a_guidance_of_their_own(
        self, config, recorded, guidance, tmp_path, monkeypatch
    ):
        """The network says which it is, or what was written down when it was converted."""
        source = {"variant": recorded} if recorded else {}
        read = SimpleNamespace(architecture=config, source=source)
        monkeypatch.setattr(model_folder, "read_config", lambda _: read)
        (tmp_path / "config.json").touch()
        found = model_folder.find_model(tmp_path, vae=tmp_path)
        assert found.sampling.guidance_scale == guidance
        assert found.variant == (recorded if recorded != "somebody's" else None)

    def test_what_a_call_leaves_open_is_the_models(self, tiny_pipeline, tmp_path, monkeypatch):
        mesh = make_mesh(jax.devices()[:1])
        pipe = MoebiusInpaintPipeline(tiny_pipeline.unet, tiny_pipeline.vae, mesh=mesh)
        assert pipe.defaults == SamplingOptions()
        own = {"num_inference_steps": 3, "strength": 1.0, "scheduler": "ddim_trailing", "noise_offset": 0.1}
        own |= {"refine": 0.4}
        pipe.defaults = pipe.defaults.changed(**own)
        pipe.save_pretrained(tmp_path / "p")
        said = json.loads((tmp_path / "p/pipeline.json").read_text())
        assert said == own | {"guidance_scale": 2.5}
        loaded = MoebiusInpaintPipeline.from_pretrained(tmp_path / "p", mesh=mesh)
        assert loaded.defaults == pipe.defaults
        seen = []
        monkeypatch.setattr(pipeline, "inpaint_stream", lambda *a, **_: seen.append(a[3]) or [])
        grey = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
        loaded(*grey)
        assert seen.pop() == SamplingOptions(**own)
        asked = {"num_inference_steps": 9, "strength": 0.5, "scheduler": "ddim", "noise_offset": 0.0}
        asked |= {"refine": 0.0}
        loaded(*grey, guidance_scale=1.0, **asked)
        assert seen.pop() == SamplingOptions(guidance_scale=1.0, **asked)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "guidance_scale: missing field"),
            (
                '"guidance_scale": 1, "inference_steps": 4',
                "inference_steps: unknown .*mean num_inference",
            ),
            ('"guidance_scale": 1, "scheduler": "ddem"', "scheduler is 'ddem'; expected one of ddim"),
            ('"guidance_scale": 1, "scheduler": {}', "scheduler is {}; expected text"),
            ('"guidance_scale": 1, "num_inference_steps": 0', "num_inference_steps is 0"),
            ('"guidance_scale": 1, "strength": "1"', "strength is '1'; expected a number"),
        ],
    )
    def test_a_model_with_wrong_defaults(self, tiny_folder, tmp_path, text, message):
        shutil.copytree(tiny_folder, tmp_path / "p")
        (tmp_path / "p/pipeline.json").write_text(f"{{{text}}}")
        with pytest.raises(UserError, match=rf"pipeline\.json: {message}"):
            MoebiusInpaintPipeline.from_pretrained(tmp_path / "p")

    def test_a_solver_without_a_name_is_not_saved(self, tiny_pipeline, tmp_path):
        class Mine(DDIM):  # with the name of another
            pass

        pipe = MoebiusInpaintPipeline(tiny_pipeline.unet, tiny_pipeline.vae)
        pipe.defaults = pipe.defaults.changed(scheduler=Mine())
        with pytest.raises(UserError, match=r"scheduler .*Mine.* has no name others know"):
            pipe.save_pretrained(tmp_path / "p")
        assert not (tmp_path / "p").exists()

    def test_variant_of_a_saved_pipeline_is_refused(self, tiny_folder):
        with pytest.raises(UserError, match="holds one model; leave out variant='ft_ffhq'"):
            MoebiusInpaintPipeline.from_pretrained(tiny_folder, variant="ft_ffhq")

    def test_damaged_pipeline_file(self, tiny_folder, tmp_path):
        shutil.copytree(tiny_folder, tmp_path / "p")
        (tmp_path / "p/pipeline.json").write_text("[]")
        with pytest.raises(UserError, match=r"pipeline\.json: found \[\]; expected an object"):
            MoebiusInpaintPipeline.from_pretrained(tmp_path / "p")

    @pytest.mark.parametrize("dtype", ["bfloat16", jax.numpy.float16])
    def test_half_precision_runs(self, dtype, tiny_folder, photo, mask):
        mesh = make_mesh(jax.devices()[:1])
        pipe = MoebiusInpaintPipeline.from_pretrained(tiny_folder, dtype=dtype, mesh=mesh)
        assert pipe.unet.precision.stream_dtype == pipe.unet.precision.dtype == jax.numpy.dtype(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (out,) = pipe(photo, mask, **STEPS).images
        assert out.shape == photo.shape

    def test_dtypes_by_name(self, tiny_folder, tiny_pipeline):
        def precision(**dtypes):
            return MoebiusInpaintPipeline.from_pretrained(tiny_folder, **dtypes).unet.precision

        assert precision() == tiny_pipeline.unet.precision  # float32 on a CPU
        mixed = precision(dtype="bfloat16", stream_dtype="float32")
        assert (mixed.dtype, mixed.stream_dtype) == (jax.numpy.bfloat16, jax.numpy.float32)
        assert [auto_dtype(p) for p in ("gpu", "tpu")] == [jax.numpy.float16, jax.numpy.bfloat16]
        assert [auto_vae_dtype(p) for p in ("gpu", "tpu")] == [jax.numpy.float16, jax.numpy.float32]
        with pytest.raises(UserError, match="dtype is 'int8'; expected auto, float32, float16 or bfloat16"):
            precision(dtype="int8")
        half = MoebiusInpaintPipeline.from_pretrained(tiny_folder, vae_dtype="bfloat16")
        assert (half.vae.dtype, tiny_pipeline.vae.dtype) == (jax.numpy.bfloat16, jax.numpy.float32)
        with pytest.raises(UserError, match="vae_dtype is 'int8'; expected auto, float32"):
            precision(vae_dtype="int8")

    def test_leaving_float16s_range_is_an_error_that_names_bfloat16(self, tiny_pipeline, photo, mask):
        def with_large_numbers(dtype):
            unet = abstract_network(tiny_pipeline.unet.config, dtype=dtype, stream_dtype=dtype)
            tensors = network_tensors(tiny_pipeline.unet)
            tensors["conv_in.pointwise.kernel"] = 1e7 * tensors["conv_in.pointwise.kernel"]
            unet = fill(unet, tensors)
            unet.eval()
            return MoebiusInpaintPipeline(unet, tiny_pipeline.vae, mesh=make_mesh(jax.devices()[:1]))

        with pytest.raises(UserError, match="use bfloat16"):
            with_large_numbers(jax.numpy.float16)(photo, mask, **STEPS)
        with_large_numbers(jax.numpy.bfloat16)(photo, mask, **STEPS)

    def test_large_maps_of_a_float16_vae_stay_in_range(self, tiny_pipeline, photo, mask):
        vae = fill(abstract_network(TINY_VAE, dtype=jax.numpy.float16), network_tensors(tiny_pipeline.vae))
        for half in (vae.encoder, vae.decoder):
            for array in (half.conv_in.kernel, half.conv_in.bias):
                array.set_value(3e4 * array[...])
        assert not jax.numpy.isfinite(vae.decode(10 * jax.numpy.ones((1, 8, 8, 4)))).all()
        MoebiusInpaintPipeline(tiny_pipeline.unet, vae, mesh=make_mesh(jax.devices()[:1]))(
            photo, mask, **STEPS
        )
