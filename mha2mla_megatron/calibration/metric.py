"""In what sense a low-rank approximation is the best: the objectives of `low_rank.objective`.

An approximation W' of the stacked rows W = [K_nope; V] is judged by

    tr(Y (W - W') C (W - W')^T),    Y = R R^T over rows, C = L L^T over inputs

| objective | C | Y |
|---|---|---|
| weights | I | I: the plain singular value decomposition of the paper |
| inputs | E[x x^T] | I |
| balanced | E[|y|^2 x x^T] | one number for keys and one for values: the mean square of their gradients |
| outputs | E[|y|^2 x x^T] | E[y y^T], the second moment of the gradients |
| tempered | the mean of those of inputs and of outputs | that of outputs, what is beside its diagonal halved |

y is a token's gradient with respect to its keys and values (see `statistics`), |y|^2 here relative to its mean over
tokens. `outputs` is the expected second-order change of the model's own loss if tokens' errors add up independently,
and if a token's gradient depends on its input by its size alone. Tokens that attention leans on (the first one above
all) count for what they do, which is where whitening by E[x x^T] falls short. But few tokens have most of |y|^2, so
that the sums over them are noisy, and an error that is not small costs such a token less than the second order says:
`tempered` weighs a token by (|y|^2 + 1) / 2, and draws the gradients' moment half way to its diagonal.

Shape letters: n rows, h inputs, H query heads, G key/value heads, d head dim, P = d/2 pairs, r rotary dims kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mha2mla_megatron.calibration.pairs import apply_query_map
from mha2mla_megatron.calibration.statistics import LayerStatistics
from mha2mla_megatron.errors import UserError


@dataclass(frozen=True)
class Metric:
    """Y and C by their factors; None is the identity."""

    rows: torch.Tensor | None
    """R, [n, n] lower triangular."""

    columns: torch.Tensor | None
    """L, [h, h] lower triangular."""

    @property
    def is_identity(self) -> bool:
        return self.rows is None and self.columns is None

    def whiten(self, w: torch.Tensor) -> torch.Tensor:
        """R^T W L, whose Frobenius norm is the objective. w: float64 [n, h]."""
        w = w if self.rows is None else self.rows.T @ w
        return w if self.columns is None else w @ self.columns

    def undo_rows(self, up: torch.Tensor) -> torch.Tensor:
        """R^-T up, [n, c]."""
        return up if self.rows is None else torch.linalg.solve_triangular(self.rows.T, up, upper=True)

    def undo_columns(self, down: torch.Tensor) -> torch.Tensor:
        """down L^-1, [c, h]."""
        if self.columns is None:
            return down
        return torch.linalg.solve_triangular(self.columns, down, upper=False, left=False)

    def select(self, rows: slice | torch.Tensor) -> Metric:
        """The metric of these rows alone, in this order. Those of R are no triangular factor of their part of Y: it is
        factored anew."""
        if self.rows is None:
            return self
        part = self.rows[rows]
        return Metric(torch.linalg.cholesky(part @ part.T), self.columns)


IDENTITY = Metric(None, None)


def make_columns(objective: str, statistics: LayerStatistics, tokens: int, damping: float) -> torch.Tensor | None:
    """L of an objective. damping: added to the diagonal of C, as a fraction of its mean."""
    if objective == "weights":
        return None
    inputs = statistics.input_moment / tokens
    if objective == "inputs":
        return _root(inputs, damping)
    weighted = statistics.weighted_input_moment / statistics.gradient_energy
    return _root((weighted + inputs) / 2 if objective == "tempered" else weighted, damping)


def make_rows(
    objective: str,
    statistics: LayerStatistics,
    tokens: int,
    query_map: torch.Tensor,
    unrotated: torch.Tensor,
    damping: float,
) -> torch.Tensor | None:
    """R of an objective, over the rows [K_nope of all heads; V of all heads]: [n, n] lower triangular.

    query_map: [H, P, 2], what the queries of unrotated pairs are multiplied by. unrotated: float64 [G, d - r, d], what
    a head's unrotated queries are made of, after that.
    """
    if objective in ("weights", "inputs"):
        return None
    nope = unrotated.shape[0] * unrotated.shape[1]
    moment = _unrotated_moment(statistics.gradient_moment / tokens, query_map, unrotated)
    if objective == "balanced":
        diagonal = moment.diagonal()
        means = [part.mean().expand(len(part)) for part in (diagonal[:nope], diagonal[nope:])]
        return torch.diag(torch.cat(means).clamp_min(torch.finfo(moment.dtype).tiny).sqrt())
    if objective == "tempered":
        moment = (moment + torch.diag(moment.diagonal())) / 2
    return _root(moment, damping)


def _unrotated_moment(moment: torch.Tensor, query_map: torch.Tensor, unrotated: torch.Tensor) -> torch.Tensor:
    """The gradients' moment over the rows [K_nope; V]: [G (d - r) + G d, the same].

    A logit's gradient with respect to the key is the query, so the gradient of a key is that of each head multiplied by
    its (a + ib), summed over the heads that share it, and goes into the unrotated dims as the queries do.
    """
    (heads, pairs, _), groups = query_map.shape, len(unrotated)
    d, none = 2 * pairs, torch.empty(groups, 0, dtype=torch.int64)

    def combine(rows: torch.Tensor) -> torch.Tensor:
        """[(H + G) d, n] -> [G (d - r) + G d, n]."""
        keys = apply_query_map(rows[: heads * d].unflatten(0, (heads, d)), query_map, none)
        keys = unrotated @ keys.unflatten(0, (groups, heads // groups)).sum(1)
        return torch.cat((keys.flatten(0, 1), rows[heads * d :]))

    return combine(combine(moment).T)


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
        if damping > 1:
            raise UserError("statistics: a second moment is not that of any numbers; the file is damaged")
