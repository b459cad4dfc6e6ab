"""A folder of weights is what was written, or is refused."""

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from conftest import not_as_written

from moebius_jax import UserError, load_unet
from moebius_jax.cli.export import main as export
from moebius_jax.cli.sample import main as sample
from moebius_jax.weights.checksums import FILE, verify_checksums

TINY = Path(str(files("moebius_jax") / "tiny"))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    return tmp_path / "vae"


def flip(path, position, bits=1):
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def replace(path, target):
    path.unlink()
    path.symlink_to(target)


def test_the_package_carries_sound_weights():
    for part in ("unet", "vae"):
        assert (TINY / part / FILE).is_file()
        verify_checksums(TINY / part)
        listed = {line.split()[1] for line in (TINY / part / FILE).read_text().splitlines()}
        there = {p.relative_to(TINY / part).as_posix() for p in (TINY / part).rglob("*") if p.is_file()}
        assert there - {FILE, "weights/_CHECKPOINT_METADATA"} == listed  # nothing of former weights is left


def test_no_byte_may_change(folder):
    rng = np.random.default_rng(0)
    paths = [
        p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "_CHECKPOINT_METADATA"
    ]  # it says when and by which Orbax
    assert len(paths) > 5
    for path in paths:
        for position in rng.integers(path.stat().st_size, size=4):
            flip(path, position)
            with pytest.raises(UserError) as caught:
                verify_checksums(folder)
            named = folder if path.name == FILE else path  # a changed sum names another file, or none
            assert str(caught.value).startswith(str(named))
            flip(path, position)
    verify_checksums(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: missing, and listed"),
        (lambda f: (f / FILE).write_text("abc"), "line 1 is no SHA-256"),
        (lambda f: (f / FILE).write_bytes(b"\xff"), "cannot be read"),
        (lambda f: replace(f / "weights/_METADATA", "nowhere"), "_METADATA: missing, and listed"),
        (lambda f: replace(f / "weights/_METADATA", "/dev/zero"), "_METADATA: is no ordinary file"),
    ],
)
def test_what_else_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        verify_checksums(folder)


def test_folders_without_sums_other_files_and_links_pass(folder):
    (folder / "desktop.ini").write_text("")
    verify_checksums(folder)
    (folder / "weights").rename(folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")
    verify_checksums(folder)
    (folder / FILE).unlink()
    (folder / "more").write_text("")
    verify_checksums(folder)


@pytest.mark.slow
def test_loading_and_the_command_line_ask(tmp_path, capsys, monkeypatch):
    shutil.copytree(TINY, tmp_path / "tiny")
    damaged = max((tmp_path / "tiny/unet/weights").rglob("*"), key=lambda p: p.stat().st_size)
    flip(damaged, damaged.stat().st_size // 2)
    with pytest.raises(UserError, match="not what was written"):
        load_unet(tmp_path / "tiny/unet")
    photo = Path(__file__).parents[1] / "examples/coffee"
    options = ["--image", f"{photo}.jpg", "--mask", f"{photo}_mask.png", "--output", str(tmp_path / "o.png")]
    options += ["--num-inference-steps", "1"]
    assert sample(["--model", str(tmp_path / "tiny"), *options]) == 1
    assert f"{damaged}: not what was written" in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()
    shutil.copy(next((TINY / "unet").rglob(damaged.name)), damaged)
    not_as_written(tmp_path / "tiny/unet/config.json")
    assert sample(["--model", str(tmp_path / "tiny"), *options]) == 1
    assert sample(["--model", str(tmp_path / "tiny"), *options, "--no-verify"]) == 0
    written = []
    monkeypatch.setattr("moebius_jax.export.write.export_model", lambda *_, **__: written.append(1) or [])
    (tmp_path / "there").mkdir()
    exported = [str(tmp_path / "tiny"), str(tmp_path / "there"), "--overwrite"]
    assert export(exported) == 1
    assert "not what was written" in capsys.readouterr().err
    assert export([*exported, "--no-verify"]) == 0
    assert written == [1]
