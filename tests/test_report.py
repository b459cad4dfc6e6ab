"""Reports: which cases are shown, and the page in a real browser."""

import json
import math
import re

import numpy as np
import pytest
from test_metrics import blurred, pictures, some_holes

from moebius_jax.evaluation.metrics.scores import Scores
from moebius_jax.evaluation.report.document import Run, build_document, finite
from moebius_jax.evaluation.report.html import pick_cases, ranking_metric, render_html
from moebius_jax.evaluation.report.markdown import render_markdown
from moebius_jax.evaluation.report.table import render_csv

N = 15
METRICS = ("fid", "lpips", "psnr", "l1")


def made_up_scores(names=None):
    rng = np.random.default_rng(0)
    return Scores(
        names=names or [f"place {i:02}" for i in range(N)],
        ratios=np.linspace(0.05, 0.95, N),
        values={k: rng.random((N, 2)) for k in ("lpips_alex", "lpips_vgg", "psnr", "l1")},
        features={
            (kind, part): rng.standard_normal((N, 8))
            for kind in ("truth", "result")
            for part in ("whole", "hole")
        },
        images_sha256="ab" * 32,
        masks_sha256="cd" * 32,
    )


def document(scores, **changes):
    enough = changes.get("enough", 2)
    settings = {"sampling": {"guidance_scale": 2.0}}
    run = Run.of(scores, METRICS, enough, label="", settings=settings, seconds=2.0, painted=N)
    facts = {
        "kind": "celebahq",
        "enough": 2,
        "protocol": {"name": "celebahq", "title": "CelebA-HQ (512)", "dataset": "d", "masks_like": "m"},
        "departures": ["15 images, the protocol has 3,000"],
        "sources": {"images": {"folder": "photos <b>&"}, "model": {"name": "m", "unet_sha256": "ef"}},
        "command": ["python", "evaluate.py"],
        "created": "2026-01-01 00:00 UTC",
        "preparation": "as they are",
        "choices": ["sampling starts from pure noise"],
        **changes,
    }
    return finite(build_document([run], **facts))


@pytest.fixture
def page(tmp_path):
    """A page about fifteen cases; its scores and pictures are made up."""
    scores = made_up_scores()
    images, holes = pictures(N), some_holes(N)
    painted = blurred(images, 3)

    def load(name):
        i = scores.names.index(name)
        return images[i], painted[i], holes[i]

    file = tmp_path / "report.html"
    file.write_text(render_html(document(scores), scores, load))
    return file


class TestPickCases:
    def test_best_middle_and_worst(self):
        values = np.array([5.0, 1, 4, 2, 3, 9, 8, 7, 6, 0, math.nan])
        groups = pick_cases(values, higher_is_better=False, n=2)
        assert {k: [values[i] for i in v] for k, v in groups.items()} == {
            "Best": [0, 1],
            "Median": [4, 5],
            "Worst": [8, 9],
        }
        assert pick_cases(values, higher_is_better=True, n=2)["Best"] == [5, 6]

    @pytest.mark.parametrize("count", range(12))
    def test_no_case_twice(self, count):
        groups = pick_cases(np.arange(float(count)), higher_is_better=False)
        shown = [i for rows in groups.values() for i in rows]
        assert len(shown) == len(set(shown)) == count
        assert shown == sorted(shown)

    def test_ranked_by_what_people_see(self):
        scores = made_up_scores()
        assert ranking_metric(scores) == ("lpips_alex", 1)
        del scores.values["lpips_alex"]
        assert ranking_metric(scores) == ("l1", 1)
        scores.ratios[:] = math.nan
        assert ranking_metric(scores) == ("l1", 0)


class TestDocument:
    def test_json_has_no_infinity(self):
        scores = made_up_scores()
        scores.values["psnr"][:] = math.inf, math.nan
        found = document(scores)
        assert found["runs"][0]["all"]["psnr"]["whole"] == "Infinity"
        json.loads(json.dumps(found, allow_nan=False))
        assert found["runs"][0]["images_per_second"] == 7.5
        assert "| PSNR ↑ | ∞ |" in render_markdown(found)

    def test_set_metrics_need_enough_images(self):
        found = document(made_up_scores(), enough=16)
        assert found["runs"][0]["all"]["fid"] == {"whole": None, "hole": None}
        assert "| FID ↓ | – | – |" in render_markdown(found)
        assert "given for 16 images or more" in render_markdown(found)

    def test_bins(self):
        rows = document(made_up_scores())["runs"][0]["bins"]
        assert [r["low"] for r in rows] == [i / 10 for i in range(10)]
        assert sum(r["count"] for r in rows) == N

    def test_csv(self):
        lines = render_csv(made_up_scores(names=[f"a,{i}" for i in range(N)])).splitlines()
        assert lines[0].startswith("name,hole_ratio,lpips_alex,lpips_alex_hole")
        assert lines[1].startswith('"a,0",0.05,')
        assert len(lines) == N + 1


@pytest.mark.slow
class TestPage:
    def test_needs_nothing_else(self, page):
        text = page.read_text()
        assert "photos &lt;b&gt;&amp;" in text
        assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
        assert not re.findall(r"@import|url\((?!#)", text)
        assert text.count("data:image/jpeg") == 3 * 12

    def test_in_a_browser(self, page, browser):
        """The page as it comes up, then every control."""
        browser.get(page.as_uri())
        run = browser.execute_script
        assert "CelebA-HQ" in browser.title
        sizes = run("return [...document.images].map(i => [i.complete, i.naturalWidth])")
        assert len(sizes) == 3 * 12 + 2
        assert all(complete and width > 0 for complete, width in sizes)
        charts = run(
            "return [...document.querySelectorAll('.charts svg')].map(s => s.getBoundingClientRect().height)"
        )
        assert len(charts) == 5
        assert min(charts) > 100
        headings = [h.text for h in browser.find_elements("tag name", "h3")]
        assert headings[:3] == ["Best", "Median", "Worst"]
        assert "5.39" in browser.find_element("tag name", "body").text
        # Nothing is wider than the window, also on a phone.
        for width in (1200, 390):
            browser.set_window_size(width, 900)
            assert run("return document.documentElement.scrollWidth - window.innerWidth") <= 0

        left, right = (browser.find_element("id", name) for name in ("left", "right"))
        pressed = browser.find_element("css selector", "button.case[aria-pressed=true]")
        cells = {
            p: pressed.find_element("css selector", f"img[data-part={p}]")
            for p in ("original", "masked", "result")
        }
        assert left.get_attribute("src") == cells["original"].get_attribute("src")
        assert right.get_attribute("src") == cells["result"].get_attribute("src")

        slider = browser.find_element("id", "slider")
        before = right.value_of_css_property("clip-path")
        slider.send_keys("\ue014" * 10)  # right arrow
        assert slider.get_attribute("value") == "60"
        assert right.value_of_css_property("clip-path") != before

        browser.find_element("css selector", "input[value=masked]").click()
        assert left.get_attribute("src") == cells["masked"].get_attribute("src")

        last = browser.find_elements("css selector", "button.case")[-1]
        last.click()
        assert last.get_attribute("aria-pressed") == "true"
        assert pressed.get_attribute("aria-pressed") == "false"
        assert last.get_attribute("data-name") in browser.find_element("id", "caption").text
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
