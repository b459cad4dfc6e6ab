"""What the paper reports of Moebius and its teacher, PixelHacker."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One row's figures on one benchmark.

    Attributes:
        model: "Moebius" or "PixelHacker".
        table: of the paper.
        fid, lpips: the figures. The paper does not name LPIPS's backbone, nor FID's implementation.
    """

    model: str
    table: str
    fid: float
    lpips: float


def _rows(
    table: str, moebius: tuple[float, float], pixelhacker: tuple[float, float]
) -> tuple[Published, ...]:
    return tuple(
        Published(model=model, table=table, fid=fid, lpips=lpips)
        for model, (fid, lpips) in (("Moebius", moebius), ("PixelHacker", pixelhacker))
    )


# Table 1 repeats figures of Tables 3 and 4.
QUALITY = {
    "places2_test": _rows("Table 3", (9.48, 0.207), (8.59, 0.203)),
    "places2_large": _rows("Table 3", (2.35, 0.173), (2.05, 0.169)),
    "places2_small": _rows("Tables 1 and 3", (0.92, 0.091), (0.82, 0.088)),
    "places2_256": _rows("Table 3", (14.13, 0.470), (9.25, 0.367)),
    "celebahq": _rows("Tables 1 and 4", (5.39, 0.122), (4.75, 0.115)),
    "ffhq": _rows("Tables 1 and 4", (8.15, 0.231), (6.35, 0.229)),
    "lvis": _rows("Table 7", (17.81, 0.309), (13.84, 0.305)),
    "deepfakeface": _rows("Table 7", (15.32, 0.173), (15.50, 0.172)),
}

# Table 6: guidance scale → (FID, LPIPS) of Moebius.
GUIDANCE = {
    "places2_test": {
        1.5: (10.14, 0.209),
        2.0: (9.65, 0.208),
        2.5: (9.48, 0.207),
        3.0: (9.51, 0.208),
        3.5: (9.73, 0.209),
        4.0: (10.09, 0.210),
        4.5: (10.37, 0.212),
    },
    "celebahq": {
        1.0: (5.54, 0.126),
        1.5: (5.42, 0.123),
        2.0: (5.39, 0.122),
        2.5: (5.49, 0.122),
        3.0: (5.61, 0.123),
        3.5: (5.74, 0.124),
        4.0: (5.91, 0.126),
    },
}
