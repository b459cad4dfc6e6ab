"""The paper's Table 2: which block is worth what."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row.

    Attributes:
        self_mixer, cross_mixer, feed_forward, residual_conv: the architecture, by its four switches.
        is_distilled: column KD: trained with all losses of the distillation, or on the task loss alone.
        parameters: millions, as printed.
        gflops: as printed; 10⁹ multiply-adds at 512 px.
    """

    self_mixer: str
    cross_mixer: str
    feed_forward: str
    residual_conv: str
    is_distilled: bool
    parameters: float
    gflops: float

    @property
    def switches(self) -> dict[str, str]:
        """The first four attributes."""
        return {name: getattr(self, name) for name in _SWITCHES}


_SWITCHES = ("self_mixer", "cross_mixer", "feed_forward", "residual_conv")

TABLE_2 = {
    1: Experiment("gla", "attention", "geglu", "conv3x3", False, 526, 314.30),
    2: Experiment("local_lambda", "attention", "geglu", "conv3x3", False, 496, 318.90),
    3: Experiment("gla", "interactive_lambda", "geglu", "conv3x3", False, 514, 307.91),
    4: Experiment("gla", "attention", "mix_ffn", "conv3x3", False, 478, 286.51),
    5: Experiment("gla", "attention", "geglu", "depthwise", False, 315, 183.59),
    6: Experiment("local_lambda", "interactive_lambda", "geglu", "conv3x3", False, 485, 312.50),
    7: Experiment("local_lambda", "interactive_lambda", "geglu", "conv3x3", True, 485, 312.50),
    8: Experiment("local_lambda", "interactive_lambda", "geglu", "depthwise", True, 274, 181.79),
    9: Experiment("local_lambda", "interactive_lambda", "mix_ffn", "depthwise", True, 226, 154.00),
    10: Experiment("local_lambda", "interactive_lambda", "mix_ffn", "depthwise", False, 226, 154.00),
    11: Experiment("gla", "attention", "geglu", "conv3x3", True, 526, 314.30),
    12: Experiment("local_lambda", "attention", "geglu", "conv3x3", True, 496, 318.90),
    13: Experiment("gla", "interactive_lambda", "geglu", "conv3x3", True, 514, 307.91),
    14: Experiment("gla", "attention", "mix_ffn", "conv3x3", True, 478, 286.51),
    15: Experiment("gla", "attention", "geglu", "depthwise", True, 315, 183.59),
}


def experiment(number: int) -> Experiment:
    """Row `number`.

    Raises:
        ValueError: there is no such row.
    """
    if number not in TABLE_2:
        raise ValueError(f"experiment is {number!r}; Table 2 has rows 1 to {max(TABLE_2)}")
    return TABLE_2[number]
