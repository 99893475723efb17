"""PRA in one file: a model that generates images patch by patch, straight in pixels, in torch alone.

python examples/pra_in_one_file.py digits.pgm    # trains on scikit-learn's digits in some 3 minutes, then draws 80

The method is "Parallel Rollout Approximation for Pixel-Space Autoregressive Image Generation" (arXiv 2606.27978).
Symbols are the paper's: image (B, C, H, W) in [-1, 1], patches x (B, N, P) in raster order, conditions h (B, N, D),
states z (B, N, d) with d << P. docs/choices.md lists what the paper leaves open, and how this project chose.
"""

import copy
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Config(NamedTuple):
    """Sizes and settings; the defaults are those of the recipe `digits:faithful`."""

    channels: int = 1
    patch: int = 2  # p, the side of a patch; P = p * p * channels
    grid: tuple[int, int] = (4, 4)  # patches per column and per row; N = 16
    classes: int = 10
    class_tokens: int = 2  # prefix tokens of a class (paper: 16)
    backbone: tuple[int, int, int] = (4, 64, 4)  # blocks, width D, attention heads
    head: tuple[int, int, int] = (2, 64, 1)  # blocks, width, AdaLN projections that the blocks share
    encoder: tuple[int, int] = (1, 64)  # blocks, width
    decoder: tuple[int, int, int] = (2, 64, 4)  # blocks, width, attention heads
    state_dim: int = 4  # d (paper: 16)
    encoder_sees_h: bool = False  # paper: true; false saves the clean pass
    t_min: float = 0.0  # states are perturbed to t ~ U(t_min, 1)
    noise_draws: int = 4  # pairs (t, eps) per token in L_flow
    class_dropout: float = 0.1
    auxiliary_weight: float = 0.1  # paper: 1


class SwiGLU(nn.Module):
    """W2 (silu(W1a x) * W1b x), arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 2 * hidden, bias), nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Causal attention with RMS-normalised queries and keys (arXiv 2302.05442), then the MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mlp = heads, SwiGLU(width, 8 * width // 3)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, rotary: Tensor, cache: dict) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.query_norm(q), rotary), rotate(self.key_norm(k), rotary)
        if self in cache:  # in sampling: one token behind those whose keys and values are kept
            k, v = (torch.cat(both, dim=2) for both in zip(cache[self], (k, v), strict=True))
        cache[self] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.mlp_norm(x))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    (cos, sin), (a, b) = table, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Transformer(nn.Module):
    """Blocks over `prefix` tokens and a grid of patches. Rotary angles turn half with the row, half with the column."""

    def __init__(self, sizes: tuple[int, int, int], prefix: int, grid: tuple[int, int]) -> None:
        super().__init__()
        depth, width, heads = sizes
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(depth)), nn.RMSNorm(width, eps=1e-6)
        patches = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])) + 1  # row and column
        frequencies = 10_000.0 ** (-torch.arange(0, width // heads // 2, 2).double() / (width // heads // 2))
        angles = (torch.cat([torch.zeros(prefix, 2), patches]).double()[..., None] * frequencies).flatten(1)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]).float(), persistent=False)

    def forward(self, x: Tensor, cache: dict) -> Tensor:
        """Read the tokens behind those in the cache: keys and values (B, heads, tokens, head_dim) of each block."""
        first = cache[self.blocks[0]][0].shape[2] if cache else 0
        rotary = self.rotary[:, first : first + x.shape[1]]
        for block in self.blocks:
            x = block(x, rotary, cache)
        return self.norm(x)


class FlowHead(nn.Module):
    """v(z_t, t, h_i): an MLP per token under AdaLN (arXiv 2212.09748), the velocity of a state at flow time t."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        depth, width, projections = c.head
        self.state_in, self.condition_in = nn.Linear(c.state_dim, width), nn.Linear(c.backbone[1], width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        self.mlps = nn.ModuleList(SwiGLU(width, 3 * width // 2, bias=True) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(projections))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, c.state_dim)

    def forward(self, z_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """z_t (..., d), t (...) and h (..., D), which broadcast, to dz/dt (..., d)."""
        angles = 1000.0 * t[..., None] * torch.exp(-math.log(10_000.0) * torch.arange(128) / 128)
        time = self.time_in(torch.cat([angles.cos(), angles.sin()], dim=-1))
        context, x = F.silu(time + self.condition_in(h)), self.state_in(z_t)
        modulated = [projection(context).chunk(3, dim=-1) for projection in self.modulations]
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            shift, scale, gate = modulated[i * len(modulated) // len(self.mlps)]
            x = x + gate * mlp(norm(x) * (1 + scale) + shift)
        shift, scale = self.final_modulation(context).chunk(2, dim=-1)
        return self.out(self.final_norm(x) * (1 + scale) + shift)


class PRA(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config, patch_dim, width = c, c.patch**2 * c.channels, c.backbone[1]
        # Backbone F. The prefix is a few tokens per class; the last class is the null class of guidance.
        self.class_embedding = nn.Embedding(c.classes + 1, c.class_tokens * width)
        self.patch_in, self.backbone = nn.Linear(patch_dim, width), Transformer(c.backbone, c.class_tokens, c.grid)
        # A token sits where its own patch is. This tells the head which patch comes next.
        self.next_position = nn.Parameter(torch.empty(c.grid[0] * c.grid[1], width))
        # Encoder G: an MLP per patch. The encoder and the auxiliary predictor are for training alone.
        blocks, hidden = c.encoder
        self.encoder_in, self.encoder_out = nn.Linear(patch_dim, hidden), nn.Linear(hidden, c.state_dim)
        self.encoder_condition = nn.Linear(width, hidden, bias=False) if c.encoder_sees_h else None
        self.encoder_norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6) for _ in range(blocks + 1))
        self.encoder_mlps = nn.ModuleList(SwiGLU(hidden, 3 * hidden // 2) for _ in range(blocks))
        # Decoder D: causal over the states, so parallel in training and step by step in sampling.
        self.decoder_in, self.decoder = nn.Linear(c.state_dim, c.decoder[1]), Transformer(c.decoder, 0, c.grid)
        self.decoder_out = nn.Linear(c.decoder[1], patch_dim)
        self.head, self.auxiliary = FlowHead(c), nn.Linear(width, patch_dim)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.xavier_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for embedding in (self.class_embedding.weight, self.next_position):
            nn.init.normal_(embedding, std=0.02)
        for part in (self.backbone, self.decoder):  # GPT-2: smaller steps of the residual stream
            for block in part.blocks:
                block.out.weight /= math.sqrt(2 * len(part.blocks))
                block.mlp.out.weight /= math.sqrt(2 * len(part.blocks))
        for linear in (*self.head.modulations, self.head.final_modulation, self.head.out):
            nn.init.zeros_(linear.weight)  # DiT: the head begins as the zero field

    def prefix(self, labels: Tensor) -> Tensor:
        return self.class_embedding(labels).view(len(labels), self.config.class_tokens, -1)

    def conditions(self, labels: Tensor, x: Tensor) -> Tensor:
        """h = F(c, x): the first N - 1 patches to h_1 .. h_N, all positions in parallel."""
        h = self.backbone(torch.cat([self.prefix(labels), self.patch_in(x)], dim=1), {})
        return h[:, self.config.class_tokens - 1 :] + self.next_position

    def encode(self, x: Tensor, h: Tensor | None) -> Tensor:
        """z = norm(G(x, h)), a LayerNorm without affine: zero mean and ||z_i|| = sqrt(d)."""
        x = self.encoder_in(x) + (0.0 if self.encoder_condition is None else self.encoder_condition(h))
        for norm, mlp in zip(self.encoder_norms, self.encoder_mlps, strict=False):  # the last norm is of the output
            x = x + mlp(norm(x))
        return self.normalise(self.encoder_out(self.encoder_norms[-1](x)))

    def normalise(self, z: Tensor) -> Tensor:
        return F.layer_norm(z, (self.config.state_dim,))

    def decode(self, z: Tensor, cache: dict) -> Tensor:
        """x^_i = D(z_<=i)."""
        return self.decoder_out(self.decoder(self.decoder_in(z), cache))

    def patchify(self, images: Tensor) -> Tensor:
        c, (rows, columns) = self.config, self.config.grid
        x = images.view(len(images), c.channels, rows, c.patch, columns, c.patch)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(images), rows * columns, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        c, (rows, columns) = self.config, self.config.grid
        images = x.view(len(x), rows, columns, c.patch, c.patch, c.channels).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(len(x), c.channels, rows * c.patch, columns * c.patch)


# --- Training: the reconstruction pass and the AR pass ----------------------------------------------------------


def draw_noise(c: Config, b: int) -> tuple[Tensor, ...]:
    """Return the random numbers of a training step on b images."""
    n, d, draws = c.grid[0] * c.grid[1], c.state_dim, c.noise_draws
    dropped = torch.rand(b) < c.class_dropout  # for classifier-free guidance (arXiv 2207.12598)
    rollout_t = c.t_min + (1 - c.t_min) * torch.rand(b, n - 1, 1)  # ~ U(t_min, 1), independently per position
    flow_t = torch.randn(b, draws, n).sigmoid()  # logit-normal (arXiv 2403.03206)
    return dropped, rollout_t, torch.randn(b, n - 1, d), flow_t, torch.randn(b, draws, n, d)


def losses(model: PRA, images: Tensor, labels: Tensor, noise: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The losses of a training step by name; `total` is their weighted sum. sg is the stop-gradient."""
    c, x, (dropped, rollout_t, rollout_eps, flow_t, flow_eps) = model.config, model.patchify(images), noise
    # Reconstruction pass: it teaches the encoder and the decoder, and nothing else.
    with torch.no_grad():  # h0 = sg(F(c, x))
        h0 = model.conditions(labels, x[:, :-1]) if c.encoder_sees_h else None
    z = model.encode(x, h0)
    pixel = F.mse_loss(model.decode(z, {}), x)  # L_rec = |D(z) - x|^2 (paper: L1 + LPIPS)
    z = z.detach()  # sg(z): without it the states collapse onto what is easy to predict

    # The parallel rollout approximation. Sampling feeds the model pixels decoded from imperfect states. So does this,
    # with states that are perturbed on purpose, and no position waits for another.
    with torch.no_grad():
        perturbed = rollout_t * z[:, :-1] + (1 - rollout_t) * rollout_eps  # z~_i = t_i z_i + (1 - t_i) eps_i
        inputs = model.decode(perturbed, {}).clamp(-1.0, 1.0)  # x~ = sg(D(z~))

    # AR pass: it teaches the backbone and the head, and nothing else.
    h = model.conditions(labels.masked_fill(dropped, c.classes), inputs)  # h = F(c, x~)
    t, z = flow_t[..., None], z.unsqueeze(1)
    z_t = (1 - t) * flow_eps + t * z  # rectified flow (arXiv 2209.03003): dz_t/dt = z - eps
    flow = F.mse_loss(model.head(z_t, flow_t, h.unsqueeze(1)), z - flow_eps)  # L_flow = |v - sg(z - eps)|^2
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    auxiliary = F.mse_loss(model.auxiliary(h), (x - mean) / (variance + 1e-6).sqrt())  # L_aux: h_i predicts x_i
    terms = {"pixel": pixel, "flow": flow, "auxiliary": auxiliary}
    return {"total": pixel + flow + c.auxiliary_weight * auxiliary} | terms


def train(model: PRA, images: Tensor, labels: Tensor, steps: int = 1200, batch: int = 64) -> PRA:
    """Train by the recipe `digits:faithful`; return the moving average of the weights, which is what samples."""
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    others = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": list(matrices), "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    average, warmup, peak = copy.deepcopy(model).requires_grad_(False), 100, 2e-3
    for step in range(steps):
        progress = max(0, step - warmup) / max(1, steps - warmup)  # a linear warm-up, then a cosine to zero
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * progress))
        chosen = torch.randint(len(images), (batch,))
        found = losses(model, images[chosen], labels[chosen], draw_noise(model.config, batch))
        optimizer.zero_grad()
        found["total"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4}", *(f"{name} {value:.3f}" for name, value in found.items()), sep="  ", flush=True)
    return average


# --- Sampling: raster order, a cache of keys and values, guidance -----------------------------------------------


@torch.no_grad()
def sample(model: PRA, labels: Tensor, start: Tensor, guidance: float = 1.5, steps: int = 3) -> Tensor:
    """Images (B, C, H, W) of classes (B,), from normal noise `start` (B, N, d): where each state's path begins."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:  # v_null + s (v_class - v_null), arXiv 2207.12598
        v, v_null = model.head(z.repeat(2, 1, 1), t, h).chunk(2)
        return v_null + guidance * (v - v_null)

    backbone_cache, decoder_cache, patches = {}, {}, []
    # Guidance takes two streams in one batch, the class and the null class. Both read the same patches.
    tokens = model.prefix(torch.cat([labels, torch.full_like(labels, model.config.classes)]))
    for i in range(start.shape[1]):
        h = model.backbone(tokens, backbone_cache)[:, -1:] + model.next_position[i]  # h_i = F(c, x^_<i)
        z = start[:, i : i + 1]
        for t in torch.arange(steps) / steps:  # the midpoint rule, from noise (t = 0) to data (t = 1)
            half = z + velocity(z, t) / (2 * steps)
            z = z + velocity(half, t + 1 / (2 * steps)) / steps
        patches.append(model.decode(model.normalise(z), decoder_cache).clamp(-1.0, 1.0))  # x^_i = D(z_<=i)
        tokens = model.patch_in(patches[-1]).repeat(2, 1, 1)  # the patch is the next input
    return model.unpatchify(torch.cat(patches, dim=1))


def main(picture: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # 0..16 to [-1, 1]
    torch.manual_seed(0)
    model = train(PRA(Config()), images, torch.tensor(digits.target))
    made = sample(model, torch.arange(10).repeat_interleave(8), torch.randn(80, 16, model.config.state_dim))
    sheet = F.pad(made.view(10, 8, 8, 8), (1, 1, 1, 1), value=1.0)  # a digit a row, with white borders
    sheet = sheet.permute(0, 2, 1, 3).reshape(100, 80).repeat_interleave(4, 0).repeat_interleave(4, 1)
    picture.write_bytes(b"P5 320 400 255\n" + bytes(((sheet + 1) * 127.5).round().int().flatten().tolist()))
    print(f"look at {picture}: a digit a row")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "digits.pgm"))
