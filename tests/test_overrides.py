"""KEY=VALUE on the command line, and the configuration files."""

from pathlib import Path

import pytest

from moebius_jax import UNetConfig
from moebius_jax.errors import UserError
from moebius_jax.training.launch import load_config
from moebius_jax.training.networks import load_teacher
from moebius_jax.training.overrides import apply_overrides, describe
from moebius_jax.training.sharding import make_mesh

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name, *overrides):
    return load_config(CONFIGS / f"{name}.py", overrides)


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("batch_size=1_024", "batch_size", 1024),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("optimizer.decay_at=0.5,0.9", "optimizer.decay_at", [0.5, 0.9]),
        ("optimizer.clip_norm=none", "optimizer.clip_norm", None),
        ("loss.balance=release", "loss.balance", "release"),
        ("perceptual.augment=no", "perceptual.augment", False),
        ("teacher=some/folder", "teacher", "some/folder"),
        ("data.augment.masks=mat_large,mat_small", "data.augment.masks", ["mat_large", "mat_small"]),
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
        ("batch_size=many", "batch_size: 'many' is not a whole number"),
        ("perceptual.augment=perhaps", "is not true or false"),
        ("loss.balance=papers", "is not one of paper, release, static"),
        ("loss.terms=task,tusk", "a list of one of"),
        ("optimizer=adam", "is a group; set one of its fields"),
        ("batch_size=0", "batch_size is 0; expected 1 or more"),
        ("accumulation=3", "multiple of accumulation = 3"),
        ("teacher=none", "coarse and fine loss needs a teacher"),
        ("metric=none", "CC-BY-NC"),
        ("ema_decay=1", "ema_decay is 1.0"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every is 0"),
        ("noise_offset=nan", "noise_offset is nan"),
        ("optimizer.weight_decay=-1", "weight_decay is -1.0"),
        ("optimizer.newton_schulz_dtype=float33", "is not one of bfloat16, float32"),
        ("student.num_heads=5", "multiple"),
    ],
)
def test_errors(override, message):
    with pytest.raises(UserError, match=message):
        load("debug", override)


def test_a_group_and_its_field_cannot_both_be_set():
    with pytest.raises(UserError, match="set one or the other"):
        load("debug", "teacher=folder", "teacher.platform=cpu")


def test_fields_that_depend_on_each_other_change_together():
    config = load("debug", "metric=none", "loss.terms=coarse,fine,task")
    assert config.metric is None
    with pytest.raises(UserError, match="E-LatentLPIPS"):
        apply_overrides(config, ["loss.terms=perceptual"])


def test_every_configuration_loads():
    names = sorted(p.stem for p in CONFIGS.glob("*.py"))
    assert len(names) >= 27
    for name in names:
        assert load(name).steps > 0, name


def test_configurations_are_the_papers():
    paper = load("distill")
    assert (paper.batch_size, paper.steps, paper.optimizer.weight_decay) == (768, 138_000, 0.1)
    assert paper.loss.balance == "paper"
    assert load("distill_release").batch_norm == "device"
    assert [
        (load(f"finetune_{n}").batch_size, load(f"finetune_{n}").steps)
        for n in ("places2", "celebahq", "ffhq")
    ] == [
        (88, 51_000),
        (44, 60_000),
        (88, 117_000),
    ]
    assert load("table5_row2").loss.terms == ("coarse", "fine")
    nine, ten = load("table2_exp09"), load("table2_exp10")
    assert nine.student == ten.student == UNetConfig.student(remat=True)
    assert nine.loss == paper.loss
    assert ten.loss.terms == ("task",)
    assert load("table2_exp05").student.self_mixer == "gla"


@pytest.mark.parametrize("name", ["distill", "debug", "table2_exp11"])
def test_the_published_teacher_fits_every_student(name):
    config = load(name)
    teacher = config.teacher if isinstance(config.teacher, UNetConfig) else UNetConfig.teacher()
    assert load_teacher(config.replace(teacher=teacher), make_mesh(1), abstract=True)


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
