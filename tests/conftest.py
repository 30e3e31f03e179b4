"""Shared fixtures: tiny random models on disk, and the folder of packaged real data where present."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mha2mla_megatron import errors

ROOT = Path(__file__).resolve().parents[1]


def load_script(file: Path) -> Any:
    """A script that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location("_".join(file.relative_to(ROOT).with_suffix("").parts), file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(
    tool: str, *words: object, check: bool = True, own_process: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run tools/<tool>.py with these words, as a user does.

    In this process by default, because importing torch for each of hundreds of runs takes longer than all of them.
    """
    file, argv = ROOT / "tools" / f"{tool}.py", [str(word) for word in words]
    if own_process:
        done = subprocess.run([sys.executable, str(file), *argv], capture_output=True, text=True, cwd=ROOT)
    else:
        module = load_script(file)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                errors.run_tool(module.main, argv)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        done = subprocess.CompletedProcess([str(file), *argv], code, out.getvalue(), err.getvalue())
    if check and done.returncode != 0:
        raise AssertionError(f"{tool} failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def refused(tool: str, *words: object, own_process: bool = False) -> str:
    """Run a tool on bad input; return its one line, after checking that it is one line and that the exit code is 2."""
    done = run_tool(tool, *words, check=False, own_process=own_process)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def start_cases(module: str, *words: object, **environment: str) -> subprocess.Popen[str]:
    """Start tests/<module>.py with these words: kernels need a process of their own to be interpreted in."""
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.{module}", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def children(process: int, words: str) -> list[int]:
    """The processes that this one started with these words in their command lines."""
    found = subprocess.run(["pgrep", "-P", str(process), "-f", words], stdout=subprocess.PIPE, text=True)
    return [int(pid) for pid in found.stdout.split()]


def run_cases_in_eight_processes(module: str, count: int) -> None:
    """`count` random cases of tests/<module>.py for each of the seeds 0 to 7, at once: most of their time goes into
    compiling a kernel for each shape, on one core."""
    running = [start_cases(module, count, seed) for seed in range(8)]
    for out, err in [process.communicate() for process in running]:
        assert out == f"{count} cases\n", out + err


def make_llama(
    folder: Path, *, groups: int = 2, tied: bool = True, bias: bool = False, seed: int = 0, **changes: object
) -> Path:
    """A tiny random float32 Llama on disk: 3 layers, h 64, H 4, d 16, vocabulary 256; initialised widely enough that
    attention is far from uniform, so that a mistake in it shows in the logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=16, max_position_embeddings=128, tie_word_embeddings=tied,
        attention_bias=bias, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=changes.pop("max_shard_size", "5GB"))
    return folder


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Listen to SIGINT as on a terminal: a shell that starts the tests in the background turns it off for them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_world_left() -> Iterator[None]:
    """Give a world back that tests joined: gloo's threads may abort a process that ends before them."""
    yield
    if torch.distributed.is_initialized():
        from mha2mla_megatron.model.parallel import shut_down_parallel

        shut_down_parallel()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


PROSE = (
    "The tide had gone out before the lamps were lit, and the harbour lay open to the wind. ",
    "Nobody at the station remembered when the last train had stopped there, nor why it had. ",
    "A good map says less than its maker knew; a better one says what the traveller needs. ",
    "She counted the bridges twice: seven over the river, five over the canal, one over nothing. ",
    "Rain fell on the orchard all night, and in the morning every branch held a row of small lamps. ",
    "Whoever wrote this ledger kept two kinds of figures, those which were true and those which could be checked. ",
)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of PROSE, four times over."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(PROSE * 4))
    return file


def make_tokenizer(folder: Path, vocab_size: int = 256, alphabet: str = "", **changes: object) -> Path:
    """A byte-level BPE tokenizer trained on PROSE, saved into `folder`: ids 0 to 2 are <unk>, <bos> and <eos>.

    Characters that neither PROSE nor `alphabet` has are <unk>. changes: arguments of PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<unk>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokens = {f"{token.strip('<>')}_token": token for token in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, **changes}).save_pretrained(folder)
    return folder


def make_pair(folder: Path) -> tuple[Path, Path]:
    """A tiny Llama with a tokenizer, and its conversion (joint latents): folder/original, folder/mla."""
    original = make_tokenizer(make_llama(folder / "original"))
    words = ["partial_rope.qk_rope_head_dim=8", "low_rank.method=joint", "low_rank.kv_lora_rank=20"]
    run_tool("convert_mha_to_mla", original, folder / "mla", *words)
    return original, folder / "mla"
