"""The VAE's layers written plainly in PyTorch: what `benchmarks.pytorch` compares with.

From docs/model.md ("VAE") and the names of a released file alone, for inference.
"""

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (128, 256, 512, 512)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(out)
        self.conv1, self.conv2 = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.group_norm = _norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).mT
        y = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out[0](y).mT.reshape(x.shape)


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(width, width) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Halved(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Doubled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, width: int, out: int, blocks: int, **resample: nn.Module) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(w, out) for w in (width, *[out] * (blocks - 1))])
        for name, layer in resample.items():
            setattr(self, name, nn.ModuleList([layer]))
        self.resample = tuple(resample)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for name in self.resample:
            x = getattr(self, name)[0](x)
        return x


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        halved = [{"downsamplers": Halved(width)} for width in WIDTHS[:-1]]
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, (*halved, {}), strict=False)
        self.down_blocks = nn.ModuleList([Level(width, out, 2, **more) for width, out, more in pairs])
        self.mid_block = Middle(WIDTHS[-1])
        self.conv_norm_out = _norm(WIDTHS[-1])
        self.conv_out = nn.Conv2d(WIDTHS[-1], 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = WIDTHS[::-1]
        self.conv_in = nn.Conv2d(4, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        doubled = [{"upsamplers": Doubled(width)} for width in widths[:-1]]
        pairs = zip((widths[0], *widths), widths, (*doubled, {}), strict=False)
        self.up_blocks = nn.ModuleList([Level(width, out, 3, **more) for width, out, more in pairs])
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Maps are [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Mean and log-variance, before scaling."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """The image of unscaled latents."""
        return self.decoder(self.post_quant_conv(latents))
