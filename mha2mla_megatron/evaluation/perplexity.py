"""Perplexity of Hugging Face models on one text: the same tokens and the same windows for all of them.

The text is tokenised once, without special tokens, and cut into windows of N tokens that do not overlap; what is left
at the end is dropped. In each window the tokens 2 to N are predicted from those before them in the window, so that a
text of w windows has w (N - 1) predictions. perplexity = exp(mean negative log-likelihood of all predictions). With
bos=true a BOS token stands before each window; the tokens predicted stay the same.

The standard error treats windows as independent samples (tokens within one are not): the standard deviation of the
windows' means over sqrt(w), times the perplexity (the derivative of exp).

Shape letters: w windows, N tokens in a window, b windows in a batch, t = N (or N + 1 with BOS), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mha2mla_megatron.checkpoint.causal_lm import load_causal_lm, loading, pick_device
from mha2mla_megatron.checkpoint.folders import resolve_model
from mha2mla_megatron.data.documents import read_text
from mha2mla_megatron.data.tokenizer import load_tokenizer
from mha2mla_megatron.errors import UserError, require_at_least, require_one_of
from mha2mla_megatron.evaluation.cache import cache_bytes, cache_bytes_per_token
from mha2mla_megatron.evaluation.cached_perplexity import KINDS, check_options, make_cache, window_nll_through
from mha2mla_megatron.evaluation.table import format_table
from mha2mla_megatron.files import new_files, write_json
from mha2mla_megatron.progress import Progress
from mha2mla_megatron.settings import to_dict

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def check_windows(window: int, max_windows: int | None, batch_size: int, dtype: str, device: str) -> None:
    """Refuse bad values of the settings of every tool that runs models over windows of a text."""
    require_at_least("window", window, 2)
    if max_windows is not None:
        require_at_least("max_windows", max_windows, 1)
    require_at_least("batch_size", batch_size, 1)
    require_one_of("dtype", dtype, tuple(DTYPES))
    pick_device(device)


@dataclass(frozen=True)
class PerplexitySettings:
    """Settings of tools/evaluate_perplexity.py."""

    window: int = 1024
    """N, tokens in a window."""

    max_windows: int | None = None
    """Use only the first so many windows of the text. null: all of them."""

    batch_size: int = 4
    """Windows in a forward pass."""

    dtype: str = "auto"
    """Type of the weights: auto (as they are stored), float32 or bfloat16. The cross entropy is float32 always."""

    device: str = "auto"
    """Where the models run: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."""

    bos: bool | None = None
    """true: put the tokenizer's BOS token before each window."""

    cache: str | None = None
    """Attend through a cache, in chunks: full, int8, int4, int2 (converted models), hqq8, hqq4, hqq2, quanto4, quanto2.
    null: no cache."""

    cache_chunk: int = 32
    """Tokens fed at a time if `cache` is set."""

    cache_options: dict[str, int] = field(default_factory=dict)
    """Settings of that cache, such as residual_length, group_size and rope_nbits (int) or q_group_size and axis_key
    (hqq, quanto)."""

    output: str | None = None
    """A JSON file for the results, replaced if it exists."""

    def __post_init__(self) -> None:
        check_windows(self.window, self.max_windows, self.batch_size, self.dtype, self.device)
        require_at_least("cache_chunk", self.cache_chunk, 1)
        if self.cache is not None:
            require_one_of("cache", self.cache, KINDS)
        check_options([self.cache], self.cache_options)


@dataclass(frozen=True)
class PerplexityResult:
    """One model's figures."""

    model: str

    perplexity: float

    perplexity_standard_error: float | None
    """None for a single window."""

    nll: float
    """Mean negative log-likelihood of a token, in nats."""

    nll_standard_error: float | None

    tokens: int
    """Predicted tokens, w (N - 1)."""

    cache_bytes_per_token: float

    cache_bytes_per_sequence: int
    """Of a window of N tokens. With `cache`, this and the bytes per token are those of all that the cache stores after
    a whole window (BOS included): codes, scales, zeros and the tokens still in full precision."""

    dtype: str


def evaluate_perplexity(models: Sequence[str], text: Path, settings: PerplexitySettings) -> list[PerplexityResult]:
    """The perplexity of each model (folder or hub id) on a text file or the `text` fields of a .jsonl[.gz].

    A converted model runs the code in its folder. Writes `settings.output` if that is set. Raises UserError for bad
    input; what can be found without reading weights is found before any are read.
    """
    outputs = [] if settings.output is None else [Path(settings.output)]
    with new_files(outputs, overwrite=True) as scratch:
        content = read_text(text)
        folders = {model: resolve_model(model) for model in models}
        windows = cut_windows(content, folders, text, settings)
        for model, folder in folders.items():
            check_config(model, folder, windows, settings)
        results = [_evaluate(model, folder, windows, settings) for model, folder in folders.items()]
        for file in scratch:
            report = {
                "text": str(text),
                "text_sha256": hashlib.sha256(content.encode("utf-8")).hexdigest(),
                "windows": len(windows),
                "settings": to_dict(settings),
                "results": [dataclasses.asdict(result) for result in results],
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            }
            write_json(file, report)
    return results


def encode_text(content: str, folders: dict[str, Path]) -> tuple[Any, list[int]]:
    """(the first model's tokenizer, the text in its tokens, without special ones).

    Raises UserError where another model's tokenizer gives other tokens.
    """
    first: Any = None
    ids: list[int] = []
    for model, folder in folders.items():
        tokenizer = load_tokenizer(folder, trust_remote_code=True)
        other: list[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[assignment]
        if first is None:
            first, ids = tokenizer, other
        elif other != ids:
            pairs = enumerate(zip(ids, other, strict=False))
            at = next((i for i, (token, its) in pairs if token != its), min(len(ids), len(other)))
            name = next(iter(folders))
            raise UserError(f"{model}: its tokenizer gives other tokens than that of {name}, from token {at} on")
    return first, ids


def cut_windows(content: str, folders: dict[str, Path], text: Path, settings: PerplexitySettings) -> torch.Tensor:
    """The text as int64 [w, t], in the tokens of the first model.

    Raises UserError where another model's tokenizer gives other tokens, or the text has not one window.
    """
    tokenizer, ids = encode_text(content, folders)
    count = len(ids) // settings.window
    if count == 0:
        raise UserError(f"{text}: {len(ids)} tokens, fewer than a window of {settings.window}")
    count = min(count, settings.max_windows or count)
    windows = torch.tensor(ids[: count * settings.window], dtype=torch.long).view(count, settings.window)
    if not settings.bos:
        return windows
    if tokenizer.bos_token_id is None:
        raise UserError(f"{next(iter(folders))}: bos=true, but its tokenizer has no bos_token")
    return F.pad(windows, (1, 0), value=tokenizer.bos_token_id)


def window_nll(model: Any, windows: torch.Tensor, predicted: int) -> torch.Tensor:
    """Summed negative log-likelihood, in nats, of the last `predicted` tokens of each window.

    windows: int64 [b, t], on the model's device. Returns float64 [b] on the CPU.
    """
    with torch.inference_mode():
        logits = model(input_ids=windows, use_cache=False).logits  # [b, t, V]
        # One window at a time: the float32 logits of a whole batch would take most of the memory.
        sums = [
            F.cross_entropy(row[-predicted - 1 : -1].float(), ids[-predicted:], reduction="none").double().sum()
            for row, ids in zip(logits, windows, strict=True)
        ]
        return torch.stack(sums).cpu()


def format_results(results: Sequence[PerplexityResult]) -> str:
    """The results as an aligned table."""
    rows = [
        (
            result.model,
            f"{result.perplexity:.4f}",
            "-" if result.perplexity_standard_error is None else f"{result.perplexity_standard_error:.4f}",
            str(result.tokens),
            f"{result.cache_bytes_per_token:.12g}",
        )
        for result in results
    ]
    return format_table(("model", "perplexity", "std. error", "tokens", "cache bytes/token"), rows)


def read_config(model: str, folder: Path) -> Any:
    """The text model's transformers config. Raises UserError, naming the model, where there is none."""
    from transformers import AutoConfig

    with loading(model):
        return AutoConfig.from_pretrained(folder, trust_remote_code=True).get_text_config()


def check_config(model: str, folder: Path, windows: torch.Tensor, settings: PerplexitySettings) -> None:
    """Raise UserError if the model cannot take the windows or the cache. windows: int64 [w, t]."""
    config = read_config(model, folder)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and windows.shape[1] > limit:
        raise UserError(
            f"{model}: window: {windows.shape[1]} tokens (BOS included) are more than the model's "
            f"max_position_embeddings {limit}"
        )
    largest = int(windows.max())
    if largest >= config.vocab_size:
        raise UserError(f"{model}: token id {largest} of the text is beyond the model's vocabulary {config.vocab_size}")
    if settings.cache is not None:
        make_cache(model, config, settings.cache, settings.cache_options)


def _evaluate(model_name: str, folder: Path, windows: torch.Tensor, settings: PerplexitySettings) -> PerplexityResult:
    """Load one model and run it over the windows, int64 [w, t]."""
    model = load_causal_lm(model_name, folder, DTYPES[settings.dtype], pick_device(settings.device))
    predicted = settings.window - 1
    progress = Progress(model_name, windows.numel(), "tokens")
    sums, per_sequence, per_token = [], 0, 0.0
    for batch in windows.split(settings.batch_size):
        if settings.cache is None:
            sums.append(window_nll(model, batch.to(model.device), predicted))
        else:
            cache = make_cache(model_name, model.config, settings.cache, settings.cache_options)
            sums_of_batch, held = window_nll_through(
                cache, model, batch.to(model.device), predicted, settings.cache_chunk
            )
            sums.append(sums_of_batch)
            per_sequence, per_token = held // len(batch), held / batch.numel()
        if not sums[-1].isfinite().all():
            raise UserError(f"{model_name}: gives log-likelihoods that are not finite, dtype {model.dtype}")
        progress.advance(batch.numel())
    progress.close()
    means = torch.cat(sums) / predicted  # float64 [w]
    nll = means.mean().item()
    error = (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None
    if nll > 700:  # exp of it is past float64
        raise UserError(f"{model_name}: {nll:.6g} nats a token is not the likelihood of a language model")
    if settings.cache is None:
        per_sequence, per_token = cache_bytes(model, settings.window), cache_bytes_per_token(model)
    perplexity = math.exp(nll)
    return PerplexityResult(
        model=model_name,
        perplexity=perplexity,
        perplexity_standard_error=None if error is None else perplexity * error,
        nll=nll,
        nll_standard_error=error,
        tokens=len(windows) * predicted,
        cache_bytes_per_token=per_token,
        cache_bytes_per_sequence=per_sequence,
        dtype=str(model.dtype).removeprefix("torch."),
    )
