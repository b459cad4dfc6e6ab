"""The page without a server: its arithmetic against the Python it repeats, and a picture in a browser."""

import functools
import http.server
import json
import pathlib
import shutil
import subprocess
import threading
import types

import jax
import numpy as np
import pytest
from chromium import wait_for
from PIL import Image

from moebius_jax import MoebiusInpaintPipeline
from moebius_jax.cli.export import main as export
from moebius_jax.imaging import crop
from moebius_jax.imaging.enlarge import Enlargement
from moebius_jax.imaging.regions import plan_windows
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions, Item, inpaint_stream

WEB = pathlib.Path(__file__).parents[1] / "web"


def whole_numbers(array):
    """For JavaScript's typed arrays; a number or an array of fractions is a mistake in the test."""
    if isinstance(array, np.ndarray) and array.dtype in (bool, np.uint8):
        return array.ravel().astype(int).tolist()
    raise TypeError(f"{type(array).__name__} {getattr(array, 'dtype', '')}")


@pytest.fixture(scope="module")
def javascript(tmp_path_factory):
    """Runs lines of JavaScript after the page's modules; what they `give` comes back."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")

    def run(code, **inputs):
        imports = "".join(
            f'import * as {name} from "{(WEB / name).as_uri()}.js";\n'
            for name in ("random", "resize", "windows", "paste", "enlarge", "inpaint")
        )
        script = tmp_path_factory.mktemp("js") / "run.mjs"
        given = json.dumps(inputs, default=whole_numbers)
        script.write_text(
            f"{imports}const given = {given};\n"
            "const give = (value) => console.log(JSON.stringify(value));\n" + code
        )
        out = subprocess.run([node, script], capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    return run


def test_random_numbers_are_jaxs(javascript):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2**31 + 5), 7), 3)
    ours = javascript(
        "give([...random.normal(random.foldIn(random.foldIn(random.key(given.seed), 7), 3), 4000)]);",
        seed=2**31 + 5,
    )
    np.testing.assert_allclose(ours, jax.random.normal(key, (4000,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(37, 128), (200, 128), (128, 128)])
def test_resizing_is_pillows(javascript, before, after):
    rgb = np.random.default_rng(0).integers(0, 256, (before, before, 3), np.uint8)
    ours = javascript(
        "give([...resize.resizeSquare(Uint8Array.from(given.data), given.from, given.to, 3)]);",
        data=rgb,
        **{"from": before, "to": after},
    )
    theirs = np.asarray(Image.fromarray(rgb).resize((after, after), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.reshape(ours, theirs.shape), theirs)


def specks(height=90, width=140):
    """Regions of all kinds: touching, near, far, at the edge."""
    hole = np.zeros((height, width), bool)
    hole[5:12, 5:30] = hole[14:20, 31:40] = hole[60:80, 100:130] = hole[88:, :9] = True
    return hole


def test_windows_are_pythons(javascript):
    hole = specks()
    ours = javascript(
        "const all = windows.planWindows(Uint8Array.from(given.hole), 90, 140, 32);"
        "give(all.map((w) => [w.top, w.left, w.side, [...w.labels].map((l) => Number(w.members.has(l)))]));",
        hole=hole,
    )
    theirs = plan_windows(hole, 32)
    assert len(theirs) > 1
    assert [tuple(w[:3]) for w in ours] == [(w.top, w.left, w.side) for w in theirs]
    for (*_, mine), window in zip(ours, theirs, strict=True):
        expected = np.isin(window.labels, window.regions)
        np.testing.assert_array_equal(np.reshape(mine, hole.shape), expected)


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20), (1, 40)])
def test_a_window_beyond_the_image_is_mirrored(javascript, height, width):
    """Cut as Python cuts, mirror, box and all, where the window is larger than the image's shorter side."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    hole = np.zeros((height, width), bool)
    (hole if width > height else hole.T)[min(height, width) // 2, 2:-2] = True
    size = 16
    windows = plan_windows(hole, size, None)
    window = max(windows, key=lambda w: w.side)
    assert window.side > min(height, width)
    image, square = crop.cut(rgb, hole, window, size)
    ours = javascript(
        "const all = windows.planWindows(Uint8Array.from(given.hole), given.height, given.width, given.size);"
        "const w = all[given.number];"
        "const cut = (data, c) => windows.extract(Uint8Array.from(data), given.height, given.width, c, w);"
        "const image = resize.resizeSquare(cut(given.rgb, 3), w.side, given.size, 3);"
        "const mask = resize.resizeHole(cut(given.hole, 1), w.side, given.size);"
        "give([[...image], [...mask].map(Boolean)]);",
        hole=hole,
        rgb=rgb,
        height=height,
        width=width,
        size=size,
        number=windows.index(window),
    )
    np.testing.assert_array_equal(np.reshape(ours[0], image.shape), image)
    np.testing.assert_array_equal(np.reshape(ours[1], square.shape), square)


@pytest.mark.parametrize(("before", "after"), [(300, 7), (277, 188), (579, 350), (37, 37), (16, 40)])
def test_holes_are_resized_as_pythons(javascript, before, after):
    """Not one pixel is lost: neither one of 1,849 in one, nor one whose centre lies between two."""
    hole = np.random.default_rng(before).random((before, before)) < 2 / before**1.5
    hole[before // 2, :2] = True
    shrunken = crop.resized_hole(np.eye(before, dtype=bool), after)
    assert np.diag(shrunken).all()
    ours = javascript(
        "give([...resize.resizeHole(Uint8Array.from(given.hole), given.from, given.to)]);",
        hole=hole,
        **{"from": before, "to": after},
    )
    np.testing.assert_array_equal(np.reshape(ours, (after, after)), crop.resized_hole(hole, after))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(90, 140, 16), (70, 100, 17), (60, 60, 48), (60, 60, 49)]
)
def test_tiles_are_pythons(javascript, height, width, size):
    """A window from the model's size to its own, by a painter whose every tile depends on its number."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (height, width, 3), np.uint8)
    hole = np.zeros((height, width), bool)
    hole[5:50, 8:55] = True
    hole[height - 4 :, :4] = True  # another window's, in this one too
    windows = plan_windows(hole, size)
    window = max(windows, key=lambda w: w.side)
    image, square = crop.cut(rgb, hole, window, size)
    painted = rng.integers(0, 256, image.shape, np.uint8)
    enlargement, total = Enlargement(rgb, window, image, square, painted), 0
    while tiles := enlargement.next_tiles():
        total += len(tiles)
        for tile in tiles:
            enlargement.put(
                tile, np.where(tile.hole[..., None], tile.image // 2 + tile.number % 100, tile.image)
            )
    ours = javascript(
        "const { height, width, size } = given;"
        "const [rgb, hole] = [Uint8Array.from(given.rgb), Uint8Array.from(given.hole)];"
        "const w = windows.planWindows(hole, height, width, size)[given.number];"
        "const cut = (data, c) => windows.extract(data, height, width, c, w);"
        "const window = { rgb: cut(rgb, 3), hole: cut(hole, 1), side: w.side };"
        "const paint = (tile, open, k) =>"
        "  tile.map((v, i) => (open[Math.floor(i / 3)] ? Math.floor(v / 2) + (k % 100) : v));"
        "const stages = enlarge.planTiles(w, height, width, size);"
        "const painted = Uint8Array.from(given.painted);"
        "const image = resize.resizeSquare(window.rgb, w.side, size, 3);"
        "const first = { size, image, hole: resize.resizeHole(window.hole, w.side, size), painted };"
        "const out = await enlarge.enlarge(window, stages, first, paint);"
        "give([stages.flatMap((stage) => stage.tiles).length, [...out]]);",
        rgb=rgb,
        hole=hole,
        painted=painted,
        height=height,
        width=width,
        size=size,
        number=windows.index(window),
    )
    assert ours[0] == total
    assert bool(total) == (window.side >= 1.25 * size)
    if not total:
        return
    difference = np.abs(np.reshape(ours[1], enlargement.painted.shape) - enlargement.painted.astype(int))
    assert difference.max() <= 1  # sums of floats that end at a half
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("blur", [0, 4])
def test_pasting_is_pythons(javascript, blur):
    rng = np.random.default_rng(0)
    hole, rgb = specks(), rng.integers(0, 256, (90, 140, 3), np.uint8)
    for number, window in enumerate(plan_windows(hole, 32)):
        result = rng.integers(0, 256, (32, 32, 3), np.uint8)
        ours = javascript(
            "const hole = Uint8Array.from(given.hole), rgb = Uint8Array.from(given.rgb);"
            "const window = windows.planWindows(hole, 90, 140, 32)[given.number];"
            "const result = Uint8Array.from(given.result);"
            "paste.paste(rgb, 90, 140, result, 32, window, given.blur); give([...rgb]);",
            hole=hole,
            rgb=rgb,
            result=result,
            number=number,
            blur=blur,
        )
        theirs = crop.paste(rgb, result, window, blur=blur, match_color=True)
        np.testing.assert_array_equal(np.reshape(ours, rgb.shape), theirs)


class Numbered:
    """In the place of a sampler: a square's fill tells its number."""

    config = types.SimpleNamespace(latent_size=4)
    image_size = 32

    def __init__(self):
        self.numbers = []

    def __call__(self, images, holes, seeds, *_):
        numbers = seeds[:, 2].astype(int)
        self.numbers += numbers.tolist()
        level = (numbers // 4096 * 7 + numbers % 4096 * 40 + 5) % 125
        fill = images // 2 + level[:, None, None, None].astype(np.uint8)
        return np.where(holes[..., None], fill, images), np.ones(len(images), bool)


@pytest.mark.parametrize(
    ("height", "width", "boxes"),
    [
        (90, 400, [(5, 80, 5, 200), (80, 90, 300, 330)]),
        (15, 400, [(0, 15, 20, 100), (0, 15, 103, 112), (3, 9, 200, 260)]),
        (277, 277, [(138, 270, 20, 240), (0, 3, 0, 3)]),
        (200, 1, [(20, 150, 0, 1)]),
    ],
)
def test_squares_and_their_numbers_are_pythons(javascript, height, width, boxes):
    """All but the network: several windows, beyond the image's edge, tiles, order and pasting."""
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    hole = np.zeros((height, width), bool)
    for top, bottom, left, right in boxes:
        hole[top:bottom, left:right] = True
    sampler, item = Numbered(), Item(rgb=rgb, mask=hole.astype(np.uint8) * 255, seed=3, index=5)
    (expected,) = inpaint_stream(sampler, [item], InpaintOptions(), SamplingOptions(refine=0.5), batch_size=1)
    ours = javascript(
        "const base = random.foldIn(random.key(3), 5), numbers = new Map();"
        "for (let k = 0; k < 300; k++) for (let n = 0; n < 4; n++)"
        "  numbers.set(random.foldIn(base, n + 4096 * k).join(), n + 4096 * k);"
        "const schedules = { ddim: { 20: { timesteps: [1], refining: { timesteps: [1, 2] } } } };"
        "const manifest = { image_size: 32, guidance_scale: 1, schedules };"
        "const page = new inpaint.Inpainter(null, manifest, null, 'none'), seen = [];"
        "page.square = async (image, open, key, table, scale, tick) => {"
        "  const number = numbers.get(key.join());"
        "  seen.push(number);"
        "  table.timesteps.forEach(tick);"
        "  const level = (Math.floor(number / 4096) * 7 + (number % 4096) * 40 + 5) % 125;"
        "  return image.map((v, i) => (open[Math.floor(i / 3)] ? Math.floor(v / 2) + level : v));"
        "};"
        "let progress = [];"
        "const options = { seed: 3, index: 5, onStep: (done, total) => (progress = [done, total]) };"
        "const { rgb, hole, height, width } = given;"
        "const out = await page.inpaint(Uint8Array.from(rgb), Uint8Array.from(hole), height, width, options);"
        "give([[...out], seen, progress]);",
        rgb=rgb,
        hole=hole,
        height=height,
        width=width,
    )
    assert sorted(ours[1]) == sorted(sampler.numbers)
    tiles = [number for number in ours[1] if number >= 4096]
    assert tiles
    assert ours[2] == [len(ours[1]) + len(tiles)] * 2
    np.testing.assert_array_equal(np.reshape(ours[0], rgb.shape), expected.rgb)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page with an export of the network that comes along, on a port of this machine."""
    pytest.importorskip("jax2onnx")
    if not (WEB / "node_modules").exists():
        pytest.skip("no onnxruntime-web here (npm ci --prefix web)")
    root = tmp_path_factory.mktemp("web")
    for file in WEB.glob("*.*"):
        if file.suffix in (".js", ".html", ".css"):
            shutil.copy(file, root)
    (root / "node_modules").symlink_to(WEB / "node_modules")
    assert export(["tiny", str(root / "model"), "--format", "onnx"]) == 0
    handler = functools.partial(Quiet, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "end"), [(100, 140, (60, 80)), (200, 180, (130, 160))])
def test_a_picture_is_pythons(served, browser, height, width, end):
    """The same seed, step table and pasting: at most two grey levels from the pipeline, nearly all equal. The
    larger hole is painted again in tiles."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x, y, 255 - x], -1).astype(np.uint8) + rng.integers(0, 9, (height, width, 3), np.uint8)
    hole = np.zeros((height, width), bool)
    hole[30 : end[0], 40 : end[1]] = True
    options = {"num_inference_steps": 5, "scheduler": "dpmpp_2m", "seed": 11, "output_type": "np"}
    pipeline = MoebiusInpaintPipeline.from_pretrained("tiny")
    expected = pipeline(rgb, hole.astype(np.uint8) * 255, **options).images[0]
    browser.get(f"{served}/index.html?wasm")
    wait_for(lambda: "Ready" in browser.find_element("id", "status").text)
    browser.set_script_timeout(120)
    found = browser.execute_async_script(
        """
        const [rgb, hole, height, width, done] = arguments;
        const pixels = new ImageData(width, height);
        for (let i = 0; i < width * height; i++) {
          pixels.data.set([rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], 255], 4 * i);
        }
        const options = { seed: 11, solver: "dpmpp_2m", steps: 5 };
        moebius.inpaintPixels(pixels, Uint8Array.from(hole), options)
          .then((out) => done([...out.data])).catch((error) => done(String(error)));
        """,
        rgb.ravel().tolist(),
        hole.ravel().astype(int).tolist(),
        height,
        width,
    )
    assert not isinstance(found, str), found
    result = np.reshape(found, (height, width, 4))[..., :3]
    difference = np.abs(result - expected.astype(int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02
    assert (expected != rgb).any()


@pytest.mark.slow
def test_a_visitor_stops_a_long_painting(served, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8)).save(
        tmp_path / "p.png"
    )
    browser.get(f"{served}/index.html?wasm")
    wait_for(lambda: "Ready" in browser.find_element("id", "status").text)
    assert browser.find_element("id", "refining").is_displayed()
    browser.find_element("id", "file").send_keys(str(tmp_path / "p.png"))
    wait_for(lambda: "Paint over" in browser.find_element("id", "status").text)
    stroke = ActionChains(browser).move_to_element_with_offset(browser.find_element("id", "strokes"), -200, 0)
    stroke.click_and_hold().move_by_offset(200, 50).move_by_offset(200, -50).release().perform()
    browser.find_element("id", "run").click()
    wait_for(lambda: "Painting" in browser.find_element("id", "status").text)
    browser.find_element("id", "run").click()
    wait_for(lambda: "Painting" not in browser.find_element("id", "status").text)
    assert browser.find_element("id", "status").text == "Stopped; nothing is changed."
    assert browser.find_element("id", "run").text == "Inpaint"
    assert not browser.find_element("id", "download").is_displayed()
