"""tools/verify_conversion.py: what it says of good pairs of folders, and which check finds which damage."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mha2mla_megatron.checkpoint.megatron import TorchDistReader
from tests.conftest import PROSE, make_llama, make_tokenizer, refused, run_tool

WINDOW = 32
MLP = "model.layers.1.mlp.up_proj.weight"
LAYER = "model.layers.1.self_attn."
PAIRS = LAYER + "rope_pairs"
CHECKS = ["readable", "same model", "coverage", "shapes", "dtypes", "finite", "equal", "conversion", "output"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its conversion, each in both formats, and a text."""
    folder = tmp_path_factory.mktemp("verify")
    make_tokenizer(make_llama(folder / "original", bias=True))
    words = ["partial_rope.qk_rope_head_dim=[0,8,16]", "low_rank.method=joint", "low_rank.kv_lora_rank=30"]
    run_tool("convert_mha_to_mla", folder / "original", folder / "mla", *words)
    run_tool("convert_mha_to_mla", folder / "original", folder / "straight-megatron", *words, "ckpt_format=torch_dist")
    for name in ("original", "mla"):
        run_tool("convert_hf_to_megatron", folder / name, folder / f"{name}-megatron")
    (folder / "text.txt").write_text("\n".join(PROSE * 4))
    question = {"goal": "the tide", "sol1": "had gone", "sol2": "lay open", "label": 0}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    return folder


def verify(a: Path, b: Path, tmp_path: Path, *words: object) -> tuple[int, str, dict[str, Any]]:
    """(exit code, printed report, JSON report)."""
    file = tmp_path / "report.json"
    done = run_tool("verify_conversion", a, b, f"output={file}", *words, check=False)
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(file.read_text())
    assert report["passed"] == (done.returncode == 0) and [c["name"] for c in report["checks"]] == CHECKS
    assert done.stdout.splitlines()[-1].startswith("failed: " if done.returncode else "all checks passed")
    return done.returncode, done.stdout, report


def failed(report: dict[str, Any]) -> list[str]:
    return [check["name"] for check in report["checks"] if check["problems"]]


@pytest.mark.parametrize(
    ("a", "b", "compared"),
    [
        ("original", "original-megatron", 41),
        ("mla-megatron", "mla", 46),
        ("original", "mla", 36),  # embeddings, norms, MLPs: 17; moved: q, o, k_rope and their biases, v's bias
        ("mla", "original-megatron", 36),
        ("original", "mla-megatron", 17),  # no conversion_report.json there
        ("original", "straight-megatron", 36),
    ],
)
def test_good_pairs(models: Path, tmp_path: Path, a: str, b: str, compared: int) -> None:
    code, out, report = verify(models / a, models / b, tmp_path, f"text={models / 'text.txt'}", f"window={WINDOW}")
    assert code == 0, out
    assert f"{compared} tensors, bit by bit" in out
    agreement = report["agreement"]
    if a.split("-")[0] == b.split("-")[0]:
        assert (agreement["kl_divergence"], agreement["top1"], agreement["largest_difference"]) == (0, 1, 0)
    else:
        assert agreement["kl_divergence"] > 0.1 and agreement["top1"] < 0.5
    assert f"KL {agreement['kl_divergence']:.3g} nats" in out


def test_the_numbers_are_those_of_a_plain_loop(models: Path, tmp_path: Path) -> None:
    words = [f"text={models / 'text.txt'}", f"window={WINDOW}", "max_windows=3", "batch_size=2"]
    found = verify(models / "original", models / "mla", tmp_path, *words)[2]["agreement"]
    ids = AutoTokenizer.from_pretrained(models / "original")((models / "text.txt").read_text())["input_ids"]
    a, b = (AutoModelForCausalLM.from_pretrained(models / n, trust_remote_code=True) for n in ("original", "mla"))
    kl, same = 0.0, 0
    for start in range(0, 3 * WINDOW, WINDOW):
        with torch.no_grad():
            p, q = (m(torch.tensor([ids[start : start + WINDOW]])).logits[0].double().softmax(-1) for m in (a, b))
        kl += sum(p[i, j].item() * math.log(p[i, j] / q[i, j]) for i in range(WINDOW) for j in range(p.shape[1]))
        same += sum(int(p[i].argmax() == q[i].argmax()) for i in range(WINDOW))
    assert found["tokens"] == 3 * WINDOW and found["top1"] == same / (3 * WINDOW)
    assert found["kl_divergence"] == pytest.approx(kl / (3 * WINDOW), rel=1e-5)  # float32 logits


def _edit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def _config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def _flip_bit(tensors: dict[str, torch.Tensor]) -> None:
    """The last bit of one weight."""
    tensors[MLP].view(torch.int32)[5, 7] ^= 1


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "one bit": (_edit(_flip_bit), ["equal"], f"{MLP}: 1 of 6144 values differ"),
    "NaN": (_edit(lambda t: t[MLP][3, 1:3].fill_(torch.nan)), ["finite", "equal"], f"B: {MLP}: 2 of 6144 values"),
    "missing": (_edit(lambda t: t.pop(MLP)), ["coverage"], f"B: {MLP} is missing"),
    "surplus": (_edit(lambda t: t.update(extra=torch.ones(1))), ["coverage"], "B: extra is surplus"),
    "shape": (_edit(lambda t: t.update({MLP: t[MLP][:-1].clone()})), ["shapes"], f"{MLP} has shape (95, 64)"),
    "one type": (_edit(lambda t: t.update({MLP: t[MLP].half()})), ["dtypes"], "others torch.float32"),
    "whole numbers": (_edit(lambda t: t.update({MLP: t[MLP].int()})), ["dtypes", "equal"], "not a floating one"),
    "cut": (_cut, ["readable"], "B: "),
    "another base": (_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), ["same model"], "500000"),
    "query rows": (_edit(lambda t: t[LAYER + "q_proj.weight"][:2].copy_(t[LAYER + "q_proj.weight"][2:4])), ["equal"],
                   LAYER + "q_proj.weight: 128 of 4096"),
    "rotated key": (_edit(lambda t: t[LAYER + "k_rope_proj.bias"].neg_()), ["equal"], "k_rope_proj.bias: 16 of 16"),
    "pair range": (_edit(lambda t: t[PAIRS].add_(4)), ["conversion"], "pairs from 4 to 10; a head has 0 to 7"),
    "pair twice": (_edit(lambda t: t[PAIRS][1, 0].fill_(6)), ["conversion"], "the same pair twice"),
    "other pairs": (_edit(lambda t: t[PAIRS].add_(1)), ["equal", "conversion"], "not the pairs of partial_rope"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(models: Path, tmp_path: Path, case: str) -> None:
    damage, checks, line = DAMAGE[case]
    copy = shutil.copytree(models / "mla", tmp_path / "copy")
    damage(copy)
    code, out, report = verify(models / "original", copy, tmp_path)
    assert code == 1 and failed(report) == checks and line in out, out


def test_damage_in_a_checkpoint_is_found(models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models / "mla-megatron", tmp_path / "copy")
    (data,) = (copy / "iter_0000000").glob("*.distcp")
    storage = TorchDistReader(copy / "iter_0000000").storage
    (info,) = (i for index, i in storage.items() if index.fqn == "decoder.layers.2.mlp.linear_fc2.weight")
    content = bytearray(data.read_bytes())
    content[info.offset + info.length // 2] ^= 4
    data.write_bytes(content)
    code, out, report = verify(models / "mla", copy, tmp_path, f"text={models / 'text.txt'}", f"window={WINDOW}")
    assert code == 1 and failed(report) == ["readable"] and "checksum" in out, out
    assert not report["checks"][-1]["done"]


def test_factors_are_judged_by_their_output(models: Path, tmp_path: Path) -> None:
    """The weights of a conversion's factors are nobody's, so that only the text shows what is wrong with them."""
    copy = shutil.copytree(models / "mla", tmp_path / "copy")
    _edit(lambda t: t[LAYER + "v_up_proj.weight"].zero_())(copy)
    words = [f"text={models / 'text.txt'}", f"window={WINDOW}"]
    assert verify(models / "original", copy, tmp_path)[0] == 0
    good = verify(models / "original", models / "mla", tmp_path, *words)[2]["agreement"]
    assert verify(models / "original", models / "mla", tmp_path, *words, "max_kl=1")[0] == 0
    limit = good["kl_divergence"] * 1.01
    code, out, report = verify(models / "original", copy, tmp_path, *words, f"max_kl={limit}", "min_top1=0.99")
    assert code == 1 and failed(report) == ["output"] and "top-1 agreement" in out, out
    assert failed(verify(models / "mla", copy, tmp_path, *words)[2]) == ["equal", "output"]


def test_another_model_is_found(models: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", bias=True, seed=5)
    assert failed(verify(models / "original", other, tmp_path)[2]) == ["equal"]
    assert failed(verify(other, models / "mla-megatron", tmp_path)[2]) == ["equal"]
    wider = make_llama(tmp_path / "wider", intermediate_size=100, bias=True)
    code, out, report = verify(models / "original", wider, tmp_path)
    assert code == 1 and failed(report) == ["same model", "equal"] and "intermediate_size: 96 in A, 100 in B" in out


def test_another_type_is_compared_in_the_narrower_one(models: Path, tmp_path: Path) -> None:
    words = ["partial_rope.qk_rope_head_dim=8", "dtype=bfloat16"]
    run_tool("convert_mha_to_mla", models / "original", tmp_path / "bf16", *words)
    code, out, _ = verify(models / "original", tmp_path / "bf16", tmp_path)
    assert code == 0 and "A float32; B bfloat16" in out, out
    _edit(lambda t: t[MLP][0, 0].mul_(1.01))(tmp_path / "bf16")
    assert failed(verify(models / "original", tmp_path / "bf16", tmp_path)[2]) == ["equal"]


def _code(text: str) -> Callable[[Path], None]:
    """Put this at the end of the folder's own modeling code."""

    def change(folder: Path) -> None:
        with (folder / "modeling_mha2mla.py").open("a") as stream:
            stream.write(f"\n{text}\n")

    return change


NOT_RUN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code that does not load": (_code("raise RuntimeError('boom')"), "B: cannot be loaded (boom)"),
    "code with a mistake": (_code("None.weights"), "cannot be run (AttributeError: 'NoneType' object has no"),
    "code that does not run": (
        _code("MHA2MLALlamaForCausalLM.forward = lambda self, **_: self.nothing"),
        "cannot be run (AttributeError: 'MHA2MLALlamaForCausalLM' object has no attribute 'nothing')",
    ),
    "no code": (lambda folder: (folder / "modeling_mha2mla.py").unlink(), "B: cannot be loaded ("),
    "no code of its config": (lambda folder: (folder / "configuration_mha2mla.py").unlink(), "B: cannot be loaded ("),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "tokenizer cannot be"),
}


@pytest.mark.parametrize("case", NOT_RUN)
def test_a_model_that_cannot_be_run_fails_its_check_alone(models: Path, tmp_path: Path, case: str) -> None:
    damage, reason = NOT_RUN[case]
    copy = shutil.copytree(models / "mla", tmp_path / case.replace(" ", "_"))  # code is cached by the folder's name
    damage(copy)
    words = [f"text={models / 'text.txt'}", f"window={WINDOW}"]
    code, out, report = verify(models / "original", copy, tmp_path, *words)
    assert code == 1 and failed(report) == ["output"], out
    (problem,) = report["checks"][-1]["problems"]
    assert reason in problem and "\n" not in problem and problem in out and report["agreement"] is None
    assert all(check["done"] for check in report["checks"])


def test_a_folder_without_room_for_the_export_fails_its_check_alone(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    words = [f"text={models / 'text.txt'}", f"window={WINDOW}"]
    report = verify(models / "original", models / "mla-megatron", tmp_path, *words)[2]
    assert failed(report) == ["output"] and "No such file or directory" in report["checks"][-1]["problems"][0]


def test_the_command_that_imports_a_model_of_the_authors_code(models: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(models / "original", tmp_path / "their model")
    _config(RoPE={"partial_rope_version": 1, "top_k_rope_dim": 3}, SVD={"method": 7, "low_rank": 8})(theirs)
    for words in ((theirs, models / "mla"), (models / "original", theirs)):
        line = refused("verify_conversion", *words)
        assert "import it first" in line and f"python tools/import_mha2mla.py '{theirs}' IMPORTED" in line


def test_one_process_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    line = refused("verify_conversion", models / "original", models / "mla")
    assert "verify_conversion.py runs in one process" in line


BAD_INPUT = {
    "no folder": (["/nowhere/model"], "/nowhere/model"),
    "no model": (["{models}"], "config.json"),
    "no text": (["{models}/mla", "text=/nowhere/text.txt"], "/nowhere/text.txt"),
    "limit without text": (["{models}/mla", "max_kl=1"], "text=FILE"),
    "long window": (["{models}/mla", "text={models}/text.txt", "window=200"], "window"),
    "one word": ([], "2 positional"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(models: Path, case: str) -> None:
    words, named = BAD_INPUT[case]
    assert named in refused("verify_conversion", models / "original", *(word.format(models=models) for word in words))


def test_a_text_that_does_not_fit_is_refused_before_the_weights_are_read(models: Path, tmp_path: Path) -> None:
    """Of a large model they take minutes."""
    words = [models / "original", models / "mla", f"text={models / 'text.txt'}", f"output={tmp_path / 'r.json'}"]
    done = run_tool("verify_conversion", *words, "window=100", "max_windows=1000", check=False)
    assert done.returncode == 0 and "verifying" in done.stderr
    done = run_tool("verify_conversion", *words, "window=100000", check=False)
    assert done.returncode == 2 and "window" in done.stderr and "verifying" not in done.stderr


def test_nothing_compared_is_not_called_equal(models: Path, tmp_path: Path) -> None:
    code, out, _ = verify(models / "original", models / "original-megatron" / "hf", tmp_path)
    assert code == 1 and "readable    FAILED" in out and "equal       -" in out


TOOLS = {
    "convert_mha_to_mla": ["{model}", "out"],
    "convert_hf_to_megatron": ["{model}", "out"],
    "import_mha2mla": ["{model}", "out"],
    "verify_conversion": ["{model}", "{models}/original"],
    "calibrate": ["{model}", "{models}/text.txt", "out"],
    "evaluate_perplexity": ["{model}", "{models}/text.txt"],
    "evaluate_choices": ["{model}", "{models}/questions.jsonl"],
    "sweep": ["{model}", "{models}/text.txt", "out"],
}


def test_the_command_that_merges_an_adapter_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the folder's name. peft is not needed here: a stub of it says which folder it was given."""
    stub = """
class AutoPeftModelForCausalLM:
    def from_pretrained(folder):
        print("merges", folder)
        return AutoPeftModelForCausalLM()
    def merge_and_unload(self):
        return self
    def save_pretrained(self, target):
        print("into", target)
"""
    (tmp_path / "peft.py").write_text(stub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("it's mine", 'a "b" $HOME `c` \\ d', "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        line = refused("verify_conversion", tmp_path / name, tmp_path / name)
        command = line.partition("give the result: ")[2].partition("; copy the tokenizer")[0]
        out = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        assert out == f"merges {tmp_path / name}\ninto MERGED\n"


@pytest.mark.parametrize("tool", TOOLS)
def test_adapters_and_quantised_weights_are_refused_by_name(models: Path, tmp_path: Path, tool: str) -> None:
    words = [word.format(model=tmp_path / "model", models=models) for word in TOOLS[tool]]
    (adapter := tmp_path / "model").mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    line = refused(tool, *words)
    assert (
        "adapter_config.json" in line and "merge_and_unload()" in line and str(adapter) in line and "tokenizer" in line
    )
    shutil.rmtree(adapter)
    shutil.copytree(models / "original", adapter)
    for method in ("gptq", "awq", "bitsandbytes", "fp8"):
        _config(quantization_config={"quant_method": method})(adapter)
        line = refused(tool, *words)
        assert "quantization_config" in line and method in line
