"""tools/inspect_checkpoint.py: what it says of a good checkpoint, and what it finds in a bad one."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron.checkpoint.manifest import MANIFEST, check_manifest, seal_step
from mha2mla_megatron.checkpoint.megatron import LATEST, TorchDistReader
from mha2mla_megatron.errors import UserError
from tests.conftest import make_llama, make_tokenizer, refused, run_tool
from tests.finetune_cases import ROPE_DIMS, Trap, finetune, write_tokens
from tests.megatron_cases import save_global_tensors

TENSOR = "decoder.layers.2.mlp.linear_fc1.weight"
LAYOUT = {"processes": 1, "tensor": 1, "pipeline": 1, "virtual pipeline": 1, "context": 1, "data": 1}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a converted model's first checkpoint, weights alone."""
    workspace = tmp_path_factory.mktemp("inspect")
    original = make_llama(workspace / "original")
    make_tokenizer(original)
    words = ["low_rank.method=joint", "low_rank.kv_lora_rank=12", ROPE_DIMS.replace("[0,4,16,8]", "8")]
    run_tool("convert_mha_to_mla", original, workspace / "mla", *words)
    run_tool("convert_hf_to_megatron", workspace / "mla", workspace / "mla-megatron")
    return workspace


@pytest.fixture(scope="module")
def trained(converted: Path) -> Path:
    write_tokens(converted / "text")
    (converted / "settings.yaml").write_text("")
    return finetune(converted, "mla", converted / "run", "steps=4", "save_interval=2")


@pytest.fixture
def step(converted: Path, tmp_path: Path) -> Path:
    """The step folder of a copy of the weights' checkpoint, to be damaged."""
    return shutil.copytree(converted / "mla-megatron", tmp_path / "checkpoint") / "iter_0000000"


def test_weights_alone(converted: Path, tmp_path: Path) -> None:
    for folder in (converted / "mla-megatron", converted / "mla-megatron" / "iter_0000000"):
        out = run_tool("inspect_checkpoint", folder, f"output={tmp_path / 'found.json'}", "overwrite=true").stdout
        assert "step 0" in out and "optimizer state: no" in out and "complete, readable and finite" in out
        assert "joint, qk_rope_head_dim 8, kv_lora_rank 12" in out
        found = json.loads((tmp_path / "found.json").read_text())
        reader = TorchDistReader(converted / "mla-megatron" / "iter_0000000")
        assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == reader.shapes()
        assert found["bytes"] == sum(reader[name].nbytes for name in reader.shapes())
        assert (found["layout"], found["optimizer_state"], found["run"], found["verified"]) == (
            LAYOUT,
            False,
            None,
            True,
        )
        assert found["model"]["mla"]["low_rank"]["kv_lora_rank"] in (12, [12, 12, 12])


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains in float32 on the CPU")
def test_a_run(trained: Path, tmp_path: Path) -> None:
    out = run_tool("inspect_checkpoint", trained, f"output={tmp_path / 'found.json'}").stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["step"], found["saved_steps"], found["layout"]) == (4, [2, 4], LAYOUT)
    counts = {"step": 4, "skipped": 0, "skipped_in_a_row": 0}
    assert counts.items() <= found["run"].items() and found["schedule"]["num_steps"] == 4
    assert found["optimizer_state"] and "optimizer.state.exp_avg_sq.*" in out
    row = next(line for line in out.splitlines() if line.startswith("decoder.layers.*.mlp.linear_fc1.weight"))
    assert row.split() == ["decoder.layers.*.mlp.linear_fc1.weight", "[192,", "64]", "float32", "3", "0.14"]
    assert "step 2 of 2, 4" in run_tool("inspect_checkpoint", trained, "iteration=2").stdout
    (copy := tmp_path / "copy").mkdir()
    shutil.copytree(trained / "hf", copy / "hf")
    shutil.copytree(trained / "iter_0000002", copy / "named")
    (copy / "named" / MANIFEST).unlink()
    out = run_tool("inspect_checkpoint", copy / "named").stdout
    assert "step 2\n" in out and f"not known (no {MANIFEST})" in out and f"no {MANIFEST} to compare" in out


def _write(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def _data(step: Path) -> Path:
    (file,) = step.glob("*.distcp")
    return file


def _middle_of(step: Path, name: str) -> int:
    """A place among a tensor's values in the data file."""
    (info,) = (info for index, info in TorchDistReader(step).storage.items() if index.fqn == name)
    return info.offset + info.length // 2


def _flip(file: Path, at: int) -> None:
    _write(file, lambda data: data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


def _replace(step: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Save the step's tensors again, changed, with a manifest that is right."""
    reader = TorchDistReader(step)
    tensors = {name: reader[name].clone() for name in reader.shapes()}
    change(tensors)
    shutil.rmtree(step)
    step.mkdir()
    save_global_tensors(tensors, step)
    seal_step(step, 0, LAYOUT)


def _trap_in_index(step: Path) -> None:
    (step / MANIFEST).unlink()
    (step / ".metadata").write_bytes(pickle.dumps(Trap(step.parents[1] / "sprung")))


def _trap_in_values(step: Path) -> None:
    """In place of what is not a tensor, which Megatron's own loading unpickles: an archive with right sums."""
    trap, (info,) = io.BytesIO(), _values(step)
    with zipfile.ZipFile(trap, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([Trap(step.parents[1] / "sprung")]))
        archive.writestr("archive/version", "3\n")
    # An archive is read from its end: the trap goes there, and fills the place.
    content = bytearray(_data(step).read_bytes())
    assert len(trap.getvalue()) <= info.length
    content[info.offset : info.offset + info.length] = trap.getvalue().rjust(info.length, b"\0")
    _data(step).write_bytes(content)


def _values(step: Path) -> list[Any]:
    return [info for index, info in TorchDistReader(step).storage.items() if index.fqn.startswith("common_state")]


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "not a checkpoint": (lambda step: shutil.rmtree(step.parent), ["not a Megatron checkpoint"]),
    "data cut": (lambda step: _write(_data(step), lambda data: data[: len(data) // 2]), [".distcp", "truncated"]),
    "data flipped": (lambda step: _flip(_data(step), _middle_of(step, TENSOR)), [".distcp", TENSOR, "checksum"]),
    "data gone": (lambda step: _data(step).unlink(), [".distcp", "missing"]),
    "index flipped": (lambda step: _flip(step / ".metadata", 5000), [".metadata", "sha256"]),
    "index gone": (lambda step: (step / ".metadata").unlink(), [".metadata", "missing"]),
    "manifest flipped": (lambda step: _flip(step / MANIFEST, 150), [MANIFEST, "damaged"]),
    "manifest a list": (lambda step: (step / MANIFEST).write_text("[1]"), [MANIFEST, "damaged"]),
    "no config": (lambda step: (step.parent / "hf" / "config.json").unlink(), ["config.json", "missing"]),
    "pointer elsewhere": (lambda step: (step.parent / LATEST).write_text("9"), ["iter_0000009", "missing"]),
    "NaN": (lambda step: _replace(step, lambda t: t[TENSOR][0, 3:5].fill_(torch.nan)), [".distcp", TENSOR, "2 of"]),
    "infinity": (lambda step: _replace(step, lambda t: t[TENSOR][0, :1].fill_(torch.inf)), [".distcp", TENSOR, "1 of"]),
    "tensor missing": (lambda step: _replace(step, lambda t: t.pop(TENSOR)), [TENSOR, "missing"]),
    "trap in the index": (_trap_in_index, [".metadata", "refuses"]),
    "trap in the values": (_trap_in_values, [".distcp", "common_state", "cannot be read"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(step: Path, tmp_path: Path, case: str) -> None:
    damage, named = DAMAGE[case]
    damage(step)
    line = refused("inspect_checkpoint", step.parent, f"output={tmp_path / 'found.json'}")
    assert all(part in line for part in named), line
    assert not (tmp_path / "found.json").exists() and not (tmp_path / "sprung").exists()


def test_without_verifying_the_tensors_are_not_read(step: Path) -> None:
    _flip(_data(step), _middle_of(step, TENSOR))
    assert "the tensors were not read" in run_tool("inspect_checkpoint", step, "verify=false").stdout
    assert TENSOR in refused("inspect_checkpoint", step)
    assert TENSOR in refused("convert_megatron_to_hf", step, step.parent.parent / "back")


def test_a_flipped_bit_is_found_or_changes_nothing(step: Path) -> None:
    """Anywhere in any file, with and without the manifest: seeded, 60 bits of each."""
    reader = TorchDistReader(step)
    expected = {name: reader[name] for name in reader.shapes()}
    chance, found = random.Random(0), 0
    for file in (_data(step), step / ".metadata"):
        content = file.read_bytes()
        for _ in range(60):
            at = chance.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            try:
                check_manifest(step)
                changed = TorchDistReader(step)
                tensors = {name: changed[name] for name in changed.shapes()}
            except UserError as error:
                assert file.name in str(error)
                found += 1
            else:
                assert tensors.keys() == expected.keys()
                assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        file.write_bytes(content)
    assert found > 100


PIECES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one lost": (lambda entry: entry.chunks.clear(), "0 of"),
    "one twice": (lambda entry: entry.chunks.append(entry.chunks[0]), "overlap"),
    "outside": (lambda entry: setattr(entry, "size", torch.Size([191, 64])), "outside"),
    "too few": (lambda entry: setattr(entry, "size", torch.Size([193, 64])), "12288 of 12352"),
}


@pytest.mark.parametrize("case", PIECES)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(step: Path, case: str) -> None:
    change, named = PIECES[case]
    reader = TorchDistReader(step)
    change(reader.entries[TENSOR])
    with pytest.raises(UserError, match=named) as error:
        reader[TENSOR]
    assert TENSOR in str(error.value)


def test_a_step_whose_data_is_not_all_there_is_not_sealed(step: Path) -> None:
    (step / MANIFEST).unlink()
    _write(_data(step), lambda data: data[:-1])
    with pytest.raises(UserError, match="is the disk shared"):
        seal_step(step, 0, LAYOUT)
    assert not (step / MANIFEST).exists()


BAD_WORDS = {
    "unknown key": (["verbose=true"], "verbose"),
    "no folder": ([], "/nowhere"),
    "type": (["verify=some"], "verify"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_are_refused(converted: Path, case: str) -> None:
    words, named = BAD_WORDS[case]
    folder = "/nowhere" if case == "no folder" else converted / "mla-megatron"
    assert named in refused("inspect_checkpoint", folder, *words)


def test_output_is_not_overwritten(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("mine")
    line = refused("inspect_checkpoint", converted / "mla-megatron", f"output={tmp_path / 'found.json'}")
    assert "overwrite=true" in line and (tmp_path / "found.json").read_text() == "mine"
