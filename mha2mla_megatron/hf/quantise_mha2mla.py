"""Rows of a cache in 2, 4, 8 or 16 bits: quantised once, packed into bytes, never quantised again.

A group is one channel of `group_size` consecutive tokens. The channels of a latent differ much in range, and those with
the smallest range are multiplied by the largest weights, so a step shared by the channels of a token would drown them.
Groups along the tokens fit every width; and a new block of tokens leaves the older ones as they are.

Shape letters: t tokens, n blocks of g tokens (t = n g), w channels, p values per byte; * is any leading dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

START_RANGES = (1.0, 0.7)
"""Shares of a group's range that the search for its grid starts from."""

REFITS = 3


def fit_grid(x: torch.Tensor, nbits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) in float16, each [*, 1, w], of the groups x, float32 [*, g, w]: value = zero + scale code.

    8 bits: the range, from smallest to largest. Fewer: the grid of smallest squared error among the range and a few
    rounds of least squares (codes from the grid, then the grid from the codes) from the whole range and from a part of
    it. At 2 bits that halves the error of the range alone.
    """
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    levels = 2**nbits - 1
    best = to_half((high - low) / levels), to_half(low)
    if nbits == 8:
        return best
    mean, smallest = x.mean(-2, keepdim=True), _squared_error(x, *best, nbits)
    for share in START_RANGES:
        zero = (low + high) / 2 - (high - low) * (share / 2)
        scale = (high - low) * (share / levels)
        for _ in range(REFITS):
            codes = _codes(x, scale, zero, nbits)
            centred = codes - codes.mean(-2, keepdim=True)
            # A group of equal values has no slope; its scale becomes 0 and all its codes with it.
            slope = (centred * (x - mean)).sum(-2, keepdim=True) / centred.square().sum(-2, keepdim=True).clamp(min=0.5)
            scale, zero = slope, mean - slope * codes.mean(-2, keepdim=True)
        refit = to_half(scale), to_half(zero)
        error = _squared_error(x, *refit, nbits)
        better = error < smallest
        best = torch.where(better, refit[0], best[0]), torch.where(better, refit[1], best[1])
        smallest = torch.minimum(error, smallest)
    return best


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Codes uint8 [*, g, w] -> bytes [*, g / p, w]: p consecutive tokens of a channel, the first in the lowest bits."""
    *rest, g, w = codes.shape
    grouped = codes.view(*rest, g * nbits // 8, 8 // nbits, w)
    packed = grouped[..., 0, :].clone()
    for i in range(1, grouped.shape[-2]):
        packed |= grouped[..., i, :] << (i * nbits)
    return packed


def unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """The inverse of `pack`."""
    shifts = range(0, 8, nbits)
    return torch.stack([(packed >> shift) & (2**nbits - 1) for shift in shifts], dim=-2).flatten(-3, -2)


def encode(blocks: torch.Tensor, nbits: int) -> dict[str, torch.Tensor]:
    """Groups of tokens [*, n, g, w] as `codes`, uint8 [*, n, g / p, w], with `scale` and `zero`, float16 [*, n, 1, w];
    in 16 bits `codes` alone, float16 [*, n, g, w]."""
    blocks = blocks.float()
    if nbits == 16:
        return {"codes": to_half(blocks)}
    scale, zero = fit_grid(blocks, nbits)
    codes = _codes(blocks, scale.float(), zero.float(), nbits).to(torch.uint8)
    return {"codes": pack(codes, nbits), "scale": scale, "zero": zero}


def decode(parts: dict[str, torch.Tensor], nbits: int, dtype: torch.dtype) -> torch.Tensor:
    """What `encode` returned -> tokens [*, n g, w] in this type."""
    if nbits == 16:
        return parts["codes"].flatten(-3, -2).to(dtype)
    codes = unpack(parts["codes"], nbits).float()
    return torch.addcmul(parts["zero"].float(), codes, parts["scale"].float()).flatten(-3, -2).to(dtype)


class QuantizedRows:
    """Rows [*, t, w] that grow at their end.

    nbits 16 keeps float16 values and no grid: as exact as a 16-bit model's own values.
    """

    def __init__(self, nbits: int, group_size: int) -> None:
        self.nbits, self.group_size = nbits, group_size
        self.codes: torch.Tensor | None = None
        """uint8 [*, n, g / p, w], or float16 [*, n, g, w]."""
        self.scale: torch.Tensor | None = None
        self.zero: torch.Tensor | None = None
        """float16 [*, n, 1, w], like the scale."""

    @property
    def tokens(self) -> int:
        return 0 if self.codes is None else self.codes.shape[-3] * self.group_size

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._parts().values())

    def append(self, rows: torch.Tensor) -> None:
        """Quantise rows [*, n g, w] behind what there is."""
        new = encode(rows.unflatten(-2, (-1, self.group_size)), self.nbits)
        old = self._parts()
        for name, part in new.items():
            setattr(self, name, torch.cat((old[name], part), dim=-3) if old else part)

    def dequantize(self, like: torch.Tensor) -> torch.Tensor:
        """All rows [*, t, w], in the type of `like`, rows [*, any, w] of which the leading dims and w are taken."""
        if self.codes is None:
            return like[..., :0, :]
        return decode(self._parts(), self.nbits, like.dtype)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by function(tensor), which may change the first dim only."""
        for name, part in self._parts().items():
            setattr(self, name, function(part))

    def _parts(self) -> dict[str, torch.Tensor]:
        parts: dict[str, Any] = {"codes": self.codes, "scale": self.scale, "zero": self.zero}
        return {name: part for name, part in parts.items() if part is not None}


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, nbits: int) -> torch.Tensor:
    """The nearest codes, in float32."""
    return ((x - zero) / scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(0, 2**nbits - 1)


def _squared_error(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, nbits: int) -> torch.Tensor:
    """Of each group, [*, 1, w], with the grid as it is stored."""
    scale, zero = scale.float(), zero.float()
    return (x - zero - scale * _codes(x, scale, zero, nbits)).square().sum(-2, keepdim=True)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float16 has 3 bits more than bfloat16, and no latent comes near its largest number."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).to(torch.float16)
