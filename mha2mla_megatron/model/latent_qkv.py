"""From the normalised input to queries, keys and values in one step, forward and backward.

The same function as the chain of modules in `attention.MHA2MLASelfAttention`, for the GPU: everything that reads the
input and is split over heads is one matrix product, keys are written where attention reads them, gradients that meet
are summed by the products that make them, and weight gradients go straight into Megatron's float32 buffers.

Shape letters: S sequence, s the part of it that this process holds (S / tp under sequence parallelism, else S),
B batch, h hidden size, H query heads, G key/value heads (both those of this process), R heads of rotated keys (G, or 1
that all share), d head dim, r rotary dims kept per head, n other dims of a query or key head, C width of all latents,
tp tensor-parallel size.

Over tensor-parallel processes (tp > 1) each computes some of the latents' columns, for all tokens, and gathers the
others while it computes queries; so no weight is held twice, and no weight's gradient summed. Going back, the latents'
gradients are summed, each process getting those of its columns, while the input's gradient is computed, and the input's
while weight gradients are. A rotated key that all heads share is exchanged like latents: gathered while up-projections
are computed, its gradient summed while that of the latents is. Under sequence parallelism the input is gathered first,
both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mha2mla_megatron.model.rotary_kernel import HeadShape, rotate_and_join, rotate_and_split

FROM_INPUT = ("q", "k_rope", "k_nope", "v")
"""Projections of the input that are split over the heads, in the order of the rows of their common product."""


@dataclass(frozen=True)
class QKVPlan:
    """What `latent_qkv` is given besides tensors.

    shape: the query and key heads of this process. value_dim: d, of a value head. shared_rope: whether all heads, those
    of other processes too, have one rotated key. names: of the parameters in their order, `q.weight`, `q.bias`, ...
    with the projections q, k_rope, k_nope, v, kv_down, k_up, v_up. joint: whether v_up reads what k_up reads, too.
    key_rank: how many columns k_up reads.
    """

    shape: HeadShape
    value_dim: int
    shared_rope: bool
    names: tuple[str, ...]
    joint: bool
    key_rank: int
    tp_group: Any
    sequence_parallel: bool

    @cached_property
    def from_input(self) -> tuple[str, ...]:
        """Those of `FROM_INPUT` that there are."""
        return tuple(name for name in FROM_INPUT if f"{name}.weight" in self.names)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Columns of each of these."""
        shape = self.shape
        rope = shape.rope_heads * shape.rope_dim
        widths = {
            "q": shape.query_heads * shape.head_dim,
            "k_rope": rope // self.tp_group.size() if self.shared_rope else rope,
            "k_nope": shape.key_heads * shape.nope_dim,
            "v": shape.key_heads * self.value_dim,
        }
        return {name: widths[name] for name in self.from_input}

    def columns(self, mixed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their parts [T, width] of the common product [T, sum of widths]."""
        return dict(zip(self.widths, mixed.split(list(self.widths.values()), dim=1), strict=True))

    def latents(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What k_up and what v_up reads, of latents [T, C]."""
        if not ("k_up.weight" in self.names and "v_up.weight" in self.names):
            return both, both
        return both[:, : self.key_rank], both if self.joint else both[:, self.key_rank :]


def latent_qkv(
    plan: QKVPlan,
    x: torch.Tensor,
    angles: torch.Tensor,
    pairs: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query [S, B, H, r + n] and key [S, B, G, r + n], rotated, and value [S, B, G, d], from the normalised input x
    [s, B, h].

    The last result is for rebuilding: this process's latents [S B, C/tp], None where there are none.

    angles: float32 [S, d]. pairs: int64 [R, r/2]. parameters: as `plan.names` says; gradients of those that have a
    `main_grad` are added to it, as Megatron's fused accumulation does.
    """
    return _LatentQKV.apply(plan, x, angles, pairs, *parameters)


@torch.no_grad()
def rebuild_key(
    plan: QKVPlan, latents: torch.Tensor, rotated: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> torch.Tensor:
    """The key of `latent_qkv` once more, bit for bit, from the latents that it left and the key's first r dims
    [S, B, R, r]. For plans with k_up."""
    weight = dict(zip(plan.names, parameters, strict=True))["k_up.weight"]
    c_k, _ = plan.latents(_gathered_columns(plan, latents).wait())
    heads = *rotated.shape[:2], plan.shape.key_heads
    return torch.cat((rotated.expand(*heads, -1), (c_k @ weight.t()).view(*heads, plan.shape.nope_dim)), dim=-1)


@torch.no_grad()
def rebuild_value(plan: QKVPlan, latents: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """The value of `latent_qkv` once more, bit for bit, [S B, G d]. For plans with v_up."""
    w = dict(zip(plan.names, parameters, strict=True))
    _, c_v = plan.latents(_gathered_columns(plan, latents).wait())
    return _linear(c_v, [w["v_up.weight"]], [w.get("v_up.bias")])


class _LatentQKV(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, plan: QKVPlan, x: torch.Tensor, angles: torch.Tensor, pairs: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        w = dict(zip(plan.names, parameters, strict=True))
        rows = x.reshape(-1, x.shape[-1])
        whole = _gathered(plan, rows)
        latents = whole_latents = None
        if "kv_down.weight" in w:
            latents = whole.wait() @ w["kv_down.weight"].t()
            whole_latents = _gathered_columns(plan, latents)
        weights, biases = zip(*((w[f"{name}.weight"], w.get(f"{name}.bias")) for name in plan.from_input), strict=True)
        parts = plan.columns(_linear(whole.wait(), weights, biases))
        del whole
        k_rope, k_nope, value = (parts.get(name) for name in ("k_rope", "k_nope", "v"))
        whole_rope = None
        if plan.shared_rope and k_rope is not None:
            whole_rope = _gathered_columns(plan, k_rope)
        if whole_latents is not None:
            c_k, c_v = plan.latents(whole_latents.wait())
            if "k_up.weight" in w:
                k_nope = c_k @ w["k_up.weight"].t()
            if "v_up.weight" in w:
                value = _linear(c_v, [w["v_up.weight"]], [w.get("v_up.bias")])
        assert value is not None
        if whole_rope is not None:
            k_rope = whole_rope.wait()
        query, key = rotate_and_join(parts["q"], k_rope, k_nope, angles, pairs, plan.shape)
        ctx.plan, ctx.parameters, ctx.input_shape = plan, w, x.shape
        ctx.save_for_backward(rows, latents, angles, pairs)
        if latents is not None:
            ctx.mark_non_differentiable(latents)
        batch = x.shape[1]
        query, key = (part.view(-1, batch, *part.shape[1:]) for part in (query, key))
        return query, key, value.reshape(*key.shape[:3], plan.value_dim), latents

    @staticmethod
    def backward(ctx: Any, d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, _: Any) -> tuple:  # type: ignore[override]
        plan: QKVPlan = ctx.plan
        w: dict[str, torch.Tensor] = ctx.parameters
        rows, latents, angles, pairs = ctx.saved_tensors
        whole = _gathered(plan, rows)
        whole_latents = None if latents is None else _gathered_columns(plan, latents)
        wanted = {name for name, needed in zip(plan.names, ctx.needs_input_grad[4:], strict=True) if needed}
        gradients = _WeightGradients(w, wanted)

        count, shape = d_query.shape[0] * d_query.shape[1], plan.shape
        d_value = d_value.reshape(count, -1)
        d_mixed = d_query.new_empty(count, sum(plan.widths.values()))
        parts = plan.columns(d_mixed)
        d_k_nope = parts.get("k_nope")
        if "k_up.weight" in w:
            d_k_nope = d_query.new_empty(count, shape.key_heads * shape.nope_dim)
        d_k_rope, d_own_rope = parts.get("k_rope"), None
        if plan.shared_rope and d_k_rope is not None and plan.tp_group.size() > 1:
            d_k_rope = d_query.new_empty(count, shape.rope_dim)
        rotate_and_split(d_query.contiguous(), d_key.contiguous(), parts["q"], d_k_rope, d_k_nope, angles, pairs, shape)
        if d_k_rope is not None and d_k_rope is not parts["k_rope"]:
            d_own_rope = _summed_columns(plan, d_k_rope)
        if "v" in parts:
            parts["v"].copy_(d_value)

        d_latents = d_own = None
        if latents is not None:
            sources = {"k_up.weight": d_k_nope, "v_up.weight": d_value}
            width = latents.shape[1] * plan.tp_group.size()
            d_latents = _summed_columns(plan, _latent_gradient(plan, w, sources, d_query.new_empty(count, width)))
        if d_own_rope is not None:
            parts["k_rope"].copy_(d_own_rope.wait())
        d_rows = d_mixed @ _joined([w[f"{name}.weight"] for name in plan.from_input])
        if d_latents is not None:
            d_own = d_latents.wait()
            d_rows.addmm_(d_own, w["kv_down.weight"])
        reduced = _summed(plan, d_rows)  # while the weight gradients are computed
        if whole_latents is not None:
            c_k, c_v = plan.latents(whole_latents.wait())
            gradients.add(("k_up.weight",), d_k_nope, c_k)
            gradients.add(("v_up.weight",), d_value, c_v)
            gradients.add_bias("v_up.bias", d_value)
            gradients.add(("kv_down.weight",), d_own, whole.wait())
            del c_k, c_v, whole_latents
        gradients.add(tuple(f"{name}.weight" for name in plan.from_input), d_mixed, whole.wait())
        for name, part in parts.items():
            gradients.add_bias(f"{name}.bias", part)
        d_x = reduced.wait()
        return None, d_x.view(ctx.input_shape), None, None, *(gradients.of.get(name) for name in plan.names)


class _Pending:
    """A tensor that a collective is on its way to fill."""

    def __init__(self, tensor: torch.Tensor, work: Any = None, source: torch.Tensor | None = None) -> None:
        """work: the collective; None where there is nothing to wait for. source: what it reads, which must live until
        then."""
        self.tensor, self.work, self.source = tensor, work, source

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None
        return self.tensor


class _PendingColumns(_Pending):
    """Columns [tp, T, C/tp] of all processes that become one matrix [T, C]."""

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.tensor = super().wait().transpose(0, 1).flatten(1)
        return self.tensor


def _gathered(plan: QKVPlan, rows: torch.Tensor) -> _Pending:
    """Rows of all tensor-parallel processes under sequence parallelism; else just these rows."""
    group = plan.tp_group
    if not plan.sequence_parallel or group.size() == 1:
        return _Pending(rows)
    whole = rows.new_empty(len(rows) * group.size(), rows.shape[1])
    return _Pending(whole, torch.distributed.all_gather_into_tensor(whole, rows, group=group, async_op=True))


def _gathered_columns(plan: QKVPlan, columns: torch.Tensor) -> _Pending:
    """Columns [T, C/tp] of all tensor-parallel processes as one matrix [T, C]."""
    group = plan.tp_group
    if group.size() == 1:
        return _Pending(columns)
    columns = columns.contiguous()
    parts = columns.new_empty(group.size(), *columns.shape)
    work = torch.distributed.all_gather_into_tensor(parts.flatten(0, 1), columns, group=group, async_op=True)
    return _PendingColumns(parts, work, columns)


def _summed(plan: QKVPlan, rows: torch.Tensor) -> _Pending:
    """A sum over tensor-parallel processes: of their rows' parts under sequence parallelism each gets its own, without
    it all get all."""
    group = plan.tp_group
    if group.size() == 1:
        return _Pending(rows)
    if not plan.sequence_parallel:
        return _Pending(rows, torch.distributed.all_reduce(rows, group=group, async_op=True))
    own = rows.new_empty(len(rows) // group.size(), rows.shape[1])
    return _Pending(own, torch.distributed.reduce_scatter_tensor(own, rows, group=group, async_op=True), rows)


def _summed_columns(plan: QKVPlan, rows: torch.Tensor) -> _Pending:
    """A sum [T, C] over tensor-parallel processes, of which each gets its own columns [T, C/tp]."""
    group = plan.tp_group
    if group.size() == 1:
        return _Pending(rows)
    parts = rows.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(parts[0])
    work = torch.distributed.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group, async_op=True)
    return _Pending(own, work, parts)


class _WeightGradients:
    """Gradients of the parameters, by name, for autograd; or added to their `main_grad`, and something empty for it."""

    def __init__(self, parameters: dict[str, torch.Tensor], wanted: set[str]) -> None:
        self.parameters, self.wanted = parameters, wanted
        self.of: dict[str, torch.Tensor] = {}

    def add(self, names: tuple[str, ...], d_output: torch.Tensor | None, x: torch.Tensor) -> None:
        """d_output^T x, [T, sum of rows] and [T, columns], for weights whose rows follow one another."""
        names = tuple(name for name in names if name in self.parameters)
        if not names or d_output is None:
            return
        sizes = [len(self.parameters[name]) for name in names]
        if self.wanted.issuperset(names):
            together = self._accumulated(names)
            if together is not None:
                _accumulate(together, d_output, x)
                return
        for name, part in zip(names, d_output.split(sizes, dim=1), strict=True):
            if name not in self.wanted:
                continue
            together = self._accumulated((name,))
            if together is None:
                self.of[name] = part.t() @ x
            else:
                _accumulate(together, part, x)

    def add_bias(self, name: str, d_output: torch.Tensor) -> None:
        if name in self.wanted:
            self.of[name] = d_output.sum(dim=0)

    def _accumulated(self, names: tuple[str, ...]) -> torch.Tensor | None:
        """The buffers of these parameters as one matrix, if they have some and those follow one another; marked as
        filled."""
        parameters: list[Any] = [self.parameters[name] for name in names]
        if not all(hasattr(p, "main_grad") and hasattr(p, "grad_added_to_main_grad") for p in parameters):
            return None
        found = _adjacent([p.main_grad for p in parameters])
        if found is not None:
            for name, parameter in zip(names, parameters, strict=True):
                parameter.grad_added_to_main_grad = True
                self.of[name] = torch.empty_like(parameter)  # Megatron's hook waits for one, and drops it
        return found


def _accumulate(total: torch.Tensor, d_output: torch.Tensor, x: torch.Tensor) -> None:
    """total += d_output^T x, summed in the type of `total`."""
    if total.dtype == x.dtype:
        total.addmm_(d_output.t(), x)
    elif x.is_cuda:
        torch.addmm(total, d_output.t(), x, out_dtype=total.dtype, out=total)
    else:
        total += d_output.t() @ x


def _latent_gradient(
    plan: QKVPlan, w: dict[str, torch.Tensor], sources: dict[str, torch.Tensor | None], d_latents: torch.Tensor
) -> torch.Tensor:
    """Fill d_latents [T, C]: from keys and from values, summed where both read the same columns."""
    filled = False
    # Values first: where keys read some of the same columns, values read all.
    for (name, source), place in reversed(list(zip(sources.items(), plan.latents(d_latents), strict=True))):
        if name not in w or source is None:
            continue
        if filled and plan.joint:
            place.addmm_(source, w[name])
        else:
            torch.mm(source, w[name], out=place)
        filled = True
    return d_latents


def _linear(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
    weight = _joined(weights)
    if all(bias is None for bias in biases):
        return x @ weight.t()
    filled = [weights[i].new_zeros(len(weights[i])) if bias is None else bias for i, bias in enumerate(biases)]
    return torch.addmm(torch.cat(filled), x, weight.t())


def _joined(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Weights [rows, columns] beneath one another, without a copy where they are so in memory."""
    found = _adjacent(weights)
    return torch.cat(list(weights)) if found is None else found


def _adjacent(matrices: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Matrices that follow one another in one storage as one; None where they do not."""
    first = matrices[0]
    end = first.storage_offset()
    for matrix in matrices:
        if (
            matrix.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or matrix.storage_offset() != end
            or not matrix.is_contiguous()
        ):
            return None
        end += matrix.numel()
    rows = sum(len(matrix) for matrix in matrices)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
