"""Turn a model of the MHA2MLA authors' own code, a Hugging Face folder or nanotron checkpoint, into our format."""

from __future__ import annotations

from pathlib import Path

from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.cli import split_words
from mha2mla_megatron.errors import run_tool
from mha2mla_megatron.import_mha2mla import ImportSettings, import_model
from mha2mla_megatron.settings import load_settings

USAGE = "import_mha2mla.py SRC DST [config=FILE.yaml] [key=value ...]"


def main(argv: list[str]) -> None:
    (source, target), overrides, file = split_words(argv, USAGE, 2, 2, schema=ImportSettings)
    model = import_model(resolve_model(source), Path(target), load_settings(ImportSettings, overrides, file))
    if model.mla is None:
        print(f"{target}: an ordinary {model.model_type}, as a Hugging Face folder")
        return
    layouts = [model.layout(layer) for layer in range(model.num_layers)]
    before, after = 2 * sum(x.value_dim for x in layouts), sum(x.cache_elements for x in layouts)
    print(f"{target}: {layouts[0].method}, {after} cached elements per token instead of {before} "
          f"(-{1 - after / before:.2%})")  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
