"""Conversions by several ranks: the bytes of a single process, whatever ends one of them."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mha2mla_megatron.attention_converter import AttentionConverter, ConvertedAttention
from mha2mla_megatron.checkpoint.resume import JOURNAL, PartialFolder
from mha2mla_megatron.hf.layout_mha2mla import LatentLayout
from tests.conftest import PROSE, make_llama, make_tokenizer, run_tool
from tests.forks import exit_codes, fork
from tests.kill_conversion import contents

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares bits, made for the CPU")

SHARDS = ["max_shard_size=100KB"]
PLAIN = ["partial_rope.qk_rope_head_dim=4", "low_rank.method=joint", "low_rank.kv_lora_rank=20", *SHARDS]


@dataclass
class Case:
    """A conversion: its command, whose DST is `name` in the folder at hand, and the files that one process makes."""

    name: str
    tool: str
    source: Path
    words: list[str]
    expected: dict[str, bytes] = field(default_factory=dict)


def start(
    folder: Path, size: int, *cases: Case, rank: int | None = None, fault: Callable[[], None] | None = None
) -> list[int]:
    """Start `size` ranks, which run the cases; returns what `exit_codes` does. What they say is in folder/log.RANK.

    fault: called first on that rank; rank None: on all. A function of this module, or a partial of one.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    faults = [fault if rank in (None, number) else None for number in range(size)]
    return exit_codes([fork(_work, folder, number, size, port, cases, faults[number]) for number in range(size)])


def _work(
    folder: Path, rank: int, size: int, port: int, cases: Sequence[Case], fault: Callable[[], None] | None
) -> None:
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )  # fmt: skip
        if fault is not None:
            fault()
        code = _run(folder, rank, cases)
    except BaseException:
        (folder / f"log.{rank}").write_text(traceback.format_exc())
    os._exit(code)


def _run(folder: Path, rank: int, cases: Sequence[Case]) -> int:
    if len(cases) > 1:  # in one process group, which takes longer to start than all of them
        torch.distributed.init_process_group("gloo")
    log = ""
    for case in cases:
        done = run_tool(case.tool, case.source, folder / case.name, *case.words, check=False)
        log += done.stdout + done.stderr
        (folder / f"log.{rank}").write_text(log)
        if done.returncode:
            return done.returncode
    return 0


def logs(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("log.*"))]


def errors(folder: Path) -> list[str]:
    return [line for log in logs(folder) for line in log.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Five layers, which neither two nor three ranks can share evenly."""
    root = tmp_path_factory.mktemp("ranks")
    model = make_tokenizer(make_llama(root / "model", num_hidden_layers=5, bias=True))
    (root / "text.txt").write_text("\n".join(PROSE * 4))
    file = root / "statistics.safetensors"
    run_tool("calibrate", model, root / "text.txt", file, "samples=4", "sequence_length=32", "stored_samples=4")
    statistics = f"statistics={file}"
    cases = [
        Case("plain", "convert_mha_to_mla", model, PLAIN),
        Case("statistics", "convert_mha_to_mla", model, [*PLAIN, statistics, "dtype=bfloat16"]),
        Case("budget", "convert_mha_to_mla", model, [statistics, "cache_budget=0.5", *SHARDS]),
        Case("megatron", "convert_hf_to_megatron", root / "plain", []),
        Case("straight", "convert_mha_to_mla", model, [*PLAIN, "ckpt_format=torch_dist"]),
        Case("exported", "convert_megatron_to_hf", root / "megatron", SHARDS),
    ]
    assert start(root, 1, *cases) == [0], logs(root)
    return {case.name: replace(case, expected=contents(root / case.name)) for case in cases}


@pytest.mark.parametrize("size", [2, 3])
def test_same_bytes_as_one_process(cases: dict[str, Case], tmp_path: Path, size: int) -> None:
    assert start(tmp_path, size, *cases.values()) == [0] * size, logs(tmp_path)
    for name, case in cases.items():
        found = contents(tmp_path / name)
        assert found.keys() == case.expected.keys()
        assert [file for file in found if found[file] != case.expected[file]] == [], name
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("log.")} == {*cases}
    assert [bool(log) for log in logs(tmp_path)] == [True] + [False] * (size - 1), "rank 0 speaks for all"


def read_late() -> None:
    """What the other ranks do meanwhile is in the journal too by then."""
    read = PartialFolder._read

    def reading(self: PartialFolder) -> None:
        time.sleep(0.5)
        read(self)

    PartialFolder._read = reading  # type: ignore[method-assign]


def test_ranks_that_read_the_journal_late_share_the_same_work(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["budget"]
    assert start(tmp_path, 2, case, rank=1, fault=read_late) == [0, 0], logs(tmp_path)
    assert contents(tmp_path / case.name) == case.expected


def note_layers(folder: Path) -> None:
    """The layers that a rank converts, into folder/rankN."""
    convert = AttentionConverter.convert

    def noting(self: AttentionConverter, layer: int, layout: LatentLayout) -> ConvertedAttention:
        with (folder / f"rank{os.environ['RANK']}").open("a") as file:
            file.write(f"{layer} ")
        return convert(self, layer, layout)

    AttentionConverter.convert = noting  # type: ignore[method-assign]


def test_the_layers_are_shared_out(cases: dict[str, Case], tmp_path: Path) -> None:
    """Each rank converts some, in turn, and none is converted twice."""
    assert start(tmp_path, 3, cases["plain"], fault=partial(note_layers, tmp_path)) == [0, 0, 0], logs(tmp_path)
    assert [file.read_text() for file in sorted(tmp_path.glob("rank?"))] == ["0 3 ", "1 4 ", "2 "]


def die_at(part: int) -> None:
    """Ends the process in the place of recording its n-th part."""
    finish, count = PartialFolder.finish, 0

    def dying(self: PartialFolder, *args: object) -> None:
        nonlocal count
        count += 1
        if count == part:
            self.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, *args)

    PartialFolder.finish = dying  # type: ignore[method-assign]


@pytest.mark.parametrize(("name", "rank"), [("budget", 0), ("megatron", 2)])
def test_a_killed_rank_leaves_what_any_number_can_go_on_from(
    cases: dict[str, Case], tmp_path: Path, name: str, rank: int
) -> None:
    case = cases[name]
    codes = start(tmp_path, 3, case, rank=rank, fault=partial(die_at, 4))
    assert codes == [-signal.SIGKILL if other == rank else 2 for other in range(3)], logs(tmp_path)
    assert len(errors(tmp_path)) == 2
    for line in errors(tmp_path):
        assert "another process has died" in line and line.endswith("the same command goes on from there")
    assert not (tmp_path / name).exists()
    assert (tmp_path / f".{name}.partial" / JOURNAL).read_bytes().count(b"\n") > 3
    size = 2 if rank else 1
    assert start(tmp_path, size, case) == [0] * size, logs(tmp_path)
    assert "checking what is there" in logs(tmp_path)[0]
    assert contents(tmp_path / name) == case.expected
    assert not (tmp_path / f".{name}.partial").exists()


def test_what_one_rank_is_refused_ends_all_with_one_line(cases: dict[str, Case], tmp_path: Path) -> None:
    """A number that is not finite, in the statistics of a layer that the last rank converts."""
    case, broken = cases["statistics"], tmp_path / "broken.safetensors"
    shutil.copy(next(word.removeprefix("statistics=") for word in case.words if "statistics=" in word), broken)
    tensors = load_file(broken)
    next(tensor for name, tensor in tensors.items() if name.startswith("layers.2.")).view(-1)[0] = float("nan")
    with safe_open(broken, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, broken, metadata)
    words = [word for word in case.words if "statistics=" not in word]
    codes = start(tmp_path, 3, replace(case, words=[*words, f"statistics={broken}"]))
    assert codes == [2, 2, 2] and len(errors(tmp_path)) == 1, logs(tmp_path)
    assert "broken.safetensors: layers.2." in errors(tmp_path)[0]
    assert not list(tmp_path.glob("*statistics*")), "something was left"


def small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_disk_that_is_full_for_one_rank(cases: dict[str, Case], tmp_path: Path) -> None:
    """The rank's limit is on the length of a file: the shards' ends are beyond it."""
    case = cases["plain"]
    assert start(tmp_path, 2, case, rank=1, fault=small_files) == [2, 2], logs(tmp_path)
    assert len(errors(tmp_path)) == 1 and logs(tmp_path)[0].endswith(f"{errors(tmp_path)[0]}\n"), logs(tmp_path)
    assert "File too large" in errors(tmp_path)[0]
    assert errors(tmp_path)[0].endswith("with more room the same command goes on from there")
    assert not (tmp_path / "plain").exists()
    assert start(tmp_path, 2, case) == [0, 0], logs(tmp_path)
    assert contents(tmp_path / "plain") == case.expected


def on_two_machines() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"


def test_refused_by_all_with_one_line(cases: dict[str, Case], tmp_path: Path) -> None:
    def refused(case: Case, fault: Callable[[], None] | None = None) -> str:
        assert start(tmp_path, 2, case, fault=fault) == [2, 2] and logs(tmp_path)[1] == ""
        (line,) = errors(tmp_path)
        return line

    budget, plain = cases["budget"], cases["plain"]
    assert "heal.steps=2" in refused(replace(budget, words=[*budget.words, "heal.steps=2"]))
    line = refused(plain, fault=on_two_machines)
    assert "2 processes, 1 of them on this machine" in line
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "mine").write_text("mine")
    assert "exists and is not empty" in refused(plain)
    for tool in ("import_mha2mla", "export_deepseek"):
        assert f"{tool}.py runs in one process" in refused(Case("single", tool, plain.source, []))
    assert not list(tmp_path.glob(".*.partial"))
