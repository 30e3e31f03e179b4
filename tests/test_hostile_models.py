"""Model folders that were made to do harm: refused with one line, without memory for them or a file elsewhere."""

from __future__ import annotations

import ast
import json
import pickle
import random
import resource
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla_megatron.checkpoint.convert_hf_megatron import ToMegatronSettings, hf_to_megatron
from mha2mla_megatron.convert import ConvertSettings, convert_model
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.settings import load_settings
from tests.conftest import make_llama, make_pair, make_tokenizer, refused, run_tool
from tests.finetune_cases import Trap

SEEDS = 300
NUMBERS = (-1, 0, 1, 2, 7, 1 << 24, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 1e300, 0.5)
VALUES = (*NUMBERS, None, True, "", "x", "../x", "/etc/passwd", [], {}, [[]], {"rope_type": 3}, [1] * 5)
NAMES = ("../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "model.safetensors", "gone.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several shards, with an index."""
    folder = make_llama(tmp_path_factory.mktemp("hostile") / "model", max_shard_size="100KB", num_hidden_layers=2)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """No more than this on top of what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def change_header(folder: Path, chance: random.Random) -> None:
    """One shard's header: a place, a shape, a type, a name, or its own length."""
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name, other = chance.sample([key for key in header if key != "__metadata__"], 2)
    entry = header[name]
    kind = chance.randrange(9)
    if kind == 0:
        entry["data_offsets"][chance.randrange(2)] = chance.choice(VALUES)
    elif kind == 1:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 2:
        entry["shape"][0] = chance.choice(VALUES)
    elif kind == 3:
        entry["shape"] = chance.choice(([], [1 << 40, 1 << 40], entry["shape"] * 9, [0], "x", [-1, -1]))
    elif kind == 4:
        entry["dtype"] = chance.choice(("I64", "U8", "BOOL", "F8_E4M3", "F64", "BF16", "", "x", 3))
    elif kind == 5:
        header[chance.choice(("../x", "", "model.layers.99.x", name + "\x00"))] = header.pop(name)
    elif kind == 6:
        header["__metadata__"] = chance.choice(VALUES)
    elif kind == 7:
        del header[name]
    text = json.dumps(header).encode()
    if kind == 8:
        text = text[: chance.randrange(len(text))]
    written = chance.choice(NUMBERS[:10]) % (1 << 64) if chance.random() < 0.1 else len(text)
    file.write_bytes(struct.pack("<Q", int(written)) + text + rest)


def change_index(folder: Path, chance: random.Random) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    files = index["weight_map"]
    name = chance.choice(list(files))
    kind = chance.randrange(6)
    if kind == 0:
        files[name] = chance.choice((*NAMES, *VALUES))
    elif kind == 1:
        gone = files[name]
        index["weight_map"] = {key: value for key, value in files.items() if value != gone}
    elif kind == 2:
        index["weight_map"] = chance.choice(VALUES)
    elif kind == 3:  # every tensor of one shard twice
        shard = folder / files[name]
        shutil.copyfile(shard, folder / "copy.safetensors")
        files["extra"] = "copy.safetensors"
    elif kind == 4:
        file.write_text("[" * 100_000)
        return
    else:
        files[name] = model_file(folder, files[name], chance)
    file.write_text(json.dumps(index))


def model_file(folder: Path, shard: str, chance: random.Random) -> str:
    """A link, in a circle or to a folder, under a plain name."""
    (folder / "link.safetensors").symlink_to(chance.choice(("link.safetensors", "..", ".")))
    return "link.safetensors"


def change_config(folder: Path, chance: random.Random) -> None:
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    key = chance.choice([*sorted(config), "rope_scaling", "rope_theta", "mha2mla", "sliding_window", "attention_bias"])
    if chance.random() < 0.15:
        config["model_type"] = chance.choice(("mha2mla_llama", "qwen2", "mistral"))
    config[key] = chance.choice(VALUES)
    file.write_text(json.dumps(config) if chance.random() < 0.95 else "[" * 100_000)


def test_mutated_folders_are_refused_or_right(model: Path, tmp_path: Path) -> None:
    """Seeded; a change that harms nothing, as of a key that is not read, may pass."""
    (tmp_path / "work").mkdir()
    (tmp_path / "out.safetensors").write_bytes(b"not yours")
    mla = load_settings(ConvertSettings, ["partial_rope.qk_rope_head_dim=4"])
    refusals = 0
    wrong = []
    with little_memory():
        for seed in range(SEEDS):
            chance = random.Random(seed)
            source = shutil.copytree(model, tmp_path / "work" / "source")
            chance.choice((change_header, change_index, change_config))(source, chance)
            try:
                if chance.random() < 0.5:
                    hf_to_megatron(source, tmp_path / "work" / "out", ToMegatronSettings())
                else:
                    convert_model(source, tmp_path / "work" / "out", mla)
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error) and not (tmp_path / "work" / "out").exists(), (seed, error)
            except Exception as error:
                wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
                shutil.rmtree(tmp_path / "work" / ".out.partial", ignore_errors=True)
            shutil.rmtree(source)
            assert {path.name for path in (tmp_path / "work").iterdir()} <= {"out"}, seed
            shutil.rmtree(tmp_path / "work" / "out", ignore_errors=True)
    assert {path.name for path in tmp_path.iterdir()} == {"work", "out.safetensors"}
    assert (tmp_path / "out.safetensors").read_bytes() == b"not yours"
    assert not wrong, "\n".join(wrong)
    assert refusals > SEEDS * 0.6


def test_a_config_of_millions_of_layers_is_refused(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1 << 24}))
    with little_memory(1 << 26):
        assert "num_hidden_layers=16777216" in refused("convert_hf_to_megatron", source, tmp_path / "out")


PICKLES = (
    "pytorch_model.bin", "consolidated.00.pth", "model.pt", "optimizer.pt", "rng_state.pth", "training_args.bin",
    "scheduler.pt", "tokenizer.pkl", "adapter_model.bin",
)  # fmt: skip
"""Under which names folders hold pickles."""
READERS = {
    "convert_mha_to_mla": ["{model}", "{out}", "low_rank.kv_lora_rank=8"],
    "convert_hf_to_megatron": ["{model}", "{out}"],
    "calibrate": ["{model}", "{text}", "{out}", "samples=2", "stored_samples=2", "sequence_length=16"],
    "evaluate_perplexity": ["{model}", "{text}", "window=16"],
    "verify_conversion": ["{model}", "{model}", "text={text}", "window=16"],
    "sweep": ["{model}", "{text}", "{out}", "base.low_rank.kv_lora_rank=8", "perplexity.window=16"],
}
"""Tools that take an original's folder, and their words."""


def set_traps(folder: Path, sprung: Path) -> None:
    """Put pickles into the folder that make the file `sprung` when they are loaded."""
    for number, name in enumerate(PICKLES):
        torch.save(Trap(sprung), folder / name, _use_new_zipfile_serialization=number % 2 == 0)
    for name in PICKLES[:2]:
        torch.load(folder / name, weights_only=False)
        sprung.unlink()  # it was there: otherwise the tests below prove nothing


@pytest.mark.parametrize("tool", READERS)
def test_no_tool_loads_a_pickle(tmp_path: Path, text: Path, tool: str) -> None:
    """Beside the weights it is not looked at; in their place it is refused."""
    source, sprung = make_tokenizer(make_llama(tmp_path / "model", num_hidden_layers=2)), tmp_path / "sprung"
    set_traps(source, sprung)

    def run(out: str) -> subprocess.CompletedProcess[str]:
        words = [word.format(model=source, text=text, out=tmp_path / out) for word in READERS[tool]]
        return run_tool(tool, *words, check=False)

    done = run("beside")
    assert done.returncode == 0 and not sprung.exists(), done.stderr
    (source / "model.safetensors").unlink()
    done = run("in place")
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and not sprung.exists(), done.stderr
    assert not (tmp_path / "in place").exists()


def test_an_exported_model_loads_no_pickle(tmp_path: Path) -> None:
    """transformers itself, with the code in the folder, and that code as it is written."""
    make_pair(tmp_path)
    set_traps(tmp_path / "mla", tmp_path / "sprung")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mla", trust_remote_code=True)
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False)
    (tmp_path / "mla" / "model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mla", trust_remote_code=True)
    assert not (tmp_path / "sprung").exists()
    files = sorted((tmp_path / "mla").glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            words = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            words += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            words += [ast.unparse(node)] if isinstance(node, ast.Attribute | ast.Name) else []
            for word in words:
                assert not {"pickle", "marshal", "shelve", "eval", "exec", "open"} & set(word.split(".")), (file, word)
                assert word != "torch.load", file
