"""Architectures: parameter counts of the paper, checks, JSON."""

import jax
import numpy as np
import pytest
from flax import nnx

from moebius_jax import UNetConfig
from moebius_jax.weights.tensors import abstract_network

TABLE = {
    "teacher": 862_251_708,
    1: 525_918_108,
    2: 496_415_908,
    3: 514_463_308,
    4: 478_049_308,
    5: 314_867_331,
    6: 484_961_108,
    8: 273_910_331,
    "student": 226_041_531,
}


def named(name) -> UNetConfig:
    return getattr(UNetConfig, name)() if isinstance(name, str) else UNetConfig.ablation(name)


@pytest.mark.parametrize("name", TABLE)
def test_parameter_counts_are_the_papers(name):
    network = abstract_network(named(name))
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(nnx.state(network, nnx.Param))) == TABLE[name]


@pytest.mark.parametrize(("experiment", "same_as"), [(7, 6), (9, 9), (10, 9), (11, 1), (15, 5)])
def test_distilled_experiments_repeat_an_architecture(experiment, same_as):
    assert UNetConfig.ablation(experiment) == UNetConfig.ablation(same_as)


def test_student_is_experiment_9():
    assert UNetConfig.student() == UNetConfig.ablation(9)


@pytest.mark.parametrize("name", TABLE)
def test_json_round_trip(name):
    assert UNetConfig.from_dict(named(name).to_dict()) == named(name)


def test_execution_choices_are_not_saved():
    assert UNetConfig.student(remat=True, position_order="banded").to_dict() == UNetConfig.student().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"self_mixer": "linear"}, "self_mixer is 'linear'"),
        ({"channels": (320, 640, 1290)}, "1290 must be a multiple of 32"),
        ({"channels": (320, 640)}, "3 entries for 2 levels"),
        ({"window": 14}, "window is 14"),
        ({"latent_size": 30}, "latent_size 30 cannot be halved"),
        ({"position_order": "fastest"}, "position_order is 'fastest'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.student(**changes)


def test_bad_experiment_and_fields_are_named():
    with pytest.raises(ValueError, match="rows 1 to 15"):
        UNetConfig.ablation(16)
    values = UNetConfig.student().to_dict()
    with pytest.raises(ValueError, match=r"^chanels: unknown field; did you mean channels\?"):
        UNetConfig.student(chanels=(32,))
    with pytest.raises(ValueError, match=r"^colour: unknown field$"):
        UNetConfig.from_dict({**values, "colour": 1})
    values.pop("window")
    with pytest.raises(ValueError, match=r"^window: missing field"):
        UNetConfig.from_dict(values)
