"""Conversion: a strict bijection, both ways, of every kind of file."""

import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import synth
from safetensors.numpy import load_file, save_file

from moebius_jax import UNetConfig, UserError
from moebius_jax.models import ELatentLPIPSConfig, VAEConfig
from moebius_jax.weights import convert_file, export_file, verify_folder
from moebius_jax.weights.detect import detect_architecture
from moebius_jax.weights.folder import load_numpy
from moebius_jax.weights.names import counters, expected_tensors
from moebius_jax.weights.release_files import open_release_file

torch = pytest.importorskip("torch")

MINI = UNetConfig.student(
    channels=(32, 64, 96), num_heads=4, latent_size=32, embedding_dim=48, context_dim=24
)


@pytest.fixture(scope="module")
def state():
    return synth.state_dict("student_mini")


@pytest.fixture(scope="module")
def converted(student_mini_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "student"
    convert_file(student_mini_file, folder)
    return folder


class TestArchitecture:
    """Read off names and shapes alone."""

    @pytest.mark.parametrize(
        ("name", "architecture"),
        [
            ("student", UNetConfig.student()),
            ("teacher", UNetConfig.teacher()),
            ("student_mini", MINI),
            (
                "teacher_mini",
                UNetConfig.teacher(channels=(32, 64, 96, 96), num_heads=4, embedding_dim=48, context_dim=24),
            ),
            ("vae", VAEConfig()),
            ("vae_mini", VAEConfig(channels=(32, 64, 96, 96))),
            ("elatentlpips_sdxl", ELatentLPIPSConfig()),
        ],
    )
    def test_released_files(self, name, architecture):
        shapes = {k: tuple(s) for k, s in synth.manifest(name).items()}
        assert detect_architecture(shapes, name) == architecture
        expected = expected_tensors(architecture)
        assert set(shapes) == set(expected) | (set(shapes) & counters(expected))
        assert {k: slot.shape for k, slot in expected.items()} == {k: shapes[k] for k in expected}

    @pytest.mark.parametrize("experiment", [1, 2, 3, 4, 5, 6, 8])
    def test_ablations_are_told_apart_by_their_tensors(self, experiment):
        config = UNetConfig.ablation(experiment)
        shapes = {name: slot.shape for name, slot in expected_tensors(config).items()}
        assert detect_architecture(shapes, "file") == config
        assert config.describe() == f"ablation {experiment}"

    def test_unknown_files_are_refused(self):
        with pytest.raises(UserError, match=r"f\.bin: not a Moebius .* it holds text_model\.weight"):
            detect_architecture({"text_model.weight": (3,)}, "f.bin")

    def test_a_missing_deciding_tensor_is_named(self):
        shapes = {k: tuple(s) for k, s in synth.manifest("student_mini").items()}
        del shapes["diff_model.encoder_hid_proj.weight"]
        with pytest.raises(UserError, match=r"tensor diff_model\.encoder_hid_proj\.weight is missing"):
            detect_architecture(shapes, "f.bin")

    def test_contradicting_sizes_are_named(self):
        shapes = {k: tuple(s) for k, s in synth.manifest("student_mini").items()}
        name = "diff_model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.rel_pos_emb"
        shapes[name] = (1000, 10, 8, 1)
        with pytest.raises(UserError, match="1000 rows is not one of a square map"):
            detect_architecture(shapes, "f.bin")

    def test_wrapped_names_get_a_hint(self):
        shapes = {f"module.{k}": tuple(s) for k, s in synth.manifest("student_mini").items()}
        with pytest.raises(UserError, match=r"every name begins with 'module\.'"):
            detect_architecture(shapes, "f.bin")


class TestBijection:
    """Every difference is an error that lists all of them; nothing is written."""

    def convert(self, state, tmp_path):
        save_file(state, tmp_path / "f.safetensors")
        with pytest.raises(UserError) as error:
            convert_file(tmp_path / "f.safetensors", tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
        return str(error.value)

    def test_all_differences_are_listed(self, state, tmp_path):
        changed = dict(state)
        del changed["diff_model.conv_norm_out.bias"]
        changed["diff_model.surplus.weight"] = np.zeros((2, 3), np.float32)
        changed["diff_model.conv_in.bn1.weight"] = np.zeros(7, np.float32)
        message = self.convert(changed, tmp_path)
        assert "3 tensors do not fit the student" in message
        assert "- diff_model.conv_norm_out.bias [32] is missing" in message
        assert "+ diff_model.surplus.weight [2, 3] is no part of this network" in message
        assert "~ diff_model.conv_in.bn1.weight [7], expected [9]" in message

    def test_counters_of_unknown_norms_are_not_dropped(self, state, tmp_path):
        changed = {**state, "diff_model.other.num_batches_tracked": np.zeros((), np.int64)}
        assert "+ diff_model.other.num_batches_tracked []" in self.convert(changed, tmp_path)

    def test_counters_may_be_missing(self, state, tmp_path):
        kept = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        save_file(kept, tmp_path / "f.safetensors")
        convert_file(tmp_path / "f.safetensors", tmp_path / "out")

    def test_integer_weights_are_refused(self, state, tmp_path):
        changed = {**state, "diff_model.conv_norm_out.bias": np.zeros(32, np.int32)}
        assert "is of type int32; expected floating point" in self.convert(changed, tmp_path)

    def test_a_tensor_in_two_shards_is_a_duplicate(self, state, tmp_path):
        names = sorted(state)
        save_file({k: state[k] for k in names[:600]}, tmp_path / "a.safetensors")
        save_file({k: state[k] for k in names[599:]}, tmp_path / "b.safetensors")
        index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(
            json.dumps(
                {"weight_map": {k: ("a" if i < 600 else "b") + ".safetensors" for i, k in enumerate(names)}}
            )
        )
        with pytest.raises(UserError, match=rf"! {names[599]}: in more than one shard"):
            convert_file(index, tmp_path / "out")

    def test_repeated_heads_must_be_equal(self, tmp_path):
        state = synth.state_dict("elatentlpips_sdxl")
        state["lins.2.model.1.weight"] = state["lins.2.model.1.weight"] + 1
        assert "must repeat another tensor exactly" in self.convert(state, tmp_path)

    def test_overflow_is_refused(self, state, tmp_path):
        name = "diff_model.conv_norm_out.bias"
        save_file({**state, name: state[name] * 1e6}, tmp_path / "f.safetensors")
        with pytest.raises(UserError, match=f"{name} has values too large for float16"):
            convert_file(tmp_path / "f.safetensors", tmp_path / "out", dtype="float16")
        assert not (tmp_path / "out").exists()

    def test_only_folders_of_ours_are_replaced(self, student_mini_file, tmp_path):
        convert_file(student_mini_file, tmp_path / "out")
        convert_file(student_mini_file, tmp_path / "out", overwrite=True)
        (tmp_path / "out/notes.txt").write_text("precious")
        with pytest.raises(UserError, match=r"not replaced, it holds other things .*notes\.txt"):
            convert_file(student_mini_file, tmp_path / "out", overwrite=True)
        with pytest.raises(UserError, match=r"student_mini\.safetensors: lies in "):
            convert_file(student_mini_file, student_mini_file.parent, overwrite=True)
        assert student_mini_file.exists()
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(UserError, match="other: not replaced, it is no folder we wrote"):
            convert_file(student_mini_file, other, overwrite=True)
        assert "bert" in (other / "config.json").read_text()

    @pytest.mark.parametrize(
        ("suffix", "value", "message"),
        [
            ("conv_norm_out.bias", np.nan, "has 1 NaN or infinite values"),
            ("conv_norm_out.bias", np.inf, "has 1 NaN or infinite values"),
            ("running_var", -1e-3, "has a variance of -0.001"),
        ],
    )
    def test_numbers_no_network_has_are_refused(self, state, tmp_path, suffix, value, message):
        name = next(n for n in state if n.endswith(suffix))
        changed = state[name].copy()
        changed[0] = value
        assert f"tensor {name} {message}" in self.convert({**state, name: changed}, tmp_path)
        convert_file(tmp_path / "f.safetensors", tmp_path / "out", allow_nonfinite=True)

    def test_unwritable_destinations_are_named(self, student_mini_file, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="file/out: cannot be written"):
            convert_file(student_mini_file, tmp_path / "file/out")

    def test_links_are_followed(self, student_mini_file, tmp_path):
        convert_file(student_mini_file, tmp_path / "real")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        convert_file(student_mini_file, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]

    def test_existing_folders_are_kept(self, student_mini_file, converted):
        before = sorted(p.stat().st_mtime_ns for p in converted.rglob("*"))
        with pytest.raises(UserError, match="exists already; pass --overwrite"):
            convert_file(student_mini_file, converted)
        assert sorted(p.stat().st_mtime_ns for p in converted.rglob("*")) == before


class TestRoundTrip:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["student_mini", "teacher_mini", "vae_mini", "elatentlpips_sdxl"])
    def test_bit_for_bit(self, name, tmp_path):
        state = synth.state_dict(name)
        source = tmp_path / "f.safetensors"
        save_file(state, source)
        convert_file(source, tmp_path / "out")
        assert verify_folder(source, tmp_path / "out") == len([k for k in state if "num_batches" not in k])
        export_file(tmp_path / "out", tmp_path / "back.safetensors")
        back = load_file(tmp_path / "back.safetensors")
        assert set(back) == set(state) | {k for k in back if "num_batches" in k}
        for key, value in state.items():
            assert back[key].dtype == value.dtype
            np.testing.assert_array_equal(back[key], value)

    def test_verification_finds_a_changed_tensor(self, state, converted, tmp_path):
        save_file(
            {**state, "diff_model.conv_norm_out.bias": np.ones(32, np.float32)}, tmp_path / "g.safetensors"
        )
        with pytest.raises(UserError, match=r"1 tensors differ[^~]*~ diff_model\.conv_norm_out\.bias"):
            verify_folder(tmp_path / "g.safetensors", converted)

    def test_torch_files_are_written_as_they_are_read(self, state, converted, tmp_path):
        file = tmp_path / "back.bin"
        export_file(converted, file)
        back = torch.load(file, weights_only=True)
        assert set(state) <= set(back)
        for key, value in state.items():
            np.testing.assert_array_equal(back[key].numpy(), value)
        convert_file(file, tmp_path / "again")
        ours, theirs = load_numpy(tmp_path / "again"), load_numpy(converted)
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        export_file(converted, file, overwrite=True)  # it is ours
        torch.save(back, file)
        with pytest.raises(UserError, match="not replaced, it is no file we wrote"):
            export_file(converted, file, overwrite=True)

    def test_half_precision_goes_to_torch_too(self, state, tmp_path):
        save_file(state, tmp_path / "f.safetensors")
        convert_file(tmp_path / "f.safetensors", tmp_path / "half", dtype="bfloat16")
        export_file(tmp_path / "half", tmp_path / "half.bin")
        back = torch.load(tmp_path / "half.bin", weights_only=True)
        key = next(k for k, v in state.items() if v.ndim > 1)
        assert back[key].dtype == torch.bfloat16
        np.testing.assert_array_equal(
            back[key].float().numpy(), state[key].astype(ml_dtypes.bfloat16).astype(np.float32)
        )

    def test_exports_are_safetensors_or_torchs_and_never_overwrite_unasked(self, converted, tmp_path):
        with pytest.raises(UserError, match=r"exports are \.safetensors or \.bin files"):
            export_file(converted, tmp_path / "f.npz")
        (tmp_path / "f.safetensors").write_text("precious")
        with pytest.raises(UserError, match="exists already"):
            export_file(converted, tmp_path / "f.safetensors")
        assert (tmp_path / "f.safetensors").read_text() == "precious"


class TestTorchFiles:
    def save(self, state, path, dtype=None):
        torch.save(
            {
                k: torch.from_numpy(v.copy()).to(dtype) if dtype and v.ndim else torch.from_numpy(v.copy())
                for k, v in state.items()
            },
            path,
        )

    def test_bin_is_the_safetensors_file(self, state, student_mini_file, tmp_path):
        self.save(state, tmp_path / "f.bin")
        convert_file(tmp_path / "f.bin", tmp_path / "out")
        verify_folder(student_mini_file, tmp_path / "out")

    def test_oldest_torch_format(self, state, student_mini_file, tmp_path):
        tensors = {k: torch.from_numpy(v) for k, v in state.items()}
        torch.save(tensors, tmp_path / "f.pth", _use_new_zipfile_serialization=False)
        convert_file(tmp_path / "f.pth", tmp_path / "out")
        verify_folder(student_mini_file, tmp_path / "out")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "numpy"), [(torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)]
    )
    def test_half_precision_becomes_fp32_unless_asked(self, state, tmp_path, dtype, numpy):
        self.save(state, tmp_path / "f.bin", dtype)
        name = "diff_model.conv_in.conv_pw.weight"
        half = state[name].astype(numpy)
        for wanted, kept in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
            folder = tmp_path / wanted
            convert_file(tmp_path / "f.bin", folder, dtype=wanted)
            stored = load_numpy(folder)["conv_in.pointwise.kernel"]
            assert stored.dtype == kept
            np.testing.assert_array_equal(stored, half.astype(kept)[:, :, 0, 0].T)
            verify_folder(tmp_path / "f.bin", folder)
        assert load_numpy(folder)["conv_in.norm1.mean"].dtype == np.float32

    def test_bfloat16_safetensors(self, state, tmp_path):
        from safetensors.torch import save_file as save_torch

        save_torch(
            {k: torch.from_numpy(v).bfloat16() if v.ndim else torch.from_numpy(v) for k, v in state.items()},
            tmp_path / "f.safetensors",
        )
        tensor = open_release_file(tmp_path / "f.safetensors").tensors["diff_model.conv_norm_out.bias"].load()
        np.testing.assert_array_equal(
            tensor, state["diff_model.conv_norm_out.bias"].astype(ml_dtypes.bfloat16)
        )

    def test_without_torch_a_bin_says_what_to_install(self, monkeypatch, tmp_path):
        (tmp_path / "f.bin").write_bytes(b"PK something")
        monkeypatch.setitem(__import__("sys").modules, "torch", None)
        with pytest.raises(UserError, match=r'needs torch, .*pip install "moebius-jax\[convert\]"'):
            open_release_file(tmp_path / "f.bin")

    def test_arbitrary_objects_are_not_unpickled(self, tmp_path):
        torch.save({"a": print}, tmp_path / "f.bin")
        with pytest.raises(UserError, match="not a readable torch checkpoint"):
            open_release_file(tmp_path / "f.bin")

    def test_other_contents_are_named(self, tmp_path):
        torch.save([1, 2], tmp_path / "list.bin")
        with pytest.raises(UserError, match="expected a state dict, found list"):
            open_release_file(tmp_path / "list.bin")
        torch.save({"epoch": 3}, tmp_path / "dict.bin")
        with pytest.raises(UserError, match="the entry 'epoch' is a int"):
            open_release_file(tmp_path / "dict.bin")


class TestEma:
    """Shadow parameters without BatchNorm statistics, completed from --base."""

    @pytest.fixture
    def ema_file(self, state, tmp_path):
        parameters = {k: v + 1 for k, v in state.items() if "running" not in k and "num_batches" not in k}
        short = {k: k.replace(".", "") for k in parameters}
        buffers = {short[k]: torch.from_numpy(v) for k, v in parameters.items()}
        buffers |= {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(5)}
        torch.save({"ema_buffers": buffers, "ema_name_map": short}, tmp_path / "m_EMA.bin")
        return tmp_path / "m_EMA.bin"

    @pytest.mark.slow
    def test_base_completes_it(self, state, ema_file, student_mini_file, tmp_path):
        convert_file(ema_file, tmp_path / "out", base=student_mini_file)
        stored = load_numpy(tmp_path / "out")
        np.testing.assert_array_equal(
            stored["conv_norm_out.bias"], state["diff_model.conv_norm_out.bias"] + 1
        )
        np.testing.assert_array_equal(
            stored["conv_in.norm1.var"], state["diff_model.conv_in.bn1.running_var"]
        )
        assert verify_folder(ema_file, tmp_path / "out", base=student_mini_file)
        assert json.loads((tmp_path / "out/config.json").read_text())["source"]["base"]["file"]

    def test_without_base_it_says_so(self, ema_file, tmp_path):
        with pytest.raises(UserError, match=r"holds no BatchNorm statistics.*--base CHECKPOINT"):
            convert_file(ema_file, tmp_path / "out")

    def test_base_is_for_ema_files_only(self, student_mini_file, tmp_path):
        with pytest.raises(UserError, match="--base completes EMA files only"):
            convert_file(student_mini_file, tmp_path / "out", base=student_mini_file)

    def test_broken_maps_are_listed(self, state, student_mini_file, tmp_path):
        parameters = {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}
        short = {k: k.replace(".", "") for k in parameters}
        buffers = {s: torch.from_numpy(parameters[k]) for k, s in short.items()}
        first, second = list(short)[:2]
        short[second] = short[first]
        torch.save(
            {"ema_buffers": {**buffers, "stray": torch.zeros(1)}, "ema_name_map": short}, tmp_path / "e.bin"
        )
        with pytest.raises(UserError) as error:
            convert_file(tmp_path / "e.bin", tmp_path / "out", base=student_mini_file)
        assert f"! {second}: shares the EMA buffer" in str(error.value)
        assert "+ stray: an EMA buffer without a name" in str(error.value)


class TestDamagedFiles:
    @pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
    def test_truncated(self, suffix, state, student_mini_file, tmp_path):
        whole = student_mini_file
        if suffix == ".bin":
            whole = tmp_path / "whole.bin"
            torch.save({k: torch.from_numpy(v) for k, v in state.items()}, whole)
        path = tmp_path / f"f{suffix}"
        path.write_bytes(whole.read_bytes()[:100_000])
        with pytest.raises(UserError, match=rf"f\{suffix}: not a readable"):
            convert_file(path, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("f.bin", b"", "the file is empty"),
            ("f.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
            ("f.ckpt", b"x", r"expected a \.bin.* found \.ckpt"),
            ("f.bin", b"not a checkpoint at all", "not a readable torch checkpoint"),
        ],
    )
    def test_other_contents(self, name, content, message, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_release_file(tmp_path / name)

    def test_missing_file_and_shard(self, tmp_path):
        with pytest.raises(UserError, match="no such file"):
            open_release_file(tmp_path / "f.bin")
        index = tmp_path / "m.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
        with pytest.raises(UserError, match=r"lists gone\.safetensors"):
            open_release_file(index)
        for content, message in {
            "{}": "weight_map: missing field",
            "[" * 100_000: "not JSON",
            '{"weight_map": {"a": 1}}': r"weight_map\.a is 1; expected text",
            '{"weight_map": {"a": "../x.safetensors"}}': "expected names of files beside it",
            '{"weight_map": {"a": "/etc/x.safetensors"}}': "expected names of files beside it",
        }.items():
            index.write_text(content)
            with pytest.raises(UserError, match=message):
                open_release_file(index)

    def test_a_tensor_no_shard_holds_is_missing(self, state, tmp_path):
        save_file(state, tmp_path / "a.safetensors")
        index = tmp_path / "m.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys([*state, "more"], "a.safetensors")}))
        with pytest.raises(UserError, match=r"- more: listed in a\.safetensors, which does not hold it"):
            convert_file(index, tmp_path / "out")

    def test_what_unpacks_to_more_is_refused(self, tmp_path):
        """A small file may be gigabytes of zeros, compressed; torch compresses nothing."""
        torch.save({"a": torch.zeros(1000)}, tmp_path / "f.bin")
        with (
            zipfile.ZipFile(tmp_path / "f.bin") as stored,
            zipfile.ZipFile(tmp_path / "g.bin", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for part in stored.infolist():
                packed.writestr(part.filename, stored.read(part))
        open_release_file(tmp_path / "f.bin")
        with pytest.raises(UserError, match=r"g\.bin: not a readable torch checkpoint \(.* is compressed"):
            open_release_file(tmp_path / "g.bin")


def test_a_failed_write_leaves_nothing(student_mini_file, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        convert_file(student_mini_file, tmp_path / "out")
    assert not list(tmp_path.iterdir())
