"""Fine-tuning as a user runs it: against torch on the transformers model, resumed, stopped, and every refusal."""

from __future__ import annotations

import fcntl
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.distributed import DistributedDataParallelConfig
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from mha2mla_megatron.checkpoint.megatron import LATEST, TorchDistReader, read_latest
from mha2mla_megatron.checkpoint.rotation import saved_steps
from mha2mla_megatron.data.dataset import build_dataset
from mha2mla_megatron.model.parallel import ParallelConfig, initialize_parallel, shut_down_parallel
from mha2mla_megatron.training import loop
from mha2mla_megatron.training import step as step_module
from tests.conftest import ROOT, refused, run_tool
from tests.finetune_cases import (
    BATCH,
    EOD,
    LENGTH,
    MODELS,
    VOCABULARY,
    Trap,
    checkpoint_tensors,
    checkpoint_values,
    finetune,
    log_text,
    losses,
    make_workspace,
    put_back,
    read_log,
    run_words,
    terminate_at_step_3,
    write_tokens,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 comparisons, made for the CPU")

STEPS, LR = 6, 1e-3
SCHEDULE = ("steps=6", "save_interval=3", "optimizer.warmup_steps=2", "optimizer.decay_steps=2")
LEARNING_RATES = [0, LR / 2, LR, LR, LR, LR * (1 - math.sqrt(1 / 2))]
"""Two steps up from 0, two at the peak, and the two after 4 steps at 1 - sqrt(0/2) and 1 - sqrt(1/2)."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> dict[str, Path]:
    """Model -> the root of a run of six steps."""
    return {model: finetune(workspace, model, workspace / f"{model}-run", *SCHEDULE) for model in MODELS}


def samples(prefix: Path, cache: Path, count: int, eod_mask_loss: bool = False) -> list[dict[str, torch.Tensor]]:
    """The first samples, as the training reads them."""
    dataset: Any = build_dataset(str(prefix), LENGTH, count, 1234, eod_mask_loss, EOD, VOCABULARY, cache)
    return [{key: torch.as_tensor(value) for key, value in dataset[i].items()} for i in range(count)]


def mean_loss(model: torch.nn.Module, batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """transformers' logits, torch's cross entropy, the mean over all tokens that count."""
    logits = model(torch.stack([sample["tokens"] for sample in batch])).logits
    labels, mask = (torch.stack([sample[key] for sample in batch]).flatten() for key in ("labels", "loss_mask"))
    return (torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none") * mask).sum() / mask.sum()


def check_steps(
    log: list[dict[str, Any]],
    reference: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[dict[str, torch.Tensor]],
) -> None:
    """Each step's loss and gradient norm, while `optimizer` trains transformers' model on the same samples.

    Its groups may have a `factor` of the learning rate.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step, line in enumerate(log):
        optimizer.zero_grad()
        loss = mean_loss(reference, data[step * BATCH : (step + 1) * BATCH])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # The same sums in another order; a decayed norm, a wrong clipping, a factor or a gradient forgotten shows at
        # 1e-3 after a few steps.
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5), step
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4), step
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[step] * group.get("factor", 1)
        optimizer.step()


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


@pytest.mark.parametrize("save, code", [("run", 0), ("a file/run", 2)])
def test_gives_back_the_world_that_it_joined(tmp_path: Path, workspace: Path, save: str, code: int) -> None:
    """Threads that outlive Python abort the process now and then; a world that was there before is another's."""
    shut_down_parallel()
    (tmp_path / "a file").touch()
    words = run_words(workspace, "original", tmp_path / save, *SCHEDULE)
    assert run_tool("finetune", *words, check=False).returncode == code
    assert not torch.distributed.is_initialized()
    initialize_parallel(ParallelConfig())
    assert run_tool("finetune", *words, check=False).returncode == code
    assert torch.distributed.is_initialized()


@pytest.mark.parametrize("model", MODELS)
def test_same_as_torch_on_the_transformers_model(
    tmp_path: Path, workspace: Path, unbroken: dict[str, Path], model: str
) -> None:
    """Loss and gradient norm of every step, and the learning rates: AdamW, clipping and decay of matrices alone."""
    reference = load(workspace / model)
    parameters = list(reference.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    data = samples(workspace / "text", tmp_path / "cache", STEPS * BATCH)
    log = read_log(unbroken[model])
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in log] == pytest.approx(LEARNING_RATES, rel=1e-12)
    assert [line["tokens"] for line in log] == [BATCH * LENGTH] * STEPS
    check_steps(log, reference, optimizer, data)


class Killed(Exception):
    pass


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the next run die in the step after this one."""
    done, train_step = 0, loop.train_step

    def step(*args: Any) -> Any:
        nonlocal done
        if done == steps:
            raise Killed
        done += 1
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize("model", MODELS)
def test_resumed_equals_unbroken_bit_for_bit(
    tmp_path: Path, workspace: Path, unbroken: dict[str, Path], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """Killed in the fifth step, it goes on from the third; the MLA model's in another process."""
    whole, broken = unbroken[model], tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(4, patch)
        finetune(workspace, model, broken, *SCHEDULE)
    assert read_latest(broken) == 3 and len(read_log(broken)) == 4
    with (broken / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    finetune(workspace, model, broken, *SCHEDULE, own_process=model == "mla")

    assert log_text(broken) == log_text(whole)
    before, after = checkpoint_tensors(whole, STEPS), checkpoint_tensors(broken, STEPS)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == []
    moments = [name for name in before if name.startswith("optimizer.state.exp_avg")]
    trained = [name for name in before if not name.startswith("optimizer.") and not name.endswith("rope_pairs")]
    assert len(moments) == 2 * len(trained) and all(before[name].abs().sum() > 0 for name in moments)
    assert all(not torch.equal(before[name], checkpoint_tensors(whole, 3)[name]) for name in trained)
    assert all(torch.equal(before[f"optimizer.state.param.{name}"], before[name]) for name in trained)
    values = checkpoint_values(broken, STEPS)
    assert values == checkpoint_values(whole, STEPS)
    assert values["run"].items() >= {"step": STEPS, "samples": STEPS * BATCH, "skipped": 0}.items()
    assert values["schedule"]["num_steps"] == STEPS
    assert {int(number) for number in _all_of("step", values["optimizer"])} == {STEPS}

    for root, name in ((whole, "a"), (broken, "b")):
        run_tool("convert_megatron_to_hf", root, tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    source = load_file(workspace / model / "model.safetensors")
    assert a.keys() == b.keys() == source.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [name for name in a if torch.equal(a[name], source[name])] == [n for n in a if n.endswith("rope_pairs")]
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads(
        (workspace / model / "config.json").read_text()
    )


@pytest.mark.parametrize("model", ["original", "mla"])
def test_a_buffer_of_many_buckets_is_saved_in_place(
    workspace: Path, unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """As with a model of more than 40 million parameters on a GPU: Megatron pads each of its buckets."""
    small = partial(DistributedDataParallelConfig, bucket_size=1000)
    monkeypatch.setattr(
        step_module, "DistributedDataParallelConfig", lambda **given: small(**{**given, "overlap_grad_reduce": True})
    )
    root = finetune(workspace, model, tmp_path / "run", *SCHEDULE)
    assert log_text(root) == log_text(unbroken[model])
    for step in (3, STEPS):
        one, many = checkpoint_tensors(unbroken[model], step), checkpoint_tensors(root, step)
        assert [name for name, tensor in one.items() if not torch.equal(many[name], tensor)] == []
    (root / LATEST).write_text("3")
    finetune(workspace, model, root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken[model])


def _all_of(key: str, values: Any) -> list[Any]:
    """Every value of this key in nested dicts and lists."""
    if isinstance(values, dict):
        return [v for k, value in values.items() for v in ([value] if k == key else _all_of(key, value))]
    return [v for value in values for v in _all_of(key, value)] if isinstance(values, list | tuple) else []


def test_a_trained_model_with_partial_rope_becomes_mla(
    workspace: Path, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    """The second of two stages, at full rank: the same model."""
    run_tool("convert_megatron_to_hf", unbroken["partial"], tmp_path / "trained")
    words = ["low_rank.method=joint", "low_rank.kv_lora_rank=[64,56,32,48]"]
    run_tool("convert_mha_to_mla", tmp_path / "trained", tmp_path / "mla", *words)
    data = samples(workspace / "text", tmp_path / "cache", BATCH)
    trained, mla = (mean_loss(load(tmp_path / name), data).item() for name in ("trained", "mla"))
    assert mla == pytest.approx(trained, rel=1e-5)
    assert abs(mla - losses(unbroken["partial"])[0]) > 1e-3


def test_a_finished_run_stays_as_it_is(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(unbroken["mla"], tmp_path / "run")
    finetune(workspace, "mla", root, *SCHEDULE)
    assert log_text(root) == log_text(unbroken["mla"]) and read_latest(root) == STEPS


def test_keep_last_keeps_the_newest(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """Also where a run was put back to an earlier step, or died while it wrote a later one."""
    root = shutil.copytree(unbroken["mla"], tmp_path / "run")
    (root / LATEST).write_text("3")
    finetune(workspace, "mla", root, *SCHEDULE, "save_interval=1", "steps=5", "keep_last=2")
    assert read_latest(root) == 5
    assert {"iter_0000004", "iter_0000005"} <= {p.name for p in root.glob("iter_*")}
    assert not (root / "iter_0000003").exists()


def test_sigterm_to_all_processes_saves_and_ends_well(workspace: Path, tmp_path: Path) -> None:
    """As a scheduler sends it: also to the readers of the data."""
    root, words = tmp_path / "run", ["steps=5000", "save_interval=2", "keep_last=1", "data.workers=1"]
    command = [sys.executable, str(ROOT / "tools" / "finetune.py"), *run_words(workspace, "mla", root, *words)]
    process, errors = terminate_at_step_3(command)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    stopped = read_latest(root)
    assert stopped is not None and 3 <= stopped < 5000
    assert [line["step"] for line in read_log(root)] == list(range(1, stopped + 1))
    finetune(workspace, "mla", root, *words, f"steps={stopped + 2}")
    assert [line["step"] for line in read_log(root)] == list(range(1, stopped + 3))


@pytest.mark.usefixtures("unbroken")
def test_signals_are_the_callers_again() -> None:
    """A run that has ended, well or not, no longer listens."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_eod_mask_loss_leaves_out_what_follows_a_document(workspace: Path, tmp_path: Path) -> None:
    data = samples(workspace / "text", tmp_path / "cache", BATCH, eod_mask_loss=True)
    for sample in data:
        assert torch.equal(sample["loss_mask"], (sample["tokens"] != EOD).float())
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    left_out = sum(int((sample["tokens"] == EOD).sum()) for sample in data)
    assert left_out >= BATCH
    words = ["steps=1", "data.eod_mask_loss=true", "optimizer.warmup_steps=0", "optimizer.decay_steps=1"]
    (line,) = read_log(finetune(workspace, "mla", tmp_path / "run", *words))
    assert line["tokens"] == BATCH * LENGTH - left_out
    with torch.no_grad():
        expected, unmasked = (
            mean_loss(load(workspace / "mla"), batch).item()
            for batch in (data, [{**sample, "loss_mask": torch.ones(LENGTH)} for sample in data])
        )
    assert abs(expected - unmasked) > 1e-3
    assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_blends_batches_workers_and_recomputing(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    """How a step is computed changes no result: micro batches, reading ahead, recomputed activations."""
    words = [*SCHEDULE, "micro_batch_size=4", "data.workers=1", "recompute=full", f"data.cache={tmp_path / 'cache'}"]
    root = finetune(workspace, "mla", tmp_path / "run", *words)
    assert losses(root) == pytest.approx(losses(unbroken["mla"]), rel=1e-5)
    assert (tmp_path / "cache").is_dir() and not (root / "cache").exists()
    write_tokens(tmp_path / "more", documents=20)
    (tmp_path / "blend.yaml").write_text(f"data:\n  train:\n    {workspace / 'text'}: 3\n    {tmp_path / 'more'}: 1\n")
    words = run_words(workspace, "mla", tmp_path / "blend", *SCHEDULE)
    run_tool("finetune", tmp_path / "blend.yaml", *[w for w in words[1:] if not w.startswith("data.train")])
    assert len(losses(tmp_path / "blend")) == STEPS


def test_bfloat16_is_near_float32(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    root = finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, "dtype=bfloat16")
    assert losses(root) == pytest.approx(losses(unbroken["mla"]), rel=2e-2)
    assert losses(root) != losses(unbroken["mla"])


BAD_WORDS: dict[str, tuple[list[str], list[str]]] = {
    "kv heads by TP": (["parallel.tensor_model_parallel_size=4"], ["4", "num_key_value_heads 2", "1, 2"]),
    "PP in one process": (["parallel.pipeline_model_parallel_size=2"], ["1 processes", "2"]),
    "layers by PP": (["parallel.pipeline_model_parallel_size=3"], ["3", "num_hidden_layers 4"]),
    "global batch": (["global_batch_size=3"], ["global_batch_size", "3", "micro_batch_size 2"]),
    "no data": (["data.train=/nowhere/text"], ["/nowhere/text.bin", "no such file"]),
    "context": (["data.sequence_length=129"], ["sequence_length", "129", "128"]),
    "no checkpoint": (["load={workspace}/original"], ["{workspace}/original", "not a Megatron checkpoint"]),
    "nothing to load": (["load=/nowhere"], ["/nowhere", "not a Megatron checkpoint"]),
    "unknown key": (["optimizer.learning_rate=1"], ["optimizer.learning_rate", "lr", "min_lr"]),
    "schedule": (["optimizer.warmup_steps=4", "optimizer.decay_steps=3"], ["warmup_steps 4", "decay_steps 3", "6"]),
    "load unset": (["load=null"], ["load", "not set"]),
    "save unset": (["save=null"], ["save", "not set"]),
    "data unset": (["data.train=null"], ["data.train", "not set"]),
    "style": (["optimizer.decay_style=step"], ["decay_style", "step", "minus_sqrt"]),
    "rates": (["optimizer.min_lr=1"], ["min_lr", "1", "lr"]),
    "infinite rate": (["optimizer.lr=.inf"], ["optimizer.lr", "inf"]),
    "first moment": (["optimizer.adam_beta1=1"], ["adam_beta1", "1.0", "less than 1"]),
    "second moment": (["optimizer.adam_beta2=.nan"], ["adam_beta2", "nan", "less than 1"]),
    "epsilon": (["optimizer.adam_eps=0"], ["adam_eps", "0.0", "positive"]),
    "weight decay": (["optimizer.weight_decay=-0.1"], ["weight_decay", "-0.1", "at least 0"]),
    "clipping": (["optimizer.clip_grad=.nan"], ["clip_grad", "nan", "at least 0"]),
    "seed": (["seed=-1"], ["seed", "-1", "4294967295"]),
    "large seed": (["seed=4294967296"], ["seed", "4294967296", "4294967295"]),
    "steps": (["steps=0"], ["steps", "0"]),
    "type": (["steps=many"], ["steps", "many"]),
    "dtype": (["dtype=int8"], ["dtype", "int8", "bfloat16"]),
    "engine": (["implementation=transformer_engine"], ["transformer_engine", "GPU"]),
    "8 bits": (["fp8=delayed"], ["fp8", "transformer_engine", "local", "null"]),
    "8 bits how": (["fp8=mxfp8"], ["fp8", "mxfp8", "delayed", "current"]),
    "latent": (["recompute=latent"], ["recompute", "latent", "fused path", "selective"]),
    "graph": (["cuda_graph=true"], ["cuda_graph", "GPU", "cpu", "false"]),
    "graph and gather": (["cuda_graph=true", "parallel.overlap_param_gather=true"], ["overlap_param_gather", "false"]),
    "graph of a pipeline": (
        ["cuda_graph=true", "parallel.pipeline_model_parallel_size=2"],
        ["pipeline_model_parallel_size", "2", "valid: 1"],
    ),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_settings_are_refused(tmp_path: Path, workspace: Path, case: str) -> None:
    words, named = BAD_WORDS[case]
    words = [word.format(workspace=workspace) for word in words]
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "run", "steps=6", *words))
    assert all(part.format(workspace=workspace) in line for part in named), line
    assert list(tmp_path.iterdir()) == [], "something was written"


def test_nothing_in_a_loaded_checkpoint_is_executed(tmp_path: Path, workspace: Path) -> None:
    """Not even where it would have to be a pickle: the values beside the tensors."""
    checkpoint = shutil.copytree(workspace / "mla-megatron", tmp_path / "checkpoint")
    step, trap = checkpoint / "iter_0000000", io.BytesIO()
    torch.save([Trap(tmp_path / "sprung")], trap, _use_new_zipfile_serialization=False)
    (values,) = (info for key, info in TorchDistReader(step).storage.items() if key.fqn.startswith("common_state"))
    content = bytearray((step / values.relative_path).read_bytes())
    assert len(trap.getvalue()) <= values.length
    content[values.offset : values.offset + len(trap.getvalue())] = trap.getvalue()
    (step / values.relative_path).write_bytes(content)
    finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, f"load={checkpoint}")
    assert not (tmp_path / "sprung").exists()


def test_data_of_another_model_is_refused(tmp_path: Path, workspace: Path) -> None:
    words = run_words(workspace, "mla", tmp_path / "run", "steps=6", f"data.train={tmp_path / 'text'}")
    write_tokens(tmp_path / "text")
    (tmp_path / "text.json").write_text(json.dumps({"vocab_size": VOCABULARY + 1}))
    line = refused("finetune", *words)
    assert "257" in line and "256" in line and "data.train" in line
    (tmp_path / "text.json").write_text(json.dumps({"vocab_size": VOCABULARY, "documents": 61}))
    line = refused("finetune", *words)
    assert "text.json: says 61 documents" in line and "has 60" in line and "not made together" in line
    (tmp_path / "text.json").write_text("{")
    assert "text.json" in refused("finetune", *words)
    (tmp_path / "text.json").unlink()
    (tmp_path / "text.bin").unlink()
    assert "text.bin" in refused("finetune", *words)
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, workspace: Path) -> None:
    """Where nothing beside the file says what it was made with."""
    write_tokens(tmp_path / "text", vocabulary=4 * VOCABULARY)
    words = run_words(workspace, "mla", tmp_path / "run", "steps=6", f"data.train={tmp_path / 'text'}")
    line = refused("finetune", *words)
    assert "data.train" in line and "256" in line


@pytest.mark.parametrize(
    ("dtype", "tokens", "named"),
    [
        (numpy.int32, [3, -1, 4], "odd.bin: holds token -1, the model's vocabulary is 256"),
        (numpy.float32, [3, 4, 5], "odd.idx: holds numbers of type float32, no tokens"),
        (numpy.uint16, [], "odd.bin: holds no token"),
    ],
)
def test_files_that_hold_no_tokens_of_a_model_are_refused(
    tmp_path: Path, workspace: Path, dtype: Any, tokens: list[int], named: str
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "odd.bin"), dtype=dtype)
    builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "odd.idx"))
    assert named in refused("finetune", *run_words(workspace, "mla", tmp_path / "run", f"data.train={tmp_path}/odd"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["eod_mask_loss", "reset_attention_mask"])
@pytest.mark.parametrize(
    ("eos", "named"),
    [
        ([7, 9], "text: documents end with token 2, the model's eos token is 7"),
        ([], "config.json: eos_token_id [] is no token"),
        ("</s>", "config.json: eos_token_id '</s>' is no token"),
        (None, "config.json: eos_token_id None is no token"),
    ],
)
def test_ends_of_documents_that_are_not_the_models_are_refused(
    workspace: Path, tmp_path: Path, eos: Any, named: str, key: str
) -> None:
    """Else nothing would be masked. Where no .json says how documents end, all of them are looked at."""
    load = shutil.copytree(workspace / "mla-megatron", tmp_path / "model")
    config = json.loads((load / "hf" / "config.json").read_text())
    (load / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, f"load={load}", f"data.{key}=true")
    assert named in refused("finetune", *words)
    assert not (tmp_path / "run").exists()


def test_of_several_eos_tokens_the_texts_counts(workspace: Path, tmp_path: Path) -> None:
    """As chat models have them: the run is that of a model with this one alone."""
    logs = []
    for name, eos in (("one", 2), ("several", [7, 2, 9])):
        load = shutil.copytree(workspace / "mla-megatron", tmp_path / name)
        config = json.loads((load / "hf" / "config.json").read_text())
        (load / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        words = [*SCHEDULE, f"load={load}", "data.eod_mask_loss=true"]
        logs.append(log_text(finetune(workspace, "mla", tmp_path / f"run-{name}", *words)))
    assert logs[0] == logs[1]


def test_two_runs_do_not_index_samples_at_once(workspace: Path, tmp_path: Path) -> None:
    """Megatron would read what the other one has not finished."""
    cache = tmp_path / "cache"
    cache.mkdir()
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, f"data.cache={cache}")
    with (cache / ".lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        command = [sys.executable, str(ROOT / "tools" / "finetune.py"), *words]
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert run.stderr is not None
        line = next(line for line in run.stderr if line.startswith("data.cache"))
        assert line == f"data.cache: {cache}: another run is indexing samples there; waiting for it\n"
        assert not list(cache.glob("*.npy")) and run.poll() is None
    assert run.communicate()[1] is not None and run.returncode == 0
    assert list(cache.glob("*.npy"))


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_damaged_token_files_are_refused(tmp_path: Path, workspace: Path, damage: str) -> None:
    index = write_tokens(tmp_path / "text").with_name("text.idx")
    index.write_bytes(index.read_bytes()[:100] if damage == "truncated" else b"no index at all" * 20)
    words = run_words(workspace, "mla", tmp_path / "run", "steps=6", f"data.train={tmp_path / 'text'}")
    assert "text.idx" in refused("finetune", *words)
    assert not (tmp_path / "run").exists()


def test_a_root_of_another_model_is_refused(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    for held, given in (("original", "mla"), ("mla", "original"), ("partial", "mla")):
        root = shutil.copytree(unbroken[held], tmp_path / held)
        before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
        line = refused("finetune", *run_words(workspace, given, root, *SCHEDULE))
        assert str(root) in line and "decoder.layers." in line, line
        assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_a_model_without_a_run_is_not_resumed(workspace: Path) -> None:
    root = workspace / "mla-megatron"
    line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert f"save: {root} holds the weights of a model and no run" in line and f"load={root}" in line


def test_a_model_of_hf_is_no_run(workspace: Path, tmp_path: Path) -> None:
    """Checkpoints beside its weights would make it look like what came of the run."""
    root = shutil.copytree(workspace / "mla", tmp_path / "hf")
    before = sorted(root.iterdir())
    line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert f"save: {root}: holds a Hugging Face model (model.safetensors)" in line
    assert sorted(root.iterdir()) == before


def test_steps_that_the_run_has_done(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(unbroken["mla"], tmp_path / "run")
    log = (root / "log.jsonl").read_bytes()
    line = refused("finetune", *run_words(workspace, "mla", root, *SCHEDULE, "steps=4"))
    assert f"steps: 4, but {root} is at step 6; valid: 6 or more" in line
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert "step 6 was the last one" in done.stdout and (root / "log.jsonl").read_bytes() == log


def test_tensorboard_of_a_resumed_run_has_every_step_once(
    workspace: Path, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    """Also the step that it was resumed from; those after it, which were lost, are there as they were taken anew."""
    root = put_back(unbroken["mla"], tmp_path / "run", 3)
    finetune(workspace, "mla", root, *SCHEDULE)
    board = EventAccumulator(str(root / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(losses(root), start=1)
    ]  # float32


@pytest.mark.parametrize("damage", [b"no JSON\n", b"{}\n", b"[1]\n", b'{"step": "2"}\n', b"\xff\0\xc2\x85\n"])
def test_a_damaged_line_of_the_log_does_not_end_the_run(
    workspace: Path, unbroken: dict[str, Path], tmp_path: Path, damage: bytes
) -> None:
    root = put_back(unbroken["mla"], tmp_path / "run", 3)
    lines = (root / "log.jsonl").read_bytes().splitlines(keepends=True)
    (root / "log.jsonl").write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    assert "log.jsonl: line 3 is not one of" in refused("plot_run", root, tmp_path / "picture.png")
    done = run_tool("finetune", *run_words(workspace, "mla", root, *SCHEDULE))
    assert "log.jsonl: damaged lines are left out: 1, the first of them line 3" in done.stderr
    assert log_text(root) == log_text(unbroken["mla"])


def test_a_step_that_predicts_no_token(workspace: Path, tmp_path: Path) -> None:
    """Of documents of nothing but ends, with data.eod_mask_loss. Such a loss is no number, in validation too."""
    builder = IndexedDatasetBuilder(str(tmp_path / "ends.bin"), dtype=numpy.uint16)
    for _ in range(100):
        builder.add_document(torch.full((4,), EOD), [4])
    builder.finalize(str(tmp_path / "ends.idx"))
    ends = f"data.train={tmp_path / 'ends'}", "data.eod_mask_loss=true"
    line = refused("finetune", *run_words(workspace, "mla", tmp_path / "stopped", *SCHEDULE, *ends))
    assert "step 1: loss nan" in line
    words = "data.eod_mask_loss=true", f"validation.data={tmp_path / 'ends'}", "validation.samples=2"
    log = read_log(finetune(workspace, "mla", tmp_path / "run", *SCHEDULE, *words))
    assert log[-1]["validation_loss"] is None and log[-2]["loss"] > 0


@pytest.mark.parametrize(("held", "said"), [("original", "mla"), ("mla", "original"), ("mla", "partial")])
def test_weights_of_another_model_are_refused(workspace: Path, tmp_path: Path, held: str, said: str) -> None:
    """A converted model's tensors under an original model's config.json, and the reverse."""
    checkpoint = shutil.copytree(workspace / f"{held}-megatron", tmp_path / "checkpoint")
    shutil.copy(workspace / f"{said}-megatron" / "hf" / "config.json", checkpoint / "hf" / "config.json")
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE, f"load={checkpoint}")
    line = refused("finetune", *words)
    assert str(checkpoint) in line and "decoder.layers.0." in line, line
    assert not (tmp_path / "run" / "hf").exists() and saved_steps(tmp_path / "run") == []


def test_a_broken_root_is_refused(workspace: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    words = run_words(workspace, "mla", tmp_path / "run", *SCHEDULE)
    root = shutil.copytree(unbroken["mla"], tmp_path / "run")
    (root / LATEST).write_text("soon")
    assert LATEST in refused("finetune", *words)
    (root / LATEST).write_text("4")
    assert "iter_0000004" in refused("finetune", *words)
    (root / LATEST).write_text("3")
    data = next((root / "iter_0000003").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    assert "iter_0000003" in refused("finetune", *words)
