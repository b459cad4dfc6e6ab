"""What can be measured, and what must be fetched for it."""

from typing import Literal, get_args

Metric = Literal["fid", "ids", "lpips", "psnr", "ssim", "l1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
NEEDS_INCEPTION = ("fid", "ids")
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
