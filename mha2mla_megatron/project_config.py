"""A config.json written by the MHA2MLA authors' own code (github.com/JT-Ushio/MHA2MLA), in our terms.

Their code has two generations. The first, of the paper and its released models, writes `RoPE` and `SVD`; the second
writes `mha2mla`. Both count ranks per key/value head; the first counts pairs of dims, the second dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mha2mla_megatron.config import LowRankConfig, MHA2MLAConfig, PartialRopeConfig
from mha2mla_megatron.errors import UserError

STRATEGIES = {
    0: "full", 1: "high", 2: "uniform", 3: "ends", 4: "2-norm", 5: "low",
    "full-rope": "full", "high": "high", "uniform": "uniform", "2-norm": "2-norm", "low": "low",
}  # fmt: skip
"""partial_rope_version -> our name."""
SPLIT_METHODS, JOINT_METHODS = (2, 3), (1, 4, 5, 6, 7, 8)
"""SVD.method: how the factors began. After training only the shapes matter: two latents, or one."""
SVD_INIT_METHODS = {"none": "none", "split": "split", "joint": "joint", "only_key": "key", "only_value": "value"}


@dataclass(frozen=True)
class ProjectNames:
    """What one generation calls a layer's projections, under `self_attn.`."""

    k_rope: str
    k_up: str
    v_up: str
    """With factors an up-projection, without them all of K_nope or V."""

    joint_down: str
    k_down: str
    v_down: str
    query_by_head: bool
    """Whether q_proj has its rows as the original model has them, else [all heads' rotated | all heads' others]."""


FIRST = ProjectNames("W_k_r", "W_up_k", "W_up_v", "W_down_k", "W_down_k", "W_down_v", query_by_head=True)
SECOND = ProjectNames(
    "k_r_proj", "kv_proj.up_k", "kv_proj.up_v", "kv_proj.down_kv", "kv_proj.down_k", "kv_proj.down_v",
    query_by_head=False,
)  # fmt: skip


@dataclass(frozen=True)
class ProjectConfig:
    """names: None for partial RoPE alone in the first generation, which leaves q_proj, k_proj and v_proj as they are.

    mla: not yet resolved; scores are set for 2-norm.
    """

    names: ProjectNames | None
    mla: MHA2MLAConfig


def parse_project_config(config: Mapping[str, Any], source: str, groups: int, head_dim: int) -> ProjectConfig:
    """What `config` says of the conversion, for a model with G `groups` of heads of d `head_dim`.

    Raises UserError, naming `source` and the key, for a model that is not of the project or not one that our layout
    can express.
    """
    if config.get("AE"):
        raise UserError(f"{source}: AE is set: an auto-encoder between down and up has no place in our layout")
    if isinstance(config.get("mha2mla"), Mapping):
        values = _Values(config["mha2mla"], f"{source}: mha2mla")
        if "partial_rope_version" not in config["mha2mla"]:
            raise UserError(f"{source}: mha2mla has no partial_rope_version: not a config of the MHA2MLA project")
        return _second(values, groups, head_dim)
    if isinstance(config.get("RoPE"), Mapping):
        svd = _Values(config["SVD"], f"{source}: SVD") if config.get("SVD") else None
        if svd is not None and svd.values.get("method") == 0:  # their nanotron code's word for partial RoPE alone
            svd = None
        return _first(_Values(config["RoPE"], f"{source}: RoPE"), svd, groups, head_dim)
    raise UserError(
        f"{source}: neither RoPE nor mha2mla: not a model of the MHA2MLA project, or one of partial RoPE alone, whose "
        "settings are in a YAML file of its own: give rope_config=FILE"
    )


class _Values:
    """Reads one section of their config."""

    def __init__(self, values: Any, source: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: holds a {type(values).__name__}, not settings")
        self.values, self.source = values, source

    def number(self, *keys: str) -> int:
        """A whole number from 0 on, under whichever of the keys is there; 0 without any."""
        key = next((key for key in keys if self.values.get(key) is not None), keys[0])
        value = self.values.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{self.source}.{key}: {value!r} is not a whole number from 0 on")
        return value

    def one_of(self, key: str, valid: Mapping[Any, str]) -> str:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | str) or value not in valid:
            raise UserError(f"{self.source}.{key}: {value!r} is not one of {', '.join(map(str, valid))}")
        return valid[value]

    def strategy(self) -> str:
        if self.values.get("partial_rope_version") == 6:
            raise UserError(
                f"{self.source}.partial_rope_version: 6 keeps another number of pairs in each head of a layer, which "
                "our layout cannot express"
            )
        return self.one_of("partial_rope_version", STRATEGIES)


def _first(rope: _Values, svd: _Values | None, groups: int, head_dim: int) -> ProjectConfig:
    strategy = rope.strategy()
    top, last = rope.number("top_k_rope_dim"), rope.number("last_k_rope_dim", "lask_k_rope_dim")
    pairs = {"full": head_dim // 2, "high": top, "ends": top + last, "2-norm": top, "low": last}
    if strategy == "uniform":
        partial_rope = _uniform(rope, rope.number("uniform_step"), head_dim)
    else:
        partial_rope = _rope(rope, strategy, 2 * pairs[strategy], head_dim, top if strategy == "ends" else None)
    if svd is None:
        return ProjectConfig(None, MHA2MLAConfig(partial_rope, LowRankConfig(method="none")))
    methods = dict.fromkeys(SPLIT_METHODS, "split") | dict.fromkeys(JOINT_METHODS, "joint")
    method = svd.one_of("method", methods)
    return ProjectConfig(FIRST, MHA2MLAConfig(partial_rope, _low_rank(svd, method, groups)))


def _second(values: _Values, groups: int, head_dim: int) -> ProjectConfig:
    for key, reason in (
        ("is_baseline", "an ordinary model, which convert_mha_to_mla.py and the others read as it is"),
        ("is_gqa2mha2mla", "key/value heads are multiplied in part, which our layout cannot express"),
    ):
        if values.values.get(key):
            raise UserError(f"{values.source}.{key} is true: {reason}")
    strategy, r = values.strategy(), values.number("rope_dim_for_mla")
    if strategy == "uniform":
        partial_rope = _uniform(values, head_dim // r if r else 0, head_dim)
        if partial_rope.qk_rope_head_dim != r:
            raise UserError(
                f"{values.source}.rope_dim_for_mla: {r} of {head_dim} dims cannot be spread evenly; their code takes "
                f"{partial_rope.qk_rope_head_dim} for keys and {r} for queries"
            )
    else:
        partial_rope = _rope(values, strategy, r, head_dim)
    method = values.one_of("svd_init_method", SVD_INIT_METHODS)
    low_rank = LowRankConfig(method="none") if method == "none" else _low_rank(values, method, groups)
    return ProjectConfig(SECOND, MHA2MLAConfig(partial_rope, low_rank))


def _rope(values: _Values, strategy: str, r: int, head_dim: int, high_pairs: int | None = None) -> PartialRopeConfig:
    if r % 2 or r > head_dim:
        raise UserError(f"{values.source}: {r} rotated dims of {head_dim} in a head; an even number of them is needed")
    scores = None
    if strategy == "2-norm":
        scores = values.values.get("qk_tensor_path")
        if not isinstance(scores, str) or not scores:
            raise UserError(f"{values.source}.qk_tensor_path: {scores!r} does not name a file, which 2-norm needs")
    return PartialRopeConfig(strategy=strategy, qk_rope_head_dim=r, ends_high_pairs=high_pairs, scores=scores)


def _uniform(values: _Values, step: int, head_dim: int) -> PartialRopeConfig:
    """Theirs takes dims start, start + step, ... of all d; these are whole pairs only if both halves have the same."""
    start = values.number("uniform_start_point")
    if step < 1 or head_dim // 2 % step or start >= step:
        raise UserError(
            f"{values.source}: every {step}th of {head_dim} dims from {start} on are not whole pairs (j, j + "
            f"{head_dim // 2}), so what is rotated is no rotation, which our layout cannot express"
        )
    return PartialRopeConfig(strategy="uniform", qk_rope_head_dim=head_dim // step, uniform_start=start)


def _low_rank(values: _Values, method: str, groups: int) -> LowRankConfig:
    rank = values.number("low_rank")
    if rank == 0:
        raise UserError(f"{values.source}.low_rank: {values.values.get('low_rank')!r}; latents have a rank from 1 on")
    return LowRankConfig(method=method, kv_lora_rank=rank * groups)
