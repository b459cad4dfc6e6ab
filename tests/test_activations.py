"""`examples/activations.py`: a picture of what networks look at."""

import numpy as np
import pytest
from conftest import TINY_UNET, TINY_VAE
from PIL import Image

from examples.activations import main
from moebius_jax import MoebiusInpaintPipeline


@pytest.fixture
def arguments(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(np.uint8(255) * (np.arange(80)[None] > np.full((60, 1), 40))).save(tmp_path / "m.png")
    return ["--image", f"{tmp_path}/i.png", "--mask", f"{tmp_path}/m.png", "--output", f"{tmp_path}/maps.png"]


@pytest.mark.long
def test_row_for_each_network(arguments, tmp_path):
    deeper = TINY_UNET.replace(channels=(32, 32, 64), transformers=(True, False, True))
    for name, config in (("a", TINY_UNET), ("b", deeper)):
        MoebiusInpaintPipeline.untrained(config, TINY_VAE).save_pretrained(tmp_path / name)
    assert main([f"{tmp_path}/a", f"{tmp_path}/b", *arguments]) == 0
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.size == (6 * 2 * 120, 2 * 288)  # three levels down and up, two networks
        right, low = picture.width * 5 // 6, picture.height // 2
        empty = np.asarray(picture.convert("L"))[: low - 20, right + 20 : -20]
        assert empty.min() == 255  # the first network has two levels up
    assert main([f"{tmp_path}/a", *arguments]) == 1  # it is there already


def test_wrong_timestep(arguments, capsys):
    assert main(["tiny", *arguments, "--timestep", "1000"]) == 1
    assert capsys.readouterr().err == "error: --timestep is 1000; expected 0 to 999\n"
