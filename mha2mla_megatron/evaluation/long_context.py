"""What the evaluations by context length share: their settings, and which model runs through which cache.

A run is one model with one kind of cache. All runs see the same tokens, so their models must have one tokenizer.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, pick_device
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.errors import UserError, require_at_least, require_entries, require_one_of
from mha2mla_megatron.evaluation.cached_perplexity import KINDS, check_options, make_cache
from mha2mla_megatron.evaluation.perplexity import DTYPES, read_config
from mha2mla_megatron.files import new_files, write_json

SHORTEST = 2048
"""Where the lengths begin that are taken if none are given."""


@dataclass(frozen=True)
class LongContextSettings:
    """Settings of every evaluation by context length."""

    lengths: list[int] | None = None
    """Tokens of context, all included. null: 2048, 4096, ... up to the models' smallest max_position_embeddings."""

    beyond: bool = False
    """true: allow lengths beyond a model's max_position_embeddings."""

    caches: list[str] = field(default_factory=lambda: ["full"])
    """Kinds of cache that each model runs through: full, int8, int4, int2 (converted models), hqq8, hqq4, hqq2,
    quanto4, quanto2. A kind that a model cannot have is left out for that model."""

    cache_options: dict[str, int] = field(default_factory=dict)
    """Settings of the quantised caches, such as residual_length, group_size and rope_nbits (int) or q_group_size and
    axis_key (hqq, quanto)."""

    cache_chunk: int = 128
    """Tokens fed at a time: they see each other in full precision and what precedes them as the cache holds it."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16. Log-probabilities are float32 always."""

    device: str = "auto"
    """Where the models run: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""

    bos: bool | None = None
    """true: put the tokenizer's BOS token first. It counts as one of the tokens of context."""

    def __post_init__(self) -> None:
        require_entries("lengths", self.lengths, "length")
        for length in self.lengths or ():
            require_at_least("lengths", length, 2)
        if not self.caches:
            raise UserError(f"caches: an empty list; valid: {', '.join(KINDS)}")
        for kind in self.caches:
            require_one_of("caches", kind, KINDS)
        check_options(self.caches, self.cache_options)
        require_at_least("cache_chunk", self.cache_chunk, 1)
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        pick_device(self.device)


class Run(NamedTuple):
    """A model, as it was named, with one kind of cache."""

    model: str
    cache: str


class HasModel(Protocol):
    """One measurement: whatever else tells it, it is of a model."""

    @property
    def model(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    folders: dict[str, Path]
    """Of each model."""

    runs: list[Run]
    """Those of one model stand together."""

    lengths: list[int]
    """Ascending, each once."""

    vocab_size: int
    """The smallest of the models'."""


def plan_runs(models: Sequence[str], settings: LongContextSettings) -> Plan:
    """Raises UserError for a model that is not there, a length beyond its context, a cache that no model can have."""
    folders = {model: resolve_model(model) for model in models}
    configs = {model: read_config(model, folder) for model, folder in folders.items()}
    limits = {model: getattr(config, "max_position_embeddings", None) for model, config in configs.items()}
    return Plan(
        folders=folders,
        runs=_runs(configs, settings.caches, settings.cache_options),
        lengths=_lengths(limits, settings),
        vocab_size=min(config.vocab_size for config in configs.values()),
    )


def running[Place: HasModel](
    plan: Plan, places: Sequence[Place], settings: LongContextSettings
) -> Iterator[tuple[Place, Any]]:
    """Each place with its running model. A model is loaded when its first place comes, and given up before the next."""
    name, model = "", None
    for place in places:
        if place.model != name:
            model, name = None, place.model
            model = load_causal_lm(name, plan.folders[name], DTYPES[settings.dtype], pick_device(settings.device))
        yield place, model


def _runs(configs: Mapping[str, Any], kinds: Sequence[str], options: Mapping[str, int]) -> list[Run]:
    found, refused = [], {}
    for model, config in configs.items():
        for kind in dict.fromkeys(kinds):
            try:
                make_cache(model, config, kind, options)
                found.append(Run(model, kind))
            except UserError as error:
                refused[Run(model, kind)] = error
    for run, error in refused.items():
        if all(run.cache != other.cache for other in found):
            raise error
        print(f"left out: {error}", file=sys.stderr)
    return found


def _lengths(limits: Mapping[str, int | None], settings: LongContextSettings) -> list[int]:
    if settings.lengths is None:
        known = [limit for limit in limits.values() if limit is not None]
        if not known:
            raise UserError(f"{next(iter(limits))}: its config has no max_position_embeddings; give lengths=[...]")
        lengths, longest = [], min(known)
        while SHORTEST << len(lengths) < longest:
            lengths.append(SHORTEST << len(lengths))
        return [*lengths, longest]
    lengths = sorted(set(settings.lengths))
    for model, limit in limits.items():
        if limit is not None and lengths[-1] > limit and not settings.beyond:
            raise UserError(
                f"{model}: lengths: {lengths[-1]} tokens are more than its max_position_embeddings {limit}; "
                "beyond=true goes there all the same"
            )
    return lengths


def write_results(target: Path, table: str, draw: Callable[[Path], None], report: dict[str, Any]) -> None:
    """results.md, results.png (`draw` makes it) and results.json (the report and versions) in `target`, all or none."""
    with new_files([target / name for name in ("results.md", "results.png", "results.json")], overwrite=True) as files:
        markdown, picture, file = files
        markdown.write_text(table + "\n", encoding="utf-8")
        draw(picture)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        write_json(file, {**report, "versions": versions})
