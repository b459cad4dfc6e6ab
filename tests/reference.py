"""The metrics' reference implementations; seeded weights where the real ones would have to be fetched."""

import math

import numpy as np
import torch

# torchvision from PyPI is built for CUDA; beside torch's CPU build its operators are missing, and it wants to
# describe two of them when it is imported. Nothing here calls them. Where they are there, a second definition
# would abort the process.
try:
    import torchvision  # noqa: F401
except RuntimeError:
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import pytorch_fid.inception


def seeded_inception(monkeypatch) -> torch.nn.Module:
    """pytorch-fid's network up to its pooled features, made by its own code, with made-up weights."""

    def fill(url: str, **_: object) -> dict[str, torch.Tensor]:
        assert url.endswith(".pth")
        return state_dict()

    # The one place where pytorch-fid would download.
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", fill)
    return pytorch_fid.inception.InceptionV3([3]).eval()


def state_dict() -> dict[str, torch.Tensor]:
    """Weights of FID's InceptionV3 under pytorch-fid's names: scaled so that no layer's values die out."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes().items():
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            tensors[name] = torch.zeros((), dtype=torch.int64)
        elif leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
            tensors[name] = 0.75 + 0.5 * torch.rand(shape, generator=generator)
        else:
            scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
            tensors[name] = scale * torch.randn(shape, generator=generator)
    return tensors


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of pytorch-fid's state dict, read off its own modules."""
    inception = pytorch_fid.inception
    net = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, block in {
        "Mixed_5b": inception.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": inception.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": inception.FIDInceptionA(288, pool_features=64),
    }.items():
        setattr(net, name, block)
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def to_torch(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → float [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
