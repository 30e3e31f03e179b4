"""Convert a real 135M model to MLA, fine-tune it on Megatron-core, export it, compare; each step is a tool's command.

    python examples/quickstart.py OUT [MINUTES]      MINUTES: for fine-tuning, both models together (default 3)

Two caches are tried: 31.25 % and 12.5 % of the original's size, with rotary pairs, factors and each layer's share
chosen from 4096 tokens of the training text. So few tokens, and so little training, show that every stage works and in
which direction it goes; what the conversion can do with more is in docs/conversion.md.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {"-68.75 %": "0.3125", "-87.5 %": "0.125"}
"""Saved cache -> the part of the original's that is left."""
CALIBRATION = ("samples=8", "sequence_length=512")
ALLOCATION = "allocation.tokens=512"
PROBE_STEPS = 3
PROMPT = "The sun rises in the"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart_out")
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    original = out / "original"
    stages.run("get the model", "examples/get_model.py", original)
    stages.run("get the text", "examples/get_text.py", out / "text")
    stages.run("tokenise", "tools/preprocess_data.py", out / "text/train.jsonl", out / "train",
               f"tokenizer={original}", "overwrite=true")  # fmt: skip
    statistics = out / "statistics.safetensors"
    stages.run("calibrate", "tools/calibrate.py", original, out / "text/train.jsonl", statistics, *CALIBRATION,
               "overwrite=true")  # fmt: skip
    models = {"original": original}
    for saved, budget in BUDGETS.items():
        models[f"converted {saved}"] = target = out / f"mla_{budget}"
        stages.run("convert to MLA", "tools/convert_mha_to_mla.py", original, target, f"statistics={statistics}",
                   f"cache_budget={budget}", ALLOCATION, "overwrite=true")  # fmt: skip
    for saved, budget in BUDGETS.items():
        models[f"fine-tuned {saved}"] = finetune(stages, out / f"mla_{budget}", out, minutes / len(BUDGETS))
    stages.run("evaluate", "tools/evaluate_perplexity.py", *models.values(), out / "text/heldout.jsonl",
               "window=512", "max_windows=12", "dtype=float32", f"output={out / 'perplexity.json'}")  # fmt: skip
    rows = json.loads((out / "perplexity.json").read_text())["results"]
    start = time.monotonic()
    for (name, folder), row in zip(models.items(), rows, strict=True):
        row.update(name=name, text=generate(folder))
    stages.seconds["generate"] = time.monotonic() - start
    report(out, rows, stages.seconds)


class Stages:
    """Runs commands one after the other and remembers how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, stage: str, *words: Any) -> None:
        command = [sys.executable, str(ROOT / str(words[0])), *(str(word) for word in words[1:])]
        print(f"\n== {stage}\n$ python {shlex.join(str(word) for word in words)}", flush=True)
        start = time.monotonic()
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"{stage} failed: see above")
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


def finetune(stages: Stages, folder: Path, out: Path, minutes: float) -> Path:
    """Through Megatron and back: as many steps as fit into `minutes`, measured by a short run first."""
    megatron, run, exported = (folder.with_name(f"{folder.name}_{end}") for end in ("megatron", "run", "finetuned"))
    stages.run("HF -> Megatron", "tools/convert_hf_to_megatron.py", folder, megatron, "overwrite=true")
    on_gpu = torch.cuda.is_available()
    settings = {
        "load": str(megatron),
        "save": str(run),
        "micro_batch_size": 8 if on_gpu else 2,
        "global_batch_size": 16 if on_gpu else 2,
        "save_interval": 1_000_000,
        "data": {"train": str(out / "train"), "sequence_length": 1024 if on_gpu else 256},
        "optimizer": {"lr": 2e-4},
    }
    config = run.with_name(f"{run.name}.yaml")
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    steps = PROBE_STEPS
    for attempt in ("probe", "whole"):
        shutil.rmtree(run, ignore_errors=True)
        stages.run("fine-tune", "tools/finetune.py", config, f"steps={steps}")
        if attempt == "probe":
            fastest = min(json.loads(line)["seconds"] for line in (run / "log.jsonl").open())
            steps = max(12, min(1500, int(minutes * 60 / fastest)))
    stages.run("Megatron -> HF", "tools/convert_megatron_to_hf.py", run, exported, "overwrite=true")
    return exported


def generate(folder: Path) -> str:
    """What the model makes of the prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(out[0]).split())


def report(out: Path, rows: list[dict[str, Any]], seconds: dict[str, float]) -> None:
    """Print the table, write it with the sentences to report.md, and draw report.png."""
    lines = ["", f"{'model':<22} {'perplexity':>11} {'cache, bytes/token':>19} (float32)"]
    for row in rows:
        lines.append(f"{row['name']:<22} {row['perplexity']:>11.2f} {row['cache_bytes_per_token']:>19,.0f}")
    lines += ["", f"{'stage':<22} {'seconds':>11}"]
    lines += [f"{stage:<22} {spent:>11.1f}" for stage, spent in seconds.items()]
    lines += [f"{'all':<22} {sum(seconds.values()):>11.1f}", "", "greedy continuation:"]
    lines += [f"{row['name']:<22} {row['text']}" for row in rows]
    print("\n".join(lines))
    (out / "report.md").write_text("```\n" + "\n".join(lines[1:]) + "\n```\n")
    draw(out, rows)
    print(f"\n{out / 'report.png'}: loss curves, and perplexity against cache", flush=True)


def draw(out: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for saved, budget in BUDGETS.items():
        log = [json.loads(line) for line in (out / f"mla_{budget}_run" / "log.jsonl").open()]
        left.plot([step["step"] for step in log], [step["loss"] for step in log], label=f"cache {saved}")
    left.set(title="fine-tuning", xlabel="step", ylabel="training loss (nats per token)")
    left.legend()
    right.axhline(rows[0]["perplexity"], color="grey", linestyle="--", label="original")
    for kind, marker in (("converted", "o"), ("fine-tuned", "s")):
        chosen = [row for row in rows if row["name"].startswith(kind)]
        right.plot([row["cache_bytes_per_token"] / 1000 for row in chosen], [row["perplexity"] for row in chosen],
                   marker=marker, label=kind)  # fmt: skip
    right.plot(rows[0]["cache_bytes_per_token"] / 1000, rows[0]["perplexity"], marker="*", color="grey", markersize=12)
    right.set(title="held-out text", xlabel="cache, kB per token (float32)", ylabel="perplexity", yscale="log")
    right.legend()
    figure.savefig(out / "report.png", dpi=130)


if __name__ == "__main__":
    main()
