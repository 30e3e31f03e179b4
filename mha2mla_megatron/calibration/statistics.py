"""The statistics file: sums over calibration tokens that say what each part of an attention layer does.

Shape letters: L layers, h hidden size, H query heads, G key/value heads, d head dim, P = d/2 rotary pairs, n stored
sequences, S their length, K neighbours (`substitution.neighbours`).

All sums run over tokens (or over queries, which are tokens), so files of several runs merge by adding. For one layer:

    query_norms             [H, P]           ||q_pair|| before rotation
    key_norms               [G, P]           ||k_pair||
    input_moment            [h, h]           x x^T of the layer's (normed) input
    gradient_energy         []               |y|^2
    weighted_input_moment   [h, h]           |y|^2 x x^T
    gradient_moment         [W, W]           y y^T, W = (H + G) d
    score_moments           [H, P, 3, 3]     second moments of (t, f1, f2) under the softmax, centred per query
    loss_moments            [H, P, 3, 3]     the same, of their effects on the loss
    substitution_moments    [K, H, P, 3, 3]  as score_moments, with f1 and f2 of pair j turned as pair j + k instead

y is a token's gradient: for each query head with respect to the unrotated key as that head sees it, then for each
key/value head with respect to the value. t is what pair j adds to an attention logit, f1 = Re(conj(q_j) k_j) and
f2 = Im(conj(q_j) k_j) are what can be had without rotating it. The loss is the model's own: the negative log-likelihood
of labels that it samples itself, so that second moments of gradients are those of the Kullback-Leibler divergence from
the original (its Fisher information).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.calibration.substitution import neighbours
from mha2mla_megatron.checkpoint.hf import HFReader, lay_out
from mha2mla_megatron.errors import UserError, first_line
from mha2mla_megatron.files import require_file

FORMAT = "mha2mla_statistics 2"


@dataclass
class LayerStatistics:
    """The sums of one layer (see the top of the file), float32 or float64."""

    query_norms: torch.Tensor
    key_norms: torch.Tensor
    input_moment: torch.Tensor
    gradient_energy: torch.Tensor
    weighted_input_moment: torch.Tensor
    gradient_moment: torch.Tensor
    score_moments: torch.Tensor
    loss_moments: torch.Tensor
    substitution_moments: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerStatistics:
        return LayerStatistics(**{name: tensor.to(device, dtype) for name, tensor in self.tensors().items()})

    def pair_scores(self, tokens: int) -> torch.Tensor:
        """Scores of 2-norm, float [G, P]: the product of the two mean norms, summed over a group's query heads."""
        groups, pairs = self.key_norms.shape
        queries = self.query_norms.view(groups, -1, pairs).sum(1)
        return queries * self.key_norms / tokens**2


def layer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's sums."""
    h, heads, groups, d = architecture.heads
    width = (heads + groups) * d
    return {
        "query_norms": (heads, d // 2),
        "key_norms": (groups, d // 2),
        "input_moment": (h, h),
        "gradient_energy": (),
        "weighted_input_moment": (h, h),
        "gradient_moment": (width, width),
        "score_moments": (heads, d // 2, 3, 3),
        "loss_moments": (heads, d // 2, 3, 3),
        "substitution_moments": (len(neighbours(d // 2)), heads, d // 2, 3, 3),
    }


def empty_statistics(architecture: Architecture, device: torch.device) -> LayerStatistics:
    """A layer's sums at zero, float32."""
    return LayerStatistics(**{name: torch.zeros(s, device=device) for name, s in layer_shapes(architecture).items()})


class Statistics:
    """A statistics file, its layers read one at a time.

    tokens: how many the sums run over. sequences: int32 [n, S], calibration tokens kept for measurements and healing.

    Raises UserError for a file that is damaged, of another kind, or of another model.
    """

    def __init__(self, file: Path, architecture: Architecture, fingerprint: str | None = None) -> None:
        """fingerprint: of the model at hand (`model_fingerprint`); None does not compare it."""
        self.file, self.architecture = file, architecture
        self._tensors = _open(file)
        self.metadata = _metadata(file, self._tensors)
        if fingerprint is not None and self.metadata["model"]["fingerprint"] != fingerprint:
            raise UserError(
                f"{file}: statistics of another model ({self.metadata['model']['source']}): the weights differ"
            )
        self.tokens = int(self.metadata["tokens"])
        self._check()
        self.sequences: torch.Tensor = self._tensors.get_tensor("sequences")

    def layer(self, index: int, device: torch.device) -> LayerStatistics:
        """The sums of one layer, float64 on `device`."""
        names = layer_shapes(self.architecture)
        tensors = {name: self._tensors.get_tensor(f"layers.{index}.{name}") for name in names}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"{self.file}: layers.{index}.{name} holds numbers that are not finite")
            if name.endswith("moment") and (tensor.diagonal() < 0).any():
                raise UserError(f"{self.file}: layers.{index}.{name} has a negative mean square")
        return LayerStatistics(**tensors).to(device, torch.float64)

    def _check(self) -> None:
        names = set(self._tensors.keys())
        if "sequences" not in names:
            raise UserError(f"{self.file}: sequences is missing: not a whole statistics file")
        for layer in range(self.architecture.num_layers):
            for name, shape in layer_shapes(self.architecture).items():
                key = f"layers.{layer}.{name}"
                if key not in names:
                    raise UserError(f"{self.file}: {key} is missing: not statistics of this model")
                found = tuple(self._tensors.get_slice(key).get_shape())
                if found != shape:
                    raise UserError(f"{self.file}: {key} has shape {found}, this model's is {shape}")


class StatisticsWriter:
    """Writes a statistics file, layer by layer in any order; it is whole when each has been added.

    shapes: of a layer's sums (`layer_shapes`). sequences: int [n, S]. metadata: `tokens` (int), `model` (fingerprint
    and source) and whatever else says where the sums come from.
    """

    def __init__(
        self,
        file: Path,
        num_layers: int,
        shapes: Mapping[str, tuple[int, ...]],
        sequences: torch.Tensor,
        metadata: dict[str, Any],
    ) -> None:
        self.file, self.tokens = file, int(metadata["tokens"])
        sequences = sequences.to(torch.int32)
        with torch.device("meta"):
            tensors = {
                f"layers.{layer}.{name}": torch.empty(shape)
                for layer in range(num_layers)
                for name, shape in shapes.items()
            }
            tensors["scores"] = torch.empty(num_layers, *shapes["key_norms"])
        head, self._offsets = lay_out(
            {**tensors, "sequences": sequences}, {"format": FORMAT, "provenance": json.dumps(metadata)}
        )
        self.file.write_bytes(head)
        self._write({self._offsets["sequences"]: sequences})

    def add(self, layer: int, sums: LayerStatistics) -> None:
        """Write a layer's sums (as float32) and the 2-norm scores made of them."""
        sums = sums.to(torch.device("cpu"), torch.float32)
        scores = sums.pair_scores(self.tokens)
        pieces = {self._offsets[f"layers.{layer}.{name}"]: tensor for name, tensor in sums.tensors().items()}
        self._write({**pieces, self._offsets["scores"] + layer * scores.nbytes: scores})

    def _write(self, pieces: dict[int, torch.Tensor]) -> None:
        with self.file.open("r+b") as stream:
            for offset, tensor in pieces.items():
                stream.seek(offset)
                stream.write(tensor.flatten().numpy())


def merge_statistics(files: Sequence[Path], target: Path) -> dict[str, Any]:
    """Add up the sums of several runs over the same model into `target`; returns the new provenance.

    Raises UserError where the files are not of one model.
    """
    opened = [(file, _open(file)) for file in files]
    metadata = [_metadata(file, tensors) for file, tensors in opened]
    (first, reference), names = opened[0], set(opened[0][1].keys())
    for (file, tensors), data in zip(opened, metadata, strict=True):
        if data["model"]["fingerprint"] != metadata[0]["model"]["fingerprint"] or set(tensors.keys()) != names:
            raise UserError(f"{file}: statistics of another model than {first}")
    tokens = sum(int(data["tokens"]) for data in metadata)
    sequences = [tensors.get_tensor("sequences") for _, tensors in opened]
    length = min(part.shape[1] for part in sequences)
    fields = [field.name for field in dataclasses.fields(LayerStatistics)]
    num_layers = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("layers."))
    shapes = {name: tuple(reference.get_slice(f"layers.0.{name}").get_shape()) for name in fields}
    provenance = {"tokens": tokens, "model": metadata[0]["model"], "merged": metadata}
    stored = torch.cat([part[:, :length] for part in sequences])
    writer = StatisticsWriter(target, num_layers, shapes, stored, provenance)
    for layer in range(num_layers):
        merged = {}
        for name in fields:
            parts = [tensors.get_tensor(f"layers.{layer}.{name}") for _, tensors in opened]
            merged[name] = sum(part.to(torch.float64) for part in parts)
        writer.add(layer, LayerStatistics(**merged))
    return provenance


def model_fingerprint(reader: HFReader, architecture: Architecture) -> str:
    """A hash of the query, key and value weights of the first, the middle and the last layer, and of the shapes."""
    digest = hashlib.sha256(repr((architecture.heads, architecture.num_layers)).encode())
    for layer in sorted({0, architecture.num_layers // 2, architecture.num_layers - 1}):
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = reader[f"model.layers.{layer}.self_attn.{name}.weight"]
            digest.update(weight.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _open(file: Path) -> Any:
    require_file(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({first_line(error)})") from None


def _metadata(file: Path, tensors: Any) -> dict[str, Any]:
    metadata = tensors.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{file}: not a statistics file of this version's tools/calibrate.py (format {metadata.get('format')!r}, "
            f"not {FORMAT!r})"
        )
    try:
        provenance = json.loads(metadata["provenance"])
        _ = provenance["tokens"], provenance["model"]["fingerprint"], provenance["model"]["source"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: its provenance is missing or damaged") from None
    return provenance
