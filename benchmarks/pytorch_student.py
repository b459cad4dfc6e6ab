"""The student's layers written plainly in PyTorch: what `benchmarks.pytorch` compares with.

From docs/model.md and the names of a released file alone, for inference. The order of the sums is the one a
reader of the paper would write, above all the position term as a 3-D convolution whose result is held whole.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = (320, 640, 1280)
HEADS, TOKENS, CONTEXT, WINDOW = 8, 10, 768, 15


class Separable(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv_pw = nn.Conv2d(width, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv_pw(F.relu(self.bn1(self.conv_dw(x)))))
        return x + y if x.shape == y.shape else y


class Residual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, width)
        self.conv1 = Separable(width, out)
        self.time_emb_proj = nn.Linear(4 * LEVELS[0], out)
        self.norm2 = nn.GroupNorm(32, out)
        self.conv2 = Separable(out, out)
        self.conv_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class LocalLambda(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        depth = width // HEADS
        self.to_q = nn.Conv2d(width, width, 1, bias=False)
        self.to_k = nn.Conv2d(width, depth, 1, bias=False)
        self.to_v = nn.Conv2d(width, depth, 1, bias=False)
        self.norm_q, self.norm_v = nn.BatchNorm2d(width), nn.BatchNorm2d(depth)
        self.pos_conv = nn.Conv3d(1, depth, (1, WINDOW, WINDOW), padding=(0, WINDOW // 2, WINDOW // 2))

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        queries = self.norm_q(self.to_q(x)).unflatten(1, (HEADS, -1)).flatten(3)  # b h k n
        keys = self.to_k(x).flatten(2).softmax(-1)  # b k n
        volume = self.norm_v(self.to_v(x))  # b v y x
        content = torch.einsum("bkn,bvn->bkv", keys, volume.flatten(2))
        position = self.pos_conv(volume[:, None]).flatten(3)  # b k v n
        out = torch.einsum("bhkn,bkv->bhvn", queries, content)
        return (out + torch.einsum("bhkn,bkvn->bhvn", queries, position)).reshape(x.shape)


class InteractiveLambda(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        depth = width // HEADS
        self.rel_pos_emb = nn.Parameter(torch.zeros(side * side, TOKENS, depth, 1))
        self.to_q = nn.Conv2d(width, width, 1, bias=False)
        self.to_k, self.to_v = (nn.Linear(CONTEXT, depth, bias=False) for _ in range(2))
        self.norm_q, self.norm_v = nn.BatchNorm2d(width), nn.BatchNorm1d(depth)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        queries = self.norm_q(self.to_q(x)).unflatten(1, (HEADS, -1)).flatten(3)
        keys = self.to_k(context).softmax(1)  # b l k
        values = self.norm_v(self.to_v(context).mT)  # b v l
        content = torch.einsum("blk,bvl->bkv", keys, values)
        position = torch.einsum("nlk,bvl->bnkv", self.rel_pos_emb[..., 0], values)
        return torch.einsum("bhkn,bnkv->bhvn", queries, content[:, None] + position).reshape(x.shape)


class Named(nn.Module):
    """A convolution that lies one name deeper."""

    def __init__(self, *sizes: int, **options: int | bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MixFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2.5 * width)
        self.inverted_conv = Named(width, 2 * hidden, 1)
        self.depth_conv = Named(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point_conv = Named(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, 1)
        return self.point_conv(left * F.silu(gate))


class Block(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = LocalLambda(width), InteractiveLambda(width, side)
        self.ff = MixFeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def normed(norm: nn.LayerNorm) -> Tensor:
            return norm(x.movedim(1, -1)).movedim(-1, 1)

        x = x + self.attn1(normed(self.norm1), context)
        x = x + self.attn2(normed(self.norm2), context)
        return x + self.ff(normed(self.norm3))


class Transformer(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Block(width, side)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.proj_out(self.transformer_blocks[0](self.proj_in(self.norm(x)), context))


class Level(nn.Module):
    """Residual blocks and transformers of some widths in and out."""

    def __init__(self, widths: list[tuple[int, int]], side: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Residual(*sizes) for sizes in widths])
        self.attentions = nn.ModuleList([Transformer(out, side) for _, out in widths])


class Down(Level):
    def __init__(self, width: int, out: int, side: int, *, is_last: bool) -> None:
        super().__init__([(width, out), (out, out)], side)
        self.downsamplers = nn.ModuleList([] if is_last else [Named(out, out, 3, stride=2, padding=1)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> list[Tensor]:
        skips = []
        for residual, transformer in zip(self.resnets, self.attentions, strict=True):
            x = transformer(residual(x, time), context)
            skips.append(x)
        return skips + [down(x) for down in self.downsamplers]


class Up(Level):
    def __init__(self, widths: list[tuple[int, int]], side: int, *, is_last: bool) -> None:
        super().__init__(widths, side)
        out = widths[-1][1]
        self.upsamplers = nn.ModuleList([] if is_last else [Named(out, out, 3, padding=1)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Tensor) -> Tensor:
        for residual, transformer in zip(self.resnets, self.attentions, strict=True):
            x = transformer(residual(torch.cat([x, skips.pop()], 1), time), context)
        for up in self.upsamplers:
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class TimeEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(LEVELS[0], 4 * LEVELS[0])
        self.linear_2 = nn.Linear(4 * LEVELS[0], 4 * LEVELS[0])

    def forward(self, timesteps: Tensor) -> Tensor:
        half = LEVELS[0] // 2
        rates = torch.exp(-torch.arange(half) * (torch.log(torch.tensor(10000.0)) / half))
        angles = timesteps[:, None].float() * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class Denoiser(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv_in = Separable(9, LEVELS[0])
        self.time_embedding = TimeEmbedding()
        self.encoder_hid_proj = nn.Linear(3072, CONTEXT)
        sides = [side >> i for i in range(len(LEVELS))]
        last, widths = len(LEVELS) - 1, (LEVELS[0], *LEVELS)
        self.down_blocks = nn.ModuleList(
            [Down(widths[i], widths[i + 1], sides[i], is_last=i == last) for i in range(len(LEVELS))]
        )
        self.up_blocks = nn.ModuleList()
        below = LEVELS[-1]
        for i in reversed(range(len(LEVELS))):
            out, beside = LEVELS[i], widths[i]
            sizes = [(below + out, out), (2 * out, out), (out + beside, out)]
            self.up_blocks.append(Up(sizes, sides[i], is_last=i == 0))
            below = out
        self.conv_norm_out = nn.GroupNorm(32, LEVELS[0])
        self.conv_out = Separable(LEVELS[0], 4)

    def forward(self, x: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        time, context = self.time_embedding(timesteps), self.encoder_hid_proj(rows)
        x = self.conv_in(x)
        skips = [x]
        for down in self.down_blocks:
            skips += down(skips[-1], time, context)
        x = skips[-1]
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Student(nn.Module):
    """Predicted noise [B, 4, H, W] of latents [B, 9, H, W], timesteps [B] and category ids [B, 10]."""

    def __init__(self, side: int = 64) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(20, 3072)
        self.diff_model = Denoiser(side)

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.diff_model(latents, timesteps, self.embedding_layer(ids))
