"""`convert_weights.py` as a person types it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synth
from safetensors.numpy import load_file, save_file

from moebius_jax.cli.convert import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_convert_verify_export(student_mini_file, tmp_path, capsys):
    assert main([str(student_mini_file), str(tmp_path / "out"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "student, " in out
    assert "1079 tensors verified" in out
    assert main([str(tmp_path / "out"), "--export", str(tmp_path / "back.safetensors")]) == 0
    assert "1203 tensors" in capsys.readouterr().out
    back = load_file(tmp_path / "back.safetensors")
    for name, value in synth.state_dict("student_mini").items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.slow
def test_damaged_weights_are_one_line(student_mini_file, tmp_path):
    main([str(student_mini_file), str(tmp_path / "out")])
    (tmp_path / "out/SHA256SUMS").unlink()  # what the storage library itself makes of it
    for data in (tmp_path / "out/weights").rglob("d/*"):
        data.unlink()
    result = subprocess.run(
        [
            sys.executable,
            "convert_weights.py",
            str(tmp_path / "out"),
            "--export",
            str(tmp_path / "f.safetensors"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith(f"error: {tmp_path}/out/weights: damaged")
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.slow
def test_a_bad_file_is_a_report_and_status_1(tmp_path):
    state = synth.state_dict("vae_mini")
    del state["quant_conv.bias"]
    save_file({**state, "logvar": np.zeros(3, np.float32)}, tmp_path / "v.safetensors")
    result = subprocess.run(
        [sys.executable, "convert_weights.py", str(tmp_path / "v.safetensors"), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/v.safetensors: 2 tensors do not fit the VAE it looks like:",
        "  - quant_conv.bias [8] is missing",
        "  + logvar [3] is no part of this network",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["a"], ["a", "b", "--export", "c"], ["a", "b", "--dtype", "int8"], []])
def test_wrong_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_an_empty_folder(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert (
        "no diffusion_pytorch_model.bin or .safetensors here or in its subfolders" in capsys.readouterr().err
    )
