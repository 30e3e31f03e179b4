"""Download, tokenise and blend the sources of a mix: token files for each, and the settings of the blend.

    python examples/data/prepare.py MIX.yaml OUT tokenizer=MODEL tokens=N [key=value ...]

writes OUT/SOURCE.bin, .idx, .json and OUT/blend.yaml, which tools/finetune.py takes as its CONFIG.yaml. A source that
is finished is kept, so that the same command goes on after an interrupt. N tokens in all are enough for a run of
steps x global_batch_size x sequence_length = N; further ones go through the same text again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mha2mla_megatron.cli import split_words
from mha2mla_megatron.data.blend import blend_weights
from mha2mla_megatron.data.preprocess import PreprocessSettings, preprocess
from mha2mla_megatron.errors import UserError, require_at_least, run_tool
from mha2mla_megatron.files import new_files, read_json_object
from mha2mla_megatron.settings import load_settings, require_keys

USAGE = "prepare.py MIX.yaml OUT tokenizer=MODEL tokens=N [key=value ...]"
SPARE = 1.01
"""Each source gets one per cent more than its share, so that rounding to whole samples needs no second epoch."""


@dataclass(frozen=True)
class MixSettings:
    """Settings of examples/data/prepare.py."""

    tokenizer: str | None = None
    """The model whose tokenizer is used: a folder or a hub id."""

    tokens: int | None = None
    """Tokens of all sources together."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Name -> weight, dataset (hub id, local folder or file) and settings of tools/preprocess_data.py."""

    workers: int | None = None
    """Tokenising processes. null: as many as there are CPU cores."""


def main(argv: list[str]) -> None:
    (config, output), overrides, _ = split_words(argv, USAGE, 2, 2, schema=MixSettings)
    mix, out = load_settings(MixSettings, overrides, Path(config)), Path(output)
    require_keys(mix, "tokenizer", "tokens")
    assert mix.tokens is not None
    require_at_least("tokens", mix.tokens, 1)
    jobs = {name: source_settings(name, values, mix) for name, values in mix.sources.items()}
    shares = blend_weights("sources", {name: values["weight"] for name, values in mix.sources.items()})
    for name, (dataset, settings) in jobs.items():
        limited = dataclasses.replace(settings, max_tokens=math.ceil(SPARE * shares[name] * mix.tokens))
        tokenise(dataset, out / name, limited)
    with new_files([out / "blend.yaml"], overwrite=True) as (file,):
        blend = {str(out / name): mix.sources[name]["weight"] for name in jobs}
        file.write_text(yaml.safe_dump({"data": {"train": blend}}, sort_keys=False), encoding="utf-8")
    print(f"{out / 'blend.yaml'}: {', '.join(f'{name} {share:.4g}' for name, share in shares.items())}")


def source_settings(name: str, values: Any, mix: MixSettings) -> tuple[str, PreprocessSettings]:
    """(data set, how it is tokenised) of one source. Raises UserError for what is missing or unknown."""
    if not isinstance(values, dict) or not {"weight", "dataset"} <= values.keys():
        raise UserError(f"sources.{name}: weight and dataset are needed")
    own = {key: value for key, value in values.items() if key not in ("weight", "dataset")}
    words = [f"{key}={json.dumps(value)}" for key, value in {**own, "tokenizer": mix.tokenizer}.items()]
    try:
        return str(values["dataset"]), load_settings(PreprocessSettings, [*words, f"workers={json.dumps(mix.workers)}"])
    except UserError as error:
        raise UserError(f"sources.{name}: {error}") from None


def tokenise(dataset: str, prefix: Path, settings: PreprocessSettings) -> None:
    """Write the token files, unless they are there of the same source and settings with as many tokens."""
    provenance = prefix.with_name(prefix.name + ".json")
    if provenance.exists():
        found = read_json_object(provenance, "")
        if is_made_of(found, dataset, settings):
            print(f"{prefix}: kept, {found['tokens']} tokens")
            return
        raise UserError(
            f"{prefix}: made of another text or with other settings; remove its files or name another folder"
        )
    report = preprocess([dataset], prefix, settings)
    print(f"{prefix}: {report['tokens']} tokens of {report['documents']} documents", flush=True)
    if report["tokens"] < (settings.max_tokens or 0):
        print(f"{prefix}: less than its share of {settings.max_tokens}: a run will read it more than once", flush=True)


def is_made_of(found: dict[str, Any], dataset: str, settings: PreprocessSettings) -> bool:
    """Whether token files with this .json beside them are what tools/preprocess_data.py would make."""
    file = Path(dataset)
    if file.is_file():
        source: dict[str, Any] = {"file": dataset, "bytes": file.stat().st_size}
    else:
        source = {"dataset": dataset, "subset": settings.subset, "split": settings.split}
    inputs = found.get("inputs") or [{}]
    same = ("tokenizer", "text_key", "document_separator", "max_tokens")
    return (
        inputs[0].items() >= source.items()
        and all(found.get(key) == getattr(settings, key) for key in same)
        and (found.get("eod_id") is not None) == settings.append_eod
        and (found.get("bos_id") is not None) == settings.prepend_bos
    )


if __name__ == "__main__":
    run_tool(main)
