"""The page: what it does with files and strokes, its API, and a visitor with a real browser."""

import io
import json
import time

import numpy as np
import pytest
from chromium import wait_for
from PIL import Image

from moebius_jax import MoebiusInpaintPipeline, UserError
from moebius_jax.demo import page
from moebius_jax.demo.painter import PREVIEW, Painter, Wishes, strokes_of

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def painter():
    return Painter(MoebiusInpaintPipeline.from_pretrained("tiny"), max_megapixels=7, max_results=2)


@pytest.fixture(scope="module")
def photo():
    """Smooth colours with noise, so that a lost level shows."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:150, :200]
    smooth = np.stack([x, y, 255 - x], -1) + rng.integers(0, 20, (150, 200, 3))
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.fixture
def file(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def strokes(height, width):
    marked = np.zeros((height, width), bool)
    marked[height // 3 : height // 2, width // 3 : width // 2] = True
    return marked


def test_the_page_begins_with_the_models_own_steps(painter, monkeypatch):
    def slider():
        with gradio.Blocks():
            (found,) = (c for c in page._settings(painter) if c.label == "Steps")
        return found.minimum, found.value, found.maximum

    assert slider() == (1, 1, 100)
    usual = painter.pipeline.defaults
    many = usual.changed(num_inference_steps=200, strength=0.25, scheduler="ddim")
    monkeypatch.setattr(painter.pipeline, "defaults", many)
    assert slider() == (4, 200, 200)


class TestPainter:
    def test_strokes_on_a_preview_reach_the_photo(self, painter, tmp_path):
        Image.new("RGB", (3000, 2000), "teal").save(tmp_path / "large.jpg")
        preview = painter.preview(tmp_path / "large.jpg")
        assert max(preview.size) == PREVIEW
        marked = strokes(*preview.size[::-1])
        mask = painter.mask(painter.open(tmp_path / "large.jpg"), marked, None)
        assert mask.shape == (2000, 3000)
        assert (mask > 0).mean() == pytest.approx(marked.mean(), rel=0.01)

    def test_strokes_and_a_file_are_one_mask(self, painter, file, photo, tmp_path):
        other = np.zeros(photo.shape[:2], np.uint8)
        other[-20:] = 255
        Image.fromarray(other).save(tmp_path / "mask.png")
        both = painter.mask(painter.open(file), strokes(150, 200), tmp_path / "mask.png")
        np.testing.assert_array_equal(both > 0, strokes(150, 200) | (other > 0))

    def test_only_the_hole_changes_and_alpha_stays(self, painter, photo, tmp_path):
        alpha = np.full(photo.shape[:2], 200, np.uint8)
        Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "alpha.png")
        picture = painter.open(tmp_path / "alpha.png")
        mask = painter.mask(picture, strokes(150, 200), None)
        seen = []
        wishes = Wishes(steps=3, results=2, mask_blur=0)
        painted = painter.paint(picture, mask, wishes, lambda *step: seen.append(step))
        results, paths = [], []
        for path in painted:
            paths.append(path)
            results.append(np.asarray(Image.open(path)))
        assert [path.name for path in paths] == ["alpha_0.png", "alpha_1.png"]
        assert not [path for path in paths if path.parent.exists()]  # nothing is left behind
        for result in results:
            np.testing.assert_array_equal(result[..., 3], alpha)
            np.testing.assert_array_equal(result[mask == 0][:, :3], photo[mask == 0])
            assert (result[mask > 0][:, :3] != photo[mask > 0]).any()
        assert (results[0] != results[1]).any()
        assert seen == [(1, 3), (2, 3), (3, 3)] * 2
        seen.clear()
        list(painter.paint(picture, mask, Wishes(), lambda *step: seen.append(step)))
        assert seen == [(1, 1)]  # tiny's own step

    def test_large_holes_are_refined_as_wished(self, painter, photo, file):
        picture = painter.open(file)
        large = np.zeros(photo.shape[:2], np.uint8)
        large[20:130, 20:180] = 255
        passes = {}
        for refine in (0, 0.5, None):
            seen = []
            wishes = Wishes(refine=refine)
            list(painter.paint(picture, large, wishes, lambda *step, seen=seen: seen.append(step)))
            passes[refine] = seen
        batches = len(passes[None]) - 1
        assert passes[0] == [(1, 1)]
        assert passes[0.5] == passes[None] == [(1, 1), *((k, None) for k in range(1, batches + 1))]
        assert batches > 0

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("broken.png", b"\x89PNG\r\n\x1a\nnothing more", "broken.png: "),
            ("text.jpg", b"not a picture", "text.jpg: not an image of a kind that is read"),
        ],
    )
    def test_files_are_named_without_their_folder(self, painter, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            painter.open(tmp_path / name)
        assert str(error.value).startswith(message)
        assert str(tmp_path) not in str(error.value)

    def test_limits(self, painter, file, tmp_path):
        Image.new("L", (4000, 2000)).save(tmp_path / "wide.png")
        Image.new("L", (20, 10)).save(tmp_path / "small.png")
        with pytest.raises(UserError, match=r"wide\.png: 4000 x 2000 pixels are 8 megapixels; .* at most 7"):
            painter.open(tmp_path / "wide.png")
        picture = painter.open(file)
        with pytest.raises(UserError, match="nothing is marked"):
            painter.mask(picture, np.zeros((15, 20), bool), None)
        with pytest.raises(UserError, match=r"mask is 20 x 10 pixels and photo\.png is 200 x 150"):
            painter.mask(picture, None, tmp_path / "small.png")
        with pytest.raises(UserError, match="results is 3; expected 1 to 2"):
            next(painter.paint(picture, np.full((150, 200), 255, np.uint8), Wishes(results=3)))

    def test_layers(self):
        def file(array, format="PNG"):
            out = io.BytesIO()
            Image.fromarray(array).save(out, format)
            return out.getvalue()

        assert strokes_of([]) is None
        layers = np.zeros((2, 2, 2, 4), np.uint8)
        layers[0, 0, 0, 3] = layers[1, 1, 1, 3] = 255
        np.testing.assert_array_equal(strokes_of(list(map(file, layers))), np.eye(2, dtype=bool))
        for wrong in (
            [b"%!PS-Adobe-3.0 EPSF-3.0"],
            [file(layers[0]), file(np.zeros((3, 2, 4), np.uint8))],
            [file(np.zeros((1, PREVIEW + 1, 4), np.uint8))],
            [file(layers[0])] * 9,
        ):
            with pytest.raises(UserError, match="strokes: "):
                strokes_of(wrong)


def test_a_visitor_chooses_by_number(painter, file, tmp_path):
    """A browser's event may name any file of the server."""
    from types import SimpleNamespace

    from moebius_jax.demo.page import Actions

    event = SimpleNamespace(index=1, value={"image": {"path": str(tmp_path / "secret.png")}})
    slider, download = Actions(painter).choose(["first.png", "second.png"], str(file), event)
    assert (slider["value"][1], download["value"]) == ("second.png", "second.png")


@pytest.fixture(scope="module")
def address(painter):
    from moebius_jax.demo.page import Address, build, launch

    page = build(painter)
    _, url, _ = launch(page, Address(), prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


@pytest.mark.slow
def test_programs_can_use_it(address, file, photo, tmp_path):
    mask = strokes(150, 200).astype(np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    client = gradio_client.Client(address, verbose=False, download_files=str(tmp_path))
    handle = gradio_client.handle_file
    arguments = {"photo": handle(file), "editor": None, "steps": 2, "mask_blur": 0, "api_name": "/inpaint"}
    _, _, path, *_ = client.predict(mask=handle(tmp_path / "mask.png"), **arguments)
    result = np.asarray(Image.open(path["value"] if isinstance(path, dict) else path))
    np.testing.assert_array_equal(result[mask == 0], photo[mask == 0])
    with pytest.raises(Exception, match="nothing is marked"):
        client.predict(mask=None, **arguments)


@pytest.mark.slow
def test_a_visitor_paints(address, browser, file, photo, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    def shown(selector):
        return [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]

    browser.get(address)
    (upload,) = wait_for(lambda: browser.find_elements("css selector", "#photo input[type=file]"))
    upload.send_keys(str(file))
    canvas = wait_for(lambda: [e for e in shown("#editor canvas") if e.size["width"] > 50])[0]
    time.sleep(2)  # the editor fades in
    stroke = ActionChains(browser).move_to_element_with_offset(canvas, -20, 0).click_and_hold()
    for _ in range(4):
        stroke = stroke.move_by_offset(10, 2)
    stroke.release().perform()
    time.sleep(1)
    shown("#run")[0].click()
    wait_for(lambda: shown("#download"))[0].click()
    downloaded = wait_for(lambda: list((tmp_path / "downloads").glob("*.png")))
    result = np.asarray(Image.open(downloaded[0]))
    changed = (result != photo).any(-1)
    assert result.shape == photo.shape
    assert 0.005 < changed.mean() < 0.5
    assert not changed[:10].any()  # the stroke is in the middle
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requests if m["method"] == "Network.requestWillBeSent"]
    asked = [u for u in urls if u.startswith(("http:", "https:"))]  # the browser's own pages aside
    assert asked
    assert not [u for u in asked if not u.startswith(address)]


@pytest.mark.slow
def test_a_broken_file_is_a_notice(address, browser, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    browser.get(address)
    (upload,) = wait_for(lambda: browser.find_elements("css selector", "#photo input[type=file]"))
    upload.send_keys(str(tmp_path / "broken.png"))
    notice = wait_for(lambda: browser.find_elements("css selector", ".toast-body"))[0].text
    assert "broken.png: " in notice
    assert "Traceback" not in notice
