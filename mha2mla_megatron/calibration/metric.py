"""In what sense a low-rank approximation is the best: the objectives of `low_rank.objective`.

An approximation W' of the stacked rows W = [K_nope; V] is judged by

    tr(Y (W - W') C (W - W')^T),    Y = R R^T over rows, C = L L^T over inputs

| objective | C | Y |
|---|---|---|
| weights | I | I: the plain singular value decomposition of the paper |
| inputs | E[x x^T] | I |
| balanced | E[|y|^2 x x^T] | one number for keys and one for values: the mean square of their gradients |
| outputs | E[|y|^2 x x^T] | the second moment of the gradients, a block for each key/value head |

y is a token's gradient with respect to its keys and values (see `statistics`). `outputs` is the expected second-order
change of the model's own loss under two assumptions: a token's gradient and its input enter independently but for the
gradient's size, and heads do not interact. Tokens that attention leans on (the first one above all) count for what
they do, which is where whitening by E[x x^T] alone falls short.

Shape letters: n rows, h inputs, G key/value heads, N query heads for each, d head dim, r rotary dims kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mha2mla_megatron.calibration.statistics import LayerStatistics


@dataclass(frozen=True)
class RowRoot:
    """R, block diagonal: `blocks` [B, m, m] lower triangular, on the rows `index` int64 [B, m] (each row once)."""

    blocks: torch.Tensor
    index: torch.Tensor

    def apply(self, w: torch.Tensor) -> torch.Tensor:
        """R^T w, [n, h]."""
        result = torch.empty_like(w)
        result[self.index] = self.blocks.transpose(1, 2) @ w[self.index]
        return result

    def undo(self, w: torch.Tensor) -> torch.Tensor:
        """R^-T w, [n, c]."""
        result = torch.empty_like(w)
        result[self.index] = torch.linalg.solve_triangular(self.blocks.transpose(1, 2), w[self.index], upper=True)
        return result

    def select(self, rows: slice) -> RowRoot:
        """The part on a range of rows, which every block has equally many of, first or last.

        The last rows of a lower-triangular factor are not a factor of theirs alone, so the blocks are factored anew.
        """
        inside = (self.index >= rows.start) & (self.index < rows.stop)
        keep = inside[0]
        moment = self.blocks @ self.blocks.transpose(1, 2)
        blocks = torch.linalg.cholesky(moment[:, keep][:, :, keep])
        return RowRoot(blocks, self.index[:, keep] - rows.start)


@dataclass(frozen=True)
class Metric:
    """Y and C by their factors; None is the identity."""

    rows: RowRoot | None
    columns: torch.Tensor | None
    """L, [h, h] lower triangular."""

    def whiten(self, w: torch.Tensor) -> torch.Tensor:
        """R^T W L, whose Frobenius norm is the objective. w: float64 [n, h]."""
        w = w if self.rows is None else self.rows.apply(w)
        return w if self.columns is None else w @ self.columns

    def undo_rows(self, up: torch.Tensor) -> torch.Tensor:
        """R^-T up, [n, c]."""
        return up if self.rows is None else self.rows.undo(up)

    def undo_columns(self, down: torch.Tensor) -> torch.Tensor:
        """down L^-1, [c, h]."""
        if self.columns is None:
            return down
        return torch.linalg.solve_triangular(self.columns, down, upper=False, left=False)

    def select(self, rows: slice) -> Metric:
        """The metric of some of the rows alone."""
        return Metric(None if self.rows is None else self.rows.select(rows), self.columns)


IDENTITY = Metric(None, None)


def make_columns(objective: str, statistics: LayerStatistics, tokens: int, damping: float) -> torch.Tensor | None:
    """L of an objective. damping: added to the diagonal of C, as a fraction of its mean."""
    if objective == "weights":
        return None
    if objective == "inputs":
        return _root(statistics.input_moment / tokens, damping)
    return _root(statistics.weighted_input_moment / statistics.gradient_energy, damping)


def make_rows(
    objective: str,
    statistics: LayerStatistics,
    tokens: int,
    query_map: torch.Tensor,
    order: torch.Tensor,
    qk_rope_head_dim: int,
    damping: float,
) -> RowRoot | None:
    """R of an objective, over the rows [K_nope of all heads; V of all heads].

    query_map: [H, P, 2], what the queries of unrotated pairs are multiplied by. order: int64 [G, d], the rows of a key
    head, those that keep their rotation first (`head_row_order`).
    """
    if objective in ("weights", "inputs"):
        return None
    groups, d = order.shape
    nope = d - qk_rope_head_dim
    device = statistics.gradient_moment.device
    moment = _mapped_moment(statistics.gradient_moment / tokens, query_map)  # [G, 2d, 2d]: key dims, then value dims
    rows = torch.cat(
        (order[:, qk_rope_head_dim:].to(device), torch.arange(d, 2 * d, device=device).expand(groups, d)), 1
    )
    moment = moment.gather(1, rows[:, :, None].expand(-1, -1, 2 * d)).gather(
        2, rows[:, None].expand(-1, len(rows[0]), -1)
    )
    head = torch.arange(groups, device=device)[:, None]
    index = torch.cat(
        (
            head * nope + torch.arange(nope, device=device),
            groups * nope + head * d + torch.arange(d, device=device),
        ),
        1,
    )
    if objective == "balanced":
        diagonal = moment.diagonal(dim1=1, dim2=2)
        means = [part.mean() if part.numel() else part.sum() for part in diagonal.split((nope, d), 1)]
        means = [mean.expand(groups, width) for mean, width in zip(means, (nope, d), strict=True)]
        moment = torch.diag_embed(torch.cat(means, 1))
    return RowRoot(_root(moment, damping), index)


def _mapped_moment(moment: torch.Tensor, query_map: torch.Tensor) -> torch.Tensor:
    """The gradient moment with the key gradients of a group's query heads mapped and summed: [G, 2d, 2d].

    A logit's gradient with respect to the key is the query, so the key's gradient is that of each head, multiplied by
    its (a + ib), summed over heads.
    """
    groups, width = moment.shape[:2]
    heads, half = query_map.shape[:2]
    per_group, d = heads // groups, 2 * half
    assert width == (per_group + 1) * d
    a, b = (torch.diag_embed(part) for part in query_map.to(moment).unbind(-1))
    turn = torch.cat((torch.cat((a, -b), 2), torch.cat((b, a), 2)), 1)  # [H, d, d]
    turn = turn.view(groups, per_group, d, d).transpose(1, 2).reshape(groups, d, per_group * d)
    combine = moment.new_zeros(groups, 2 * d, width)
    combine[:, :d, : per_group * d] = turn
    combine[:, d:, per_group * d :] = torch.eye(d, dtype=moment.dtype, device=moment.device)
    return combine @ moment @ combine.transpose(1, 2)


def _root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower-triangular Cholesky factors of damped second moments [..., n, n].

    A moment that is zero everywhere says nothing of its rows: it becomes the identity.
    """
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    symmetric = (moment + moment.transpose(-2, -1)) / 2
    while True:
        root, failed = torch.linalg.cholesky_ex(symmetric + torch.where(mean > 0, damping * mean, 1.0) * eye)
        if not failed.any():
            return root
        # Few tokens, or one that outweighs all others: the float32 rounding of the sums is above the damping.
        damping *= 10
