"""Models as people write them by hand, small: those of :mod:`zoo` that no library has.

Each builder returns a module and its positional inputs; where the loss is part of what is special
about a model, its forward returns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]
BUILDERS: dict[str, Callable[[], Made]] = {}


def by_hand(builder: Callable[[], Made]) -> Callable[[], Made]:
    BUILDERS[builder.__name__] = builder
    return builder


# Images -------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Of a diffusion model's U-Net: the embedded time scales and shifts the second norm."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inner), nn.GroupNorm(4, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(time, 2 * outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.drop(F.silu(h)))


class SpatialAttention(nn.Module):
    """Attention between the places of an image, its products written out."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch * self.heads, -1, height * width)
        q, k, v = qkv.chunk(3, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(q.shape[1])
        h = torch.einsum("bts,bcs->bct", weights.softmax(dim=-1), v)
        return x + self.out(h.reshape(batch, channels, height, width))


class UNet(nn.Module):
    """Predicts the noise of an image at a time of the diffusion, and is told how wrong it is."""

    def __init__(self, width: int = 16, time: int = 32) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = ResidualBlock(width, 2 * width, time)
        self.halve = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.middle = ResidualBlock(2 * width, 2 * width, time)
        self.attention = SpatialAttention(2 * width)
        self.up = ResidualBlock(4 * width, width, time)
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(self.width // 2, device=x.device))
        angles = time[:, None].float() * rates
        t = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        skip = self.down(self.first(x + noise * time[:, None, None, None] / 100), t)
        h = self.attention(self.middle(self.halve(skip), t))
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        out = self.last(self.up(torch.cat([h, skip], dim=1), t))
        return F.mse_loss(out, noise)


@by_hand
def unet_attention() -> Made:
    x = torch.randn(2, 3, 16, 16)
    return UNet(), (x, torch.randint(0, 100, (2,)), torch.randn_like(x))


class UNet3d(nn.Module):
    """Of medical volumes: instance norms, leaky ReLUs, and the Dice loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inner: int, outer: int) -> nn.Module:
            norm = nn.InstanceNorm3d(outer, affine=True)
            return nn.Sequential(nn.Conv3d(inner, outer, 3, padding=1), norm, nn.LeakyReLU(0.01))

        self.down, self.middle = block(1, width), block(width, 2 * width)
        self.pool = nn.MaxPool3d(2)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        last = nn.Conv3d(width, 3, 1)
        self.last = nn.Sequential(block(2 * width, width), nn.Dropout3d(0.1), last)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        skip = self.down(x)
        h = self.up(self.middle(self.pool(skip)))
        p = self.last(torch.cat([h, skip], dim=1)).softmax(dim=1)
        wanted = F.one_hot(target, 3).permute(0, 4, 1, 2, 3).to(p.dtype)
        overlap = (p * wanted).sum(dim=(2, 3, 4))
        dice = 2 * overlap / (p.sum(dim=(2, 3, 4)) + wanted.sum(dim=(2, 3, 4)) + 1e-5)
        return 1 - dice.mean()


@by_hand
def unet3d() -> Made:
    return UNet3d(), (torch.randn(2, 1, 8, 16, 16), torch.randint(0, 3, (2, 8, 16, 16)))


class VAE(nn.Module):
    """A variational autoencoder with its evidence bound."""

    def __init__(self, inner: int = 256, hidden: int = 64, code: int = 8) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(inner, hidden), nn.ReLU())
        self.mean, self.log_var = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decode = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, inner))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        error = F.binary_cross_entropy(torch.sigmoid(self.decode(z)), x, reduction="sum")
        return error - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())


@by_hand
def vae() -> Made:
    return VAE(), (torch.rand(32, 256),)


class VQVAE(nn.Module):
    """Codes by the nearest vector of a book; gradients go straight through."""

    def __init__(self, width: int = 16, words: int = 32) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1)
        )
        self.book = nn.Embedding(words, width)
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).permute(0, 2, 3, 1)
        distances = torch.cdist(z.reshape(-1, z.shape[-1]), self.book.weight)
        words = self.book(distances.argmin(dim=1)).view_as(z)
        book = F.mse_loss(words, z.detach()) + 0.25 * F.mse_loss(z, words.detach())
        z = z + (words - z).detach()
        return F.mse_loss(self.decode(z.permute(0, 3, 1, 2).contiguous()), x) + book


@by_hand
def vq_vae() -> Made:
    return VQVAE(), (torch.rand(2, 3, 32, 32) * 2 - 1,)


class Penalised(nn.Module):
    """A critic of Wasserstein's with its gradient penalty: a derivative of a derivative."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 3 * 16 * 16), nn.Tanh())
        self.critic = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32 * width, 1),
        )

    def forward(self, real: Tensor, code: Tensor) -> Tensor:
        fake = self.generator(code).view_as(real)
        mixed = (real + 0.3 * (fake - real)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(2, dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty


@by_hand
def gan_penalty() -> Made:
    return Penalised(), (torch.randn(4, 3, 16, 16), torch.randn(4, 8))


class SpectralGAN(nn.Module):
    """Both sides of a GAN, the critic with spectral norms, the generator with weight norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm, weight_norm

        self.generator = nn.Sequential(
            weight_norm(nn.Linear(8, 2 * width * 16)),
            nn.Unflatten(1, (2 * width, 4, 4)),
            nn.BatchNorm2d(2 * width),
            nn.PReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            weight_norm(nn.Conv2d(2 * width, width, 3, padding=1)),
            nn.PReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            spectral_norm(nn.Conv2d(3, width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            spectral_norm(nn.Linear(32 * width, 1)),
        )

    def forward(self, real: Tensor, code: Tensor) -> Tensor:
        said = self.critic(self.generator(code))
        loss = F.softplus(-said).mean()
        return loss + F.relu(1 - self.critic(real)).mean() + F.relu(1 + said).mean()


@by_hand
def gan_norms() -> Made:
    return SpectralGAN(), (torch.randn(4, 3, 16, 16), torch.randn(4, 8))


# Functions and fields -----------------------------------------------------------------------------


class Coupling(nn.Module):
    """Half of the channels say how the others are scaled and moved."""

    def __init__(self, channels: int, hidden: int, flip: bool) -> None:
        super().__init__()
        self.flip = flip
        self.net = nn.Sequential(
            nn.Linear(channels // 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        if self.flip:
            a, b = b, a
        log_scale, shift = self.net(a).chunk(2, dim=1)
        log_scale = torch.tanh(log_scale)
        b = b * log_scale.exp() + shift
        return torch.cat([b, a] if self.flip else [a, b], dim=1), log_scale.sum(dim=1)


class RealNVP(nn.Module):
    """A normalising flow with the negative log-likelihood."""

    def __init__(self, channels: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(channels, hidden, bool(i % 2)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], device=x.device)
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        likelihood = -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=1)
        return -(likelihood + total).mean()


@by_hand
def real_nvp() -> Made:
    return RealNVP(), (torch.randn(128, 8),)


class NeRF(nn.Module):
    """Colours along rays: positions in sines and cosines, densities, and the volume's sum."""

    def __init__(self, levels: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.levels = levels
        inner = 3 + 6 * levels
        self.first = nn.Sequential(nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.second = nn.Sequential(nn.Linear(hidden + inner, hidden), nn.ReLU())
        self.density, self.colour = nn.Linear(hidden, 1), nn.Linear(hidden, 3)

    def embed(self, x: Tensor) -> Tensor:
        parts = [x]
        for level in range(self.levels):
            parts += [torch.sin(2.0**level * x), torch.cos(2.0**level * x)]
        return torch.cat(parts, dim=-1)

    def forward(self, origins: Tensor, directions: Tensor, wanted: Tensor) -> Tensor:
        depths = torch.linspace(2.0, 6.0, 16, device=origins.device)
        points = origins[:, None, :] + directions[:, None, :] * depths[None, :, None]
        x = self.embed(points)
        h = self.second(torch.cat([F.relu(self.first(x)), x], dim=-1))
        steps = torch.cat([depths[1:] - depths[:-1], depths.new_full((1,), 1e3)])
        alpha = 1 - torch.exp(-F.relu(self.density(h).squeeze(-1)) * steps)
        passed = torch.cumprod(1 - alpha + 1e-10, dim=-1)
        passed = torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=-1)
        seen = (alpha * passed)[..., None] * torch.sigmoid(self.colour(h))
        return F.mse_loss(seen.sum(dim=1), wanted)


@by_hand
def nerf() -> Made:
    directions = F.normalize(torch.randn(16, 3), dim=-1)
    return NeRF(), (torch.randn(16, 3), directions, torch.rand(16, 3))


class Burgers(nn.Module):
    """A physics-informed net: the residual of an equation, in derivatives of the net."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.last = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
        u = self.last(self.net(torch.stack([x, t], dim=1))).squeeze(1)
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        return (u_t + u * u_x - 0.01 / math.pi * u_xx).square().mean()


@by_hand
def physics_informed() -> Made:
    return Burgers(), (torch.rand(64) * 2 - 1, torch.rand(64))


class SpectralConv(nn.Module):
    """Of a Fourier neural operator: the lowest frequencies are mixed by complex weights."""

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        shape = (channels, channels, modes, modes)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        spectrum, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros_like(spectrum)
        mixed = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :m, :m], self.weight)
        out[:, :, :m, :m] = mixed
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO(nn.Module):
    def __init__(self, channels: int = 8, modes: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv2d(1, channels, 1)
        self.spectral = nn.ModuleList(SpectralConv(channels, modes) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.last = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.GELU(), nn.Conv2d(32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.last(x)


@by_hand
def fno() -> Made:
    return FNO(), (torch.randn(2, 1, 16, 16),)


# Sequences ----------------------------------------------------------------------------------------


class LSTMLanguageModel(nn.Module):
    def __init__(self, words: int = 96, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(tokens[:, :-1]))
        return F.cross_entropy(self.head(h).flatten(0, 1), tokens[:, 1:].flatten())


@by_hand
def lstm() -> Made:
    return LSTMLanguageModel(), (torch.randint(0, 96, (4, 25)),)


class GRUTagger(nn.Module):
    def __init__(self, words: int = 96, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(tokens))[0])


@by_hand
def gru() -> Made:
    return GRUTagger(), (torch.randint(0, 96, (4, 24)),)


class Cells(nn.Module):
    """A decoder that calls the cells of an LSTM and a GRU step by step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(width, width), nn.GRUCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = c = g = torch.zeros_like(x[:, 0])
        out = []
        for t in range(x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
            out.append(g)
        return torch.stack(out, dim=1)


@by_hand
def recurrent_cells() -> Made:
    return Cells(), (torch.randn(8, 6, 32),)


class SeparatorBlock(nn.Module):
    """Of Conv-TasNet: a depthwise convolution between global norms."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(channels, hidden, 1),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),
        )
        self.on, self.skip = nn.Conv1d(hidden, channels, 1), nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        return x + self.on(h), self.skip(h)


class ConvTasNet(nn.Module):
    """Separates two speakers; the loss is their signal-to-noise ratio."""

    def __init__(self, filters: int = 32, channels: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, filters, 16, stride=8, bias=False)
        self.narrow = nn.Sequential(nn.GroupNorm(1, filters), nn.Conv1d(filters, channels, 1))
        self.blocks = nn.ModuleList(SeparatorBlock(channels, hidden, 2**i) for i in range(3))
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, 2 * filters, 1), nn.Sigmoid())
        self.decode = nn.ConvTranspose1d(filters, 1, 16, stride=8, bias=False)

    def forward(self, mixture: Tensor, sources: Tensor) -> Tensor:
        w = self.encode(mixture[:, None])
        h, total = self.narrow(w), 0
        for block in self.blocks:
            h, skip = block(h)
            total = total + skip
        masked = self.masks(total).unflatten(1, (2, -1)) * w[:, None]
        said = self.decode(masked.flatten(0, 1)).view_as(sources)
        scale = (said * sources).sum(-1, keepdim=True) / sources.square().sum(-1, keepdim=True)
        wanted = scale * sources
        ratio = wanted.square().sum(-1) / ((said - wanted).square().sum(-1) + 1e-8)
        return -10 * torch.log10(ratio + 1e-8).mean()


@by_hand
def conv_tasnet() -> Made:
    sources = torch.randn(2, 2, 512)
    return ConvTasNet(), (sources.sum(dim=1), sources)


# Graphs and tables --------------------------------------------------------------------------------


class MessagePassing(nn.Module):
    """Nodes hear from their neighbours: lookups, messages, sums at their targets."""

    def __init__(self, width: int = 32, rounds: int = 2) -> None:
        super().__init__()
        self.messages = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(rounds)
        )
        self.updates = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(rounds))
        self.scores = nn.ModuleList(nn.Linear(width, 1) for _ in range(rounds))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
        source, target = edges
        for message, update, score in zip(self.messages, self.updates, self.scores, strict=True):
            m = message(torch.cat([x[source], x[target]], dim=1))
            weight = torch.sigmoid(score(m))
            heard = torch.zeros_like(x).index_add(0, target, weight * m)
            count = torch.zeros_like(x[:, :1]).scatter_add(0, target[:, None], weight)
            x = x + F.silu(update(torch.cat([x, heard / (count + 1e-6)], dim=1)))
        where = graphs[:, None].expand_as(x)
        most = x.new_zeros(4, x.shape[1]).scatter_reduce(0, where, x, "amax", include_self=False)
        return self.head(most)


@by_hand
def message_passing() -> Made:
    edges = torch.randint(0, 48, (2, 160))
    return MessagePassing(), (torch.randn(48, 32), edges, torch.arange(48) // 12)


class Recommender(nn.Module):
    """As DLRM: bags of categories, dense features, and the products of all pairs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(100, width, mode=m) for m in ("sum", "mean"))
        self.user = nn.Embedding(50, width)
        self.dense = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, offset=-1))

    def forward(self, features: Tensor, user: Tensor, items: Tensor, clicked: Tensor) -> Tensor:
        bottom = self.dense(features)
        every = torch.stack([bottom, self.user(user), *(bag(items) for bag in self.bags)], dim=1)
        products = torch.bmm(every, every.transpose(1, 2))
        crossed = products[:, self.pairs[0], self.pairs[1]]
        logits = self.top(torch.cat([bottom, crossed], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked)


@by_hand
def recommender() -> Made:
    users, items = torch.randint(0, 50, (64,)), torch.randint(0, 100, (64, 5))
    return Recommender(), (torch.randn(64, 13), users, items, torch.randint(0, 2, (64,)).float())


# Computed weights ---------------------------------------------------------------------------------


class StandardisedConv(nn.Conv2d):
    """Weights less their mean, over their deviation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        var = self.weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ModulatedConv(nn.Module):
    """Of StyleGAN2: a style scales the weights, which are brought back to length one."""

    def __init__(self, inner: int, outer: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outer, inner, 3, 3) / math.sqrt(9 * inner))
        self.style = nn.Linear(style, inner)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, inner, height, width = x.shape
        weight = self.weight[None] * (1 + self.style(style))[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * inner, height, width)
        out = F.conv2d(x, weight.flatten(0, 1), padding=1, groups=batch)
        return out.view(batch, -1, height, width)


class Styled(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = StandardisedConv(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.modulated = ModulatedConv(width, width, 8)
        self.last = StandardisedConv(width, 3, 1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.last(F.leaky_relu(self.modulated(x, style), 0.2) * math.sqrt(2))


@by_hand
def computed_weights() -> Made:
    return Styled(), (torch.randn(2, 3, 16, 16), torch.randn(2, 8))
