"""The search for the leading singular vectors of large matrices: never much worse than torch's decomposition."""

from __future__ import annotations

import math

import pytest
import torch

from mha2mla_megatron import leading_subspace
from mha2mla_megatron.calibration.metric import IDENTITY, Metric
from mha2mla_megatron.leading_subspace import leading_singular_vectors
from mha2mla_megatron.low_rank import factorise

SIDE = leading_subspace.SMALLEST_SIDE
WEIGHTS, MOMENTS = torch.float32, torch.float64
"""Precision of the search for plain weights, and for those that statistics stretch."""


def gaussian(n: int, h: int, seed: int) -> torch.Tensor:
    return torch.randn(n, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """A random float64 matrix [n, len(values)] of these singular values, n >= len(values)."""
    u, v = (torch.linalg.qr(gaussian(rows, len(values), seed))[0] for rows in (n, len(values)))
    return u * values @ v.T


def spectrum(name: str) -> torch.Tensor:
    """Singular values, float64 [SIDE], largest first."""
    i = torch.arange(SIDE).double()
    return {
        "weights": torch.cat((2 - i[:128] / 128, 1 - (i[128:] - 128) / SIDE)),  # a real layer's, by and large
        "moments": 10 ** (-3 * (i / SIDE) ** 0.5),  # eigenvalues over six orders of magnitude
        "random": torch.linalg.svdvals(gaussian(2 * SIDE, SIDE, 1)),
        "equal": torch.ones(SIDE).double(),
        "two values": torch.where(i < 200, 2.0, 1.0).double(),  # the larger more often than the rank and than a block
        "often": torch.where(i < 100, 2.0, 1 - i / SIDE / 2).double(),  # less often than the rank, more than a block
        "rank 50": torch.where(i < 50, 1 + i.flip(0) / SIDE, 0.0),
        "rank 128": torch.where(i < 128, 1 + i.flip(0) / SIDE, 0.0),
        "rank 129": torch.where(i < 129, 1 + i.flip(0) / SIDE, 0.0),
        "one": torch.where(i < 1, 1e6, 1 - i / SIDE / 2).double(),  # more than float32's digits
        "nothing": torch.zeros(SIDE).double(),
    }[name]


def lost(w: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    return float((w - up @ down).square().sum())


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("name", ["weights", "moments"])
def test_it_finds_what_the_full_decomposition_finds(name: str, wide: bool) -> None:
    w = with_spectrum(spectrum(name), SIDE + 200)
    _, s, _ = torch.linalg.svd(w, full_matrices=False)
    for rank in (1, 40, SIDE // 8):
        best = float(s[rank:].square().sum())
        for search in (WEIGHTS, MOMENTS):
            found = leading_singular_vectors(w, rank, search)
            assert found is not None, (rank, search)
            vectors, image = found
            # float64's digits times the norms, some hundred roundings.
            assert torch.allclose(vectors.T @ vectors, torch.eye(rank).double(), rtol=0, atol=1e-12)
            assert torch.allclose(image, w @ vectors, rtol=0, atol=1e-12)
            excess = lost(w, image, vectors.T) / best - 1
            assert -1e-12 < excess < 1e-6, (rank, search)
            # Ritz vectors: those of larger values first, and each is its value's own.
            products = image.T @ image
            assert (products - products.diag().diag()).abs().max() < 1e-12
            assert (products.diag().diff() <= 0).all()
        shape = w.T if wide else w
        up, down = factorise(shape, rank, "up")
        assert up.shape == (len(shape), rank) and down.shape == (rank, shape.shape[1])
        assert -1e-12 < lost(shape, up, down) / best - 1 < 1e-6
        assert torch.equal(factorise(shape, rank, "up")[0], up)  # the same start each time


@pytest.mark.parametrize(
    "name", ["random", "equal", "two values", "often", "rank 50", "rank 128", "rank 129", "one", "nothing"]
)
def test_hard_spectra_lose_nothing_either(name: str) -> None:
    """Whether the search finds the vectors or all of them are computed."""
    values = spectrum(name)
    w = with_spectrum(values, SIDE + 100)
    # The smallest loss that float64 can tell from none: of the Gram matrix, whose rounding is with its largest values.
    rounding = 1e-12 * float(values.square().sum())
    stretched = Metric(None, torch.eye(SIDE).double())  # of a metric: searched in float64
    for metric, rank in ((IDENTITY, SIDE // 8), (stretched, SIDE // 8), (IDENTITY, SIDE)):
        up, down = factorise(w, rank, "up", metric)
        best = float(values[rank:].square().sum())
        assert lost(w, up, down) <= (1 + 1e-6) * best + rounding, (metric.is_identity, rank)


@pytest.mark.parametrize("search", [WEIGHTS, MOMENTS])
def test_a_space_without_a_leading_vector_is_refused(search: torch.dtype) -> None:
    """Though its residuals are zero: it is of singular vectors, but not of the right ones."""
    values, rank, kept = spectrum("weights"), 64, 70
    w, scale = torch.cat((values.diag(), torch.zeros(7, SIDE))), values.norm()
    gram = ((w / scale).T @ (w / scale)).to(search)
    eye = torch.eye(SIDE, dtype=search)
    b = float((values[rank - 1] ** 2 + values[kept] ** 2) / 2 / scale**2)
    right, wrong = eye[:, :kept], eye[:, [*range(5), *range(6, kept + 1)]]
    found = leading_subspace._prove(w, scale, gram, right, rank, b, 1e-7)
    assert found is not None and torch.equal(found[0].abs(), right[:, :rank].double())
    assert leading_subspace._prove(w, scale, gram, wrong, rank, b, 1e-7) is None
    # Nor one that is not of singular vectors.
    mixed = right.clone()
    mixed[kept + 1, rank - 1] = 1
    assert leading_subspace._prove(w, scale, gram, mixed, rank, b, 1e-7) is None


def test_the_bound_holds() -> None:
    """For any vectors, whatever b is above the others; and is not far above for good ones."""
    generator = torch.Generator().manual_seed(0)
    n, rank = 30, 6
    tight = 0
    for trial in range(300):
        values = torch.rand(n, generator=generator).double().sort(descending=True).values
        values = values ** (1 + trial % 5) / (values ** (1 + trial % 5)).sum()
        frame = torch.linalg.qr(torch.randn(n, n, generator=generator).double())[0]
        gram = frame * values @ frame.T
        kept, size = rank + trial % 4, 10.0 ** -(trial % 7)
        noise = torch.randn(n, kept, generator=generator).double()
        x = torch.linalg.qr(frame[:, :kept] + size * noise)[0]
        ritz, turn = (t.flip(-1) for t in torch.linalg.eigh(x.T @ gram @ x))
        x = x @ turn
        residuals = (gram @ x - x * ritz).square().sum(0)
        beside = torch.eye(n).double() - x @ x.T
        b = float(torch.linalg.eigvalsh(beside @ gram @ beside)[-1]) + 1e-12
        found, best = float(ritz[:rank].sum()), float(values[:rank].sum())
        missed = leading_subspace._missed(ritz, residuals, rank, b) * (1 - found)
        assert missed >= best - found - 1e-14, trial
        tight += math.isfinite(missed) and missed < 10 * (best - found) + 1e-14
    assert tight > 150


def test_where_it_does_not_search() -> None:
    w = with_spectrum(spectrum("weights"), SIDE)
    assert leading_singular_vectors(w, SIDE // 8 + 1, WEIGHTS) is None
    assert leading_singular_vectors(w[:, 1:], SIDE // 8 - 1, WEIGHTS) is None  # too small
