"""Stored sets of masks, and the tool that draws them."""

import json

import numpy as np
import pytest
from PIL import Image

from moebius_jax import UserError
from moebius_jax.cli.masks import main
from moebius_jax.evaluation import masks
from moebius_jax.evaluation.cases import list_pictures
from moebius_jax.evaluation.masks import (
    KINDS,
    MaskSpec,
    hole_digest,
    read_description,
    set_hash,
    write_set,
)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_mask_depends_on_seed_and_number_only(kind):
    spec = MaskSpec(kind=kind, size=64, seed=3)
    holes = [spec.draw(i) for i in range(4)]
    np.testing.assert_array_equal(spec.draw(2), holes[2])
    assert len({hole_digest(h) for h in holes}) == 4
    assert hole_digest(MaskSpec(kind=kind, size=64, seed=4).draw(0)) != hole_digest(holes[0])
    assert all(h.shape == (64, 64) and h.any() for h in holes)


@pytest.mark.parametrize("size", [128, 512])
def test_ratio_is_kept_and_size_scales(size):
    spec = MaskSpec(kind="lama_medium", size=size, min_ratio=0.4, max_ratio=0.5)
    ratios = [spec.draw(i).mean() for i in range(20)]
    assert 0.4 <= min(ratios) < max(ratios) <= 0.5


def test_large_masks_are_larger_than_small_ones():
    mean = {
        kind: np.mean([MaskSpec(kind=kind, size=128).draw(i).mean() for i in range(60)])
        for kind in ("mat_large", "mat_small", "lama_thin", "lama_thick")
    }
    assert mean["mat_small"] < 0.5 * mean["mat_large"]
    assert mean["lama_thin"] < mean["lama_thick"]


def test_tool_writes_a_set_that_explains_itself(tmp_path, capsys):
    folder = tmp_path / "set"
    assert main(["mat_small", "--size", "96", "--count", "5", "--seed", "7", "--output", str(folder)]) == 0
    digest = json.loads((folder / "masks.json").read_text())["sha256"]
    assert digest in capsys.readouterr().out
    readme = (folder / "README.md").read_text()
    assert "white (255) is the hole" in readme
    assert digest in readme
    assert "`mat_small`" in readme
    files = list_pictures(folder)
    assert list(files) == [f"{i:06}" for i in range(5)]
    spec = MaskSpec(kind="mat_small", size=96, seed=7)
    holes = {name: np.asarray(Image.open(file).convert("L")) > 127 for name, file in files.items()}
    for i, hole in enumerate(holes.values()):
        np.testing.assert_array_equal(hole, spec.draw(i))
    assert set_hash({name: hole_digest(h) for name, h in holes.items()}) == digest
    # Again elsewhere: the same set.
    assert write_set(tmp_path / "again", spec, list(files)) == digest


def test_hash_notices_names_and_pixels():
    a, b = np.zeros((8, 8), bool), np.eye(8, dtype=bool)
    base = set_hash({"a": hole_digest(a), "b": hole_digest(b)})
    assert base == set_hash({"b": hole_digest(b), "a": hole_digest(a)})
    assert base != set_hash({"a": hole_digest(b), "b": hole_digest(a)})
    assert hole_digest(np.zeros((4, 16), bool)) != hole_digest(a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mat_large", "--count", "0"], "--count is 0; expected 1 or more"),
        (["mat_large", "--count", "1", "--size", "20"], "size is 20; expected 64 or more"),
        (["mat_large", "--count", "1", "--seed", "-1"], "seed is -1; expected 0 or more"),
        (
            ["mat_large", "--count", "1", "--ratio", "0.5", "0.4"],
            "ratio is 0.5 to 0.4; expected 0 <= low < high <= 1",
        ),
        (["mat_small", "--count", "1", "--size", "64", "--ratio", "0.9", "1"], "none in 100 draws"),
    ],
)
def test_tool_names_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(masks, "_ATTEMPTS", 100)
    assert main([*arguments, "--output", str(tmp_path / "set")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_a_set_is_never_changed(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    assert main(["mat_small", "--size", "64", "--count", "1", "--output", str(tmp_path / "set")]) == 1
    assert "exists already; a mask set is never changed" in capsys.readouterr().err


def test_descriptions(tmp_path):
    assert read_description(tmp_path) is None
    (tmp_path / "masks.json").write_text("{")
    with pytest.raises(UserError, match=r"masks\.json: not JSON"):
        read_description(tmp_path)
    with pytest.raises(UserError, match="kind is 'round'; expected one of"):
        MaskSpec(kind="round")
