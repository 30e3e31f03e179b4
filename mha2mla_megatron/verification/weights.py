"""Checks 1 to 8: what is in two model folders, and whether what has to be equal is, bit by bit."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mha2mla_megatron.architecture import Architecture
from mha2mla_megatron.checkpoint.either import ModelTensors
from mha2mla_megatron.config import SCORED_STRATEGIES, PartialRopeConfig
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.frequencies import attention_factor
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from mha2mla_megatron.partial_rope import head_row_order, kept_pairs, ordered_heads
from mha2mla_megatron.progress import Progress


@dataclass
class Check:
    """One line of the report. It failed if it has problems; `detail` says what was seen, or why it was not done."""

    name: str
    detail: str = ""
    problems: list[str] = field(default_factory=list)
    done: bool = True


def same_form(a: Architecture, b: Architecture) -> bool:
    """Whether two models have the same tensors, so that all of them have to be equal."""
    return _layouts(a) == _layouts(b)


class WeightChecks:
    """Runs the checks in one pass over the tensors of two folders, A and B; their results are in `checks`."""

    def __init__(self, a: ModelTensors, b: ModelTensors) -> None:
        self.sides = {"A": a, "B": b}
        self.same_form = same_form(a.architecture, b.architecture)
        self.checks = [
            Check(name)
            for name in ("readable", "same model", "coverage", "shapes", "dtypes", "finite", "equal", "conversion")
        ]
        self.readable, self.same_model, self.coverage, self.shapes = self.checks[:4]
        self.dtypes, self.finite, self.equal, self.conversion = self.checks[4:]
        self.usable: dict[str, set[str]] = {"A": set(), "B": set()}
        """Hugging Face names of the tensors that are there, in the right shape, and have not failed to be read."""
        self.types = {"A": Counter[str](), "B": Counter[str]()}
        self.became: dict[torch.dtype, torch.dtype] = {}
        self.compared = 0

    @property
    def runnable(self) -> bool:
        """Whether both models are all there."""
        return not any(check.problems for check in (self.readable, self.coverage, self.shapes, self.dtypes))

    def run(self) -> None:
        self._compare_architectures()
        for label, side in self.sides.items():
            try:
                side.open()
            except UserError as error:
                self.readable.problems.append(f"{label}: {error}")
            else:
                self._compare_names(label, side)
        names = list(dict.fromkeys(name for side in self.sides.values() for name in side.names))
        progress = Progress("verifying", len(names), "tensors")
        for name in names:
            self._tensor(name)
            progress.advance()
        note = "" if self.same_form else self._moved_attention()
        progress.close()
        converted = [label for label, side in self.sides.items() if side.architecture.mla is not None]
        for label in converted:
            self._pairs(label)
        self.readable.detail = ", ".join(f"{label} {len(names)} tensors" for label, names in self.usable.items())
        self.dtypes.detail = "; ".join(f"{label} {_list(types)}" for label, types in self.types.items())
        self.equal.done = self.compared > 0
        self.equal.detail = f"{self.compared} tensors, bit by bit{note}"
        self.conversion.done = bool(converted)
        self.conversion.detail = (
            "rotary pairs in range, distinct, as in config.json" if converted else "none is converted"
        )

    def _compare_architectures(self) -> None:
        one, other = (dataclasses.asdict(side.architecture) for side in self.sides.values())
        left_out = ("mla",) if self.same_form else ("mla", "model_type")
        self.same_model.problems = [
            f"{key}: {one[key]} in A, {other[key]} in B"
            for key in one
            if key not in left_out and one[key] != other[key]
        ]
        self.same_model.detail = "shapes, biases, rotary frequencies" + (", family" if self.same_form else "")

    def _compare_names(self, label: str, side: ModelTensors) -> None:
        expected, found = side.expected(), side.found()
        self.coverage.problems += [f"{label}: {name} is missing" for name in expected if name not in found]
        self.coverage.problems += [f"{label}: {name} is surplus" for name in found if name not in expected]
        self.shapes.problems += [
            f"{label}: {name} has shape {found[name]}, config.json says {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        good = {name for name, shape in expected.items() if found.get(name) == shape}
        self.usable[label] = {name for name in side.names if side.stored_name(name) in good}

    def _read(self, label: str, name: str) -> torch.Tensor | None:
        """A tensor of one side; None where it is not usable."""
        if name not in self.usable[label]:
            return None
        try:
            return self.sides[label][name]
        except UserError as error:
            self.readable.problems.append(f"{label}: {error}")
            self.usable[label].remove(name)
            return None

    def _tensor(self, name: str) -> None:
        a, b = self._read("A", name), self._read("B", name)
        for label, tensor in (("A", a), ("B", b)):
            if tensor is None:
                continue
            if name.endswith("rope_pairs"):
                if tensor.dtype != torch.int64:
                    self.dtypes.problems.append(f"{label}: {name} has type {tensor.dtype}, not int64")
                continue
            self.types[label][str(tensor.dtype).removeprefix("torch.")] += 1
            if not tensor.is_floating_point():
                self.dtypes.problems.append(f"{label}: {name} has type {tensor.dtype}, not a floating one")
            elif count := int((~torch.isfinite(tensor)).sum()):
                self.finite.problems.append(f"{label}: {name}: {count} of {tensor.numel()} values are not finite")
        if a is not None and b is not None and (self.same_form or ".self_attn." not in name):
            self._compare(name, a, b)

    def _compare(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Note where two tensors differ in any bit; where they have two types, in the narrower one."""
        self.compared += 1
        if self.became.setdefault(a.dtype, b.dtype) != b.dtype:
            self.dtypes.problems.append(f"{name}: {a.dtype} in A and {b.dtype} in B, others {self.became[a.dtype]}")
        if a.shape != b.shape:
            self.equal.problems.append(f"{name}: shape {tuple(a.shape)} in A, {tuple(b.shape)} in B")
            return
        narrower = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        a, b = a.to(narrower).contiguous(), b.to(narrower).contiguous()
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            largest = (a.double() - b.double()).abs().max().item()
            count = int((a.view(torch.uint8) != b.view(torch.uint8)).view(*a.shape, -1).any(-1).sum())
            self.equal.problems.append(f"{name}: {count} of {a.numel()} values differ, by up to {largest:.3g}")

    def _moved_attention(self) -> str:
        """Compare the attention of a conversion that is not factored, row by row; returns what to say of it."""
        labels = [label for label, side in self.sides.items() if side.architecture.mla is not None]
        if len(labels) != 1:
            return "; attention is another in each conversion"
        ours, theirs = labels[0], "AB".replace(labels[0], "")
        steps = _healing_steps(self.sides[ours])
        if steps is None:
            return "; not attention: there is no conversion_report.json to say whether it was healed"
        if steps > 0:
            return "; not attention, which was healed"
        model = self.sides[ours].architecture
        assert model.mla is not None
        queries = not model.mla.partial_rope.query_map and attention_factor(model) == 1
        for layer in range(model.num_layers):
            prefix, layout = f"model.layers.{layer}.self_attn.", model.layout(layer)
            pairs = torch.empty(layout.rope_heads, 0, dtype=torch.int64)
            if layout.qk_rope_head_dim > 0:
                stored = self._read(ours, prefix + "rope_pairs")
                if stored is None or _bad_pairs(stored, layout, model.mla.partial_rope):
                    continue  # reported elsewhere
                pairs = stored
            for ours_name, theirs_name, change in _moves(layout, pairs, queries, bool(model.mla.partial_rope.mixed)):
                found, source = self._read(ours, prefix + ours_name), self._read(theirs, prefix + theirs_name)
                if found is not None and source is not None:
                    moved = change(source)
                    self._compare(prefix + ours_name, *((found, moved) if ours == "A" else (moved, found)))
        return ", with the attention rows that conversion moves, not those that it factors"

    def _pairs(self, label: str) -> None:
        """Whether rotary pairs are possible ones, and those of the rule that config.json names."""
        model = self.sides[label].architecture
        assert model.mla is not None
        rope = model.mla.partial_rope
        for layer in range(model.num_layers):
            name, layout = f"model.layers.{layer}.self_attn.rope_pairs", model.layout(layer)
            pairs = self._read(label, name)
            if pairs is None:
                continue
            problem = _bad_pairs(pairs, layout, rope)
            if problem is None and rope.strategy not in SCORED_STRATEGIES:
                rule = kept_pairs(rope, layout.qk_rope_head_dim, layout.rope_heads, layout.head_dim, None)
                if not torch.equal(pairs, rule):
                    problem = f"not the pairs of partial_rope.strategy={rope.strategy}"
            if problem is not None:
                self.conversion.problems.append(f"{label}: {name}: {problem}")


def _layouts(model: Architecture) -> list[LatentLayout] | None:
    return None if model.mla is None else [model.layout(layer) for layer in range(model.num_layers)]


def _moves(
    layout: LatentLayout, pairs: torch.Tensor, queries: bool, mixed: bool
) -> Iterator[tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]]:
    """(name in the conversion, name in the original, what becomes of it) of one layer's attention but the factors.

    queries: whether they are only moved, not mapped or scaled. mixed: rotated keys are mixtures of rows, and what is
    left of these too.
    """
    if mixed:
        for name in ("o_proj.weight", "o_proj.bias", "v_proj.weight", "v_proj.bias"):
            yield name, name, lambda rows: rows
        yield "v_up_proj.bias", "v_proj.bias", lambda rows: rows
        return
    order, r = head_row_order(pairs, layout.head_dim), layout.qk_rope_head_dim
    for kind in ("weight", "bias"):
        yield f"o_proj.{kind}", f"o_proj.{kind}", lambda rows: rows
        yield f"v_proj.{kind}", f"v_proj.{kind}", lambda rows: rows
        yield f"k_rope_proj.{kind}", f"k_proj.{kind}", lambda rows: ordered_heads(rows, order)[:, 0, :r].flatten(0, 1)
        yield f"k_nope_proj.{kind}", f"k_proj.{kind}", lambda rows: ordered_heads(rows, order)[:, 0, r:].flatten(0, 1)
        if queries:
            yield f"q_proj.{kind}", f"q_proj.{kind}", lambda rows: ordered_heads(rows, order).flatten(0, 2)
    yield "v_up_proj.bias", "v_proj.bias", lambda rows: rows
    for norm in ("k_norm.weight", "q_norm.weight") if queries else ("k_norm.weight",):
        yield norm, norm, lambda rows: rows[order]


def _healing_steps(side: ModelTensors) -> int | None:
    """How many steps attention was trained for after conversion; None where nothing says it."""
    try:
        return int(json.loads((side.hf / "conversion_report.json").read_text())["heal"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _bad_pairs(pairs: torch.Tensor, layout: LatentLayout, rope: PartialRopeConfig) -> str | None:
    """Why these are not pairs of a head. pairs: [R, r/2]. Mixed keys may have a frequency several times."""
    if pairs.dtype != torch.int64:
        return f"{pairs.dtype} are no numbers of pairs"
    last = layout.head_dim // 2 - 1
    if not 0 <= int(pairs.min()) <= int(pairs.max()) <= last:
        return f"pairs from {int(pairs.min())} to {int(pairs.max())}; a head has 0 to {last}"
    if not rope.mixed and any(len(set(row)) < len(row) for row in pairs.tolist()):
        return "a head has the same pair twice"
    return None


def _list(types: Counter[str]) -> str:
    return ", ".join(types if len(types) < 2 else (f"{name} ({count})" for name, count in types.items())) or "nothing"
