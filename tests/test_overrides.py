"""KEY=VALUE on the command line, and the configuration files."""

import re
from pathlib import Path

import pytest

from moebius_jax import UNetConfig
from moebius_jax.distillation.config import LossConfig
from moebius_jax.errors import UserError
from moebius_jax.models.table2 import TABLE_2
from moebius_jax.sharding import make_mesh
from moebius_jax.training.config_file import load_config
from moebius_jax.training.networks import load_frozen
from moebius_jax.training.overrides import apply_overrides, describe

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name, *overrides):
    file, _, row = name.partition(":")
    return load_config(f"{CONFIGS / file}.py" + (f":{row}" if row else ""), overrides)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("batch_size=1_024", "batch_size", 1024),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.decay_at=0.5,0.9", "optimizer.decay_at", [0.5, 0.9]),
        ("optimizer.clip_norm=none", "optimizer.clip_norm", None),
        ("loss.balance=release", "loss.balance", "release"),
        ("loss.perceptual.augment=no", "loss.perceptual.augment", False),
        ("perceptual.augment=no", "loss.perceptual.augment", False),  # as it was called before
        ("guidance_scale=1.5", "sampling.guidance_scale", 1.5),  # likewise
        ("metric=some/folder", "loss.perceptual.network", "some/folder"),  # likewise
        ("loss.fine_scale=2", "loss.fine.scale", 2.0),  # likewise
        ("teacher=some/folder", "teacher", "some/folder"),
        ("data.augment.masks=mat_large,mat_small", "data.augment.masks", ["mat_large", "mat_small"]),
        ("timestep_sampling=999,499", "timestep_sampling", [999, 499]),
        ("timestep_sampling=uniform", "timestep_sampling", "uniform"),
        ("student.remat=true", "student.remat", True),
        ("init=none", "init", None),
    ],
)
def test_values(override, key, expected):
    assert describe(load("debug", override))[key] == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size", "expected KEY=VALUE"),
        ("batchsize=3", r"batchsize: unknown key; did you mean batch_size\?"),
        ("optimizer.learning_rat=3", r"did you mean optimizer\.learning_rate\?"),
        ("optimiser.learning_rate=3", "'optimiser' is no group"),
        ("batch_size=many", "batch_size is 'many'; expected a whole number"),
        ("loss.perceptual.augment=perhaps", "is 'perhaps'; expected true or false"),
        ("loss.balance=papers", "is 'papers'; expected 'paper', 'release' or 'static'"),
        ("loss.terms=task,tusk", r"^loss\.terms is .*tusk.*; expected some of coarse, fine"),
        ("log.grid_every=-1", r"^log\.grid_every is \'-1\'; expected 0 or more"),
        *(
            (f"timestep_sampling={wrong}", r"^timestep_sampling is .*; expected .*timesteps below 1000$")
            for wrong in ("999,1000", "-1", "normal", "3.5", ",")
        ),
        ("sampling.guidance_scale=-3", r"^sampling\.guidance_scale is \'-3\'; expected 0 or more"),
        ("log.grid_steps=1", r"^log\.grid_steps is 1; strength 0\.99 of 1 steps leaves none"),
        ("sampling.scheduler=ddem", r"^sampling\.scheduler is 'ddem'; expected ddim"),
        ("optimizer.learning_rate=0", r"^optimizer\.learning_rate is \'0\'; expected more than 0"),
        ("data.augment.flip=2", r"^data\.augment\.flip is \'2\'; expected 1.* or less"),
        ("data.loader.threads=0", r"^data\.loader\.threads is \'0\'; expected 1 or more"),
        ("loss.task.scale=0", r"^loss\.task\.scale is \'0\'; expected more than 0"),
        ("student.context_length=11", r"^student\.vocab_size is 20; two categories of context_length 11"),
        ("student.in_channels=8", r"^student\.in_channels is 8"),
        ("data.kind=films", r"^data\.kind is 'films'; expected one of images, latents, synthetic"),
        ("optimizer=adam", "is a group; set one of its fields"),
        ("batch_size=0", "batch_size is '0'; expected 1 or more"),
        ("accumulation=3", "multiple of accumulation = 3"),
        ("teacher=none", "coarse and fine loss needs a teacher"),
        ("metric=none", "CC-BY-NC"),
        ("ema_decay=1", "ema_decay is '1'; expected less than 1"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every is '0'"),
        ("noise_offset=nan", "noise_offset is 'nan'; expected a finite number"),
        ("optimizer.weight_decay=-1", "weight_decay is '-1'"),
        ("optimizer.newton_schulz_dtype=float33", "is 'float33'; expected 'bfloat16' or 'float32'"),
        ("student.num_heads=5", "multiple"),
        ("loss.task.network=folder", r"^loss\.task\.network is 'folder'; this loss has no network"),
        ("sampling.truncate=true", r"^sampling\.truncate goes with mode=release of a call"),
        ("optimizer.warmup_steps=999999999", r"^optimizer\.warmup_steps is 999999999; expected no more than"),
        ("optimizer.decay_at=0.5,0.5", r"^optimizer\.decay_at is \(0.5, 0.5\); expected rising"),
        ("noise_offset=-1", r"^noise_offset is '-1'; expected 0 or more"),
        ("loss.perceptual.network.groups=", r"network\.groups .*expected 1 or more of them"),
    ],
)
def test_errors(override, message):
    with pytest.raises(UserError, match=message):
        load("debug", override)


def test_a_group_and_its_field_cannot_both_be_set():
    with pytest.raises(UserError, match="set one or the other"):
        load("debug", "teacher=folder", "teacher.platform=cpu")
    with pytest.raises(UserError, match="set one or the other"):
        load("debug", "teacher.platform=cpu", "teacher=folder")


def test_fields_that_depend_on_each_other_change_together():
    config = load("debug", "metric=none", "loss.terms=coarse,fine,task")
    assert config.loss.perceptual.network is None
    with pytest.raises(UserError, match="E-LatentLPIPS"):
        apply_overrides(config, ["loss.terms=perceptual"])


@pytest.mark.parametrize(
    "name",
    [p.stem for p in sorted(CONFIGS.glob("*.py"))]
    + [f"table2:{n}" for n in TABLE_2]
    + [f"table5:{n}" for n in (1, 2, 3, 4)],
)
def test_every_configuration_loads(name):
    assert load(name).steps > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table2:16", r"table2\.py:16: experiment is 16; Table 2 has rows 1 to 15"),
        ("table2:one", r"table2\.py:one: row is 'one'; expected a number"),
        ("table5:5", r"table5\.py:5: row is '5'; Table 5 has rows 1 to 4"),
        ("debug:3", r"debug\.py:3: TypeError"),
    ],
)
def test_errors_name_the_row(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("table2:9", "table2.py:9", "configs/table2.py:9"):
        assert load_config(name, []).student == UNetConfig.student(remat=True)
    with pytest.raises(UserError, match=r"nowhere: no such configuration; there are debug\.py, distill\.py"):
        load_config("nowhere", [])


@pytest.mark.parametrize("field", ["data.path", "teacher", "vae", "init", "log.validation"])
def test_another_kind_of_address_is_no_path(field):
    """It would be a folder `s3:` here."""
    with pytest.raises(UserError, match=rf"^{re.escape(field)} is 's3://b/x'; expected a path of this mach"):
        load("debug", f"{field}=s3://b/x")


def test_held_out_data_take_objects_from_the_training_data():
    config = load("distill_release", "data.path=train.jsonl", "log.validation=held_out/")
    assert config.data.augment.foreground_masks == "own"
    assert config.held_out_data.augment.foreground_masks == "train.jsonl"
    assert config.held_out_data.path == "held_out/"


def test_balance_over_devices_needs_statistics_of_devices():
    with pytest.raises(UserError, match=r"loss\.balance_over is device and batch_norm is global"):
        load("distill_release", "batch_norm=global")


def test_the_releases_configuration():
    """Its own values, as far as they are known, and the paper's where they are not."""
    config, paper = load("distill_release"), load("distill")
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (1e-4, "constant")
    assert (config.steps, config.ema_decay, config.data.augment.masks) == (200_000, 0, ("medium_512",))
    assert config.loss.balance == "release"
    assert config.loss.balance_over == config.batch_norm == "device"
    assert config.loss.perceptual.rescale_inputs
    assert config.loss.scales == {"coarse": 0.01, "fine": 0.01, "task": 0.5, "perceptual": 0.5}
    assert config.noise_offset == paper.noise_offset == 0.0357
    assert (config.student, config.teacher, config.batch_size) == (paper.student, paper.teacher, 768)


def test_configurations_are_the_papers():
    paper = load("distill")
    assert (paper.batch_size, paper.steps, paper.optimizer.weight_decay) == (768, 138_000, 0.1)
    assert paper.loss.balance == "paper"
    assert not paper.loss.perceptual.rescale_inputs
    assert [
        (load(f"finetune_{n}").batch_size, load(f"finetune_{n}").steps)
        for n in ("places2", "celebahq", "ffhq")
    ] == [
        (88, 51_000),
        (44, 60_000),
        (88, 117_000),
    ]
    assert load("table5:2").loss.terms == ("coarse", "fine")
    teacher = load("table2:teacher")
    assert teacher.student == UNetConfig.teacher(remat=True)
    assert (teacher.steps, teacher.loss.terms) == (18_000, ("task",))
    nine, ten = load("table2:9"), load("table2:10")
    assert nine.student == ten.student == UNetConfig.student(remat=True)
    assert nine.loss == paper.loss
    assert ten.loss.terms == ("task",)
    assert load("table2:5").student.self_mixer == "gla"


@pytest.mark.parametrize("name", ["distill", "debug", "table2:11"])
def test_the_published_teacher_fits_every_student(name):
    config = load(name)
    teacher = config.teacher if isinstance(config.teacher, UNetConfig) else UNetConfig.teacher()
    config = config.replace(teacher=teacher, loss=LossConfig(terms=("coarse", "fine", "task")))
    assert load_frozen(config, make_mesh(), abstract=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "AttributeError"),
        ("def get_config(): return 3", "gave int, expected a TrainConfig"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_files_that_are_no_configuration(text, message, tmp_path):
    path = tmp_path / "configs" / "mine.py"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path, [])


def test_a_missing_file_names_those_there_are():
    with pytest.raises(UserError, match=r"no such configuration; there are debug\.py, distill\.py"):
        load("distil")


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    (tmp_path / "README.md").write_text("# Read me")
    with pytest.raises(
        UserError, match=r"README\.md: expected a Python file with get_config\(\), found \.md"
    ):
        load_config(tmp_path / "README.md", [])
