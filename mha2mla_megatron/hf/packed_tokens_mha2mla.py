"""One tensor of a static quantised cache: memory for all its tokens, allocated once and written in place.

The rule is that of `QuantizedRows` behind a window: of l tokens, the whole groups older than the newest
`residual_length` are packed, floor((l - residual_length) / group_size) of them. Packed tokens lie one after the other;
the window is a ring, in which token i has slot i modulo its length. A group leaves the ring right before the token
that follows it, whose attention sees it packed, as in the dynamic cache; the ring is long enough to hold it until then.

Nothing depends on a number that the host would have to wait for: how many tokens there are is a tensor on the device.

Shape letters: b batch, s new tokens, n groups of g tokens, W slots of the window, p values per byte, w channels.
"""

from __future__ import annotations

import torch

from .quantise_mha2mla import decode, encode, to_half
from .quantise_triton_mha2mla import append_token, can_append


class PackedTokens:
    """Tokens [b, ., w] in nbits 2, 4, 8 or 16 (float16), the newest in `window_dtype`."""

    def __init__(self, like: torch.Tensor, capacity: int, nbits: int, group_size: int, residual_length: int) -> None:
        """like: [b, any, w], for its sizes, type and device; capacity: tokens that there is room for."""
        batch, _, self.width = like.shape
        self.nbits, self.group_size, self.residual_length = nbits, group_size, residual_length
        self.capacity = capacity
        self.blocks = max(0, (capacity - residual_length) // group_size)
        """n: groups that there is room for."""
        rows, code_type = (group_size, torch.float16) if nbits == 16 else (group_size * nbits // 8, torch.uint8)
        self.codes = torch.zeros(batch, self.blocks, rows, self.width, dtype=code_type, device=like.device)
        """uint8 [b, n, g / p, w], or float16 [b, n, g, w]."""
        grids = 0 if nbits == 16 else self.blocks
        self.scale = torch.zeros(batch, grids, 1, self.width, dtype=torch.float16, device=like.device)
        self.zero = torch.zeros_like(self.scale)
        """float16 [b, n, 1, w], like the scale; in 16 bits [b, 0, 1, w]."""
        slots = min(residual_length + group_size, capacity)
        dtype = like.dtype if like.dtype.itemsize > 2 else torch.float16
        self.window = torch.zeros(batch, slots, self.width, dtype=dtype, device=like.device)
        """[b, W, w]: float16 for 16-bit models, whose values it holds as exactly, else the model's type."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scale, self.zero, self.window]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.tensors)

    def append(self, new: torch.Tensor, tokens: torch.Tensor) -> None:
        """Store new [b, s, w] behind `tokens`, int64 scalar on the device: how many there are already."""
        if self.width == 0:
            return
        if new.shape[1] == 1 and can_append(self, new):
            append_token(self, new, tokens)
            return
        slots = self.window.shape[1]
        # One token waits for the next one to push a group out; of more, what the ring cannot hold is packed at once.
        more = 0 if new.shape[1] == 1 else -(-new.shape[1] // self.group_size)
        after = tokens + new.shape[1]
        self._pack(new, tokens, self._packed(tokens) - 1, self._packed(tokens if more == 0 else after), 1 + more)
        kept = min(new.shape[1], slots)
        position = after - kept + torch.arange(kept, device=new.device)
        self.window.index_copy_(1, position % slots, self._to_window(new[:, -kept:]))

    def dequantize(self, new: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens [b, capacity, w] as `new` [b, s, w], behind `tokens` others, sees them, in its type; zeros behind.

        To be called before new is appended."""
        if self.width == 0:
            return new.new_zeros(new.shape[0], self.capacity, 0)
        new_tokens, slots, device = new.shape[1], self.window.shape[1], new.device
        position = torch.arange(self.capacity, device=device)
        rows = self.window[:, position % slots].to(new.dtype)
        if self.blocks:
            # The last group may still wait in the ring, where it is exact: what it sees is packed.
            self._pack(new, tokens, self._packed(tokens) - 1, self._packed(tokens), 1)
            old = decode(self._parts(), self.nbits, new.dtype)
            packed = (position[: old.shape[1]] < self._packed(tokens) * self.group_size)[:, None]
            rows[:, : old.shape[1]] = torch.where(packed, old, rows[:, : old.shape[1]])
        rows = torch.where((position < tokens)[:, None], rows, 0)
        return rows.index_copy_(1, tokens + torch.arange(new_tokens, device=device), new)

    def _parts(self) -> dict[str, torch.Tensor]:
        return {"codes": self.codes, "scale": self.scale, "zero": self.zero}

    def _packed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Groups that are packed of so many tokens."""
        return torch.div(tokens - self.residual_length, self.group_size, rounding_mode="floor").clamp(min=0)

    def _pack(
        self, new: torch.Tensor, tokens: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, most: int
    ) -> None:
        """Pack groups first (or 0) to stop, at most `most`, of the tokens in the ring and the new ones behind them."""
        most = min(most, self.blocks)
        if most == 0:
            return
        # A fixed number of groups, that fits; those that are not wanted keep what they hold.
        start = first.clamp(min=0, max=self.blocks - most)
        block = start + torch.arange(most, device=new.device)
        in_ring = block * self.group_size >= tokens - self.window.shape[1]  # what left it was packed before
        wanted = (block >= first.clamp(min=0)) & (block < stop) & in_ring
        if new.device.type == "cpu" and not torch.compiler.is_compiling() and not wanted.any():
            return  # 31 of 32 steps, where looking costs nothing
        position = (block[:, None] * self.group_size + torch.arange(self.group_size, device=new.device)).flatten()
        rows = self.window[:, position % self.window.shape[1]]
        fresh = self._to_window(new)[:, (position - tokens).clamp(0, new.shape[1] - 1)]
        rows = torch.where((position < tokens)[:, None], rows, fresh)
        parts = encode(rows.view(len(rows), most, self.group_size, rows.shape[-1]), self.nbits)
        for name, part in parts.items():
            target = self._parts()[name]
            target.index_copy_(1, block, torch.where(wanted[:, None, None], part, target[:, block]))

    def _to_window(self, rows: torch.Tensor) -> torch.Tensor:
        return to_half(rows) if self.window.dtype == torch.float16 else rows
