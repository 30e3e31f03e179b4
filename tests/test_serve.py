"""The example server: slots against sequences alone, and its answers over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.serving.api import make_app
from examples.serving.engine import Engine, Sampling, check_model, draw
from examples.serving.slots import SlotCache
from examples.serving.text import TextStream
from tests.conftest import PROSE, ROOT, make_llama, make_tokenizer, refused, run_tool
from tests.test_latent_cache import make_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}The {% endif %}"
)
PROMPTS = [" ".join(PROSE[i % 6].split()[: 1 + i % 9]) for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """original: no chat template; mla: its conversion, with one. No end token, so that lengths are certain."""
    folder = tmp_path_factory.mktemp("models")
    make_tokenizer(make_llama(folder / "original", max_position_embeddings=4096, eos_token_id=None))
    run_tool("convert_mha_to_mla", folder / "original", folder / "mla", "partial_rope.qk_rope_head_dim=8",
             "low_rank.method=joint", "low_rank.kv_lora_rank=24")  # fmt: skip
    make_tokenizer(folder / "mla", chat_template=TEMPLATE)
    return folder


@dataclass
class Server:
    client: httpx.Client
    engine: Engine
    model: Any
    tokenizer: Any

    def greedy_tokens(self, prompt: str, max_tokens: int) -> list[int]:
        """What transformers' generate adds to the prompt."""
        tokens = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = self.model.generate(tokens, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        return whole[0, tokens.shape[1] :].tolist()

    def greedy(self, prompt: str, max_tokens: int) -> str:
        return self.tokenizer.decode(self.greedy_tokens(prompt, max_tokens), skip_special_tokens=True)

    def complete(self, prompt: Any, **body: Any) -> str:
        answer = self.client.post(COMPLETIONS, json={"prompt": prompt, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def wait_until(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """/health, as soon as `true` of it; a minute at most."""
        for _ in range(6000):
            health = self.client.get("/health").json()
            if true(health):
                return health
            time.sleep(0.01)
        raise AssertionError(health)


@contextmanager
def serving(folder: Path, seconds: float = 0.0, **settings: int) -> Iterator[Server]:
    """A server in a thread of this process; each forward of its model takes `seconds` longer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    engine = Engine(model, tokenizer, **{"slots": 4, "max_length": 128, "queue": 256, **settings})
    model.register_forward_hook(lambda *_: time.sleep(seconds))
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "tiny"), log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield Server(client, engine, model, tokenizer)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder / "mla") as server:
        yield server


@pytest.fixture(scope="module")
def slow(folder: Path) -> Iterator[Server]:
    """One slot, one place to wait, and at least 5 seconds for 100 tokens."""
    with serving(folder / "mla", seconds=0.05, slots=1, queue=1) as server:
        yield server


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The events of a stream, after checking that it ends as it has to."""
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


def make_original() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2)).eval()


SLOT_MODELS: dict[str, Callable[[], Any]] = {
    "original": make_original,
    "joint": lambda: make_model(r=[0, 16, 4], groups=2, bias=True),
    "split, expanded": lambda: make_model("split", mla_decode="expanded"),
    "value, absorbed": lambda: make_model("value", mla_decode="absorbed"),
    "none": lambda: make_model("none", r=[0, 16, 4]),
}


@pytest.mark.parametrize("case", SLOT_MODELS)
@torch.inference_mode()
def test_slots_equal_sequences_alone(case: str) -> None:
    """Sequences come, grow in pieces of 1 and 2 tokens, and go in random order: every logit is that of the sequence
    alone, without a cache. They differ by float32 sums in another order (1e-6); a wrong row shows at 1e-1."""
    model, slots = SLOT_MODELS[case](), 4
    cache = SlotCache(model.config.num_hidden_layers, slots, max_length=14)
    generator = torch.Generator().manual_seed(1)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(3, 64, shape, generator=generator)

    def check(new: torch.Tensor, first: int) -> None:
        lengths = [row.numel() for row in running[first:]]
        logits = model(**cache.inputs(new, first, lengths)).logits
        for i, row in enumerate(new):
            running[first + i] = torch.cat((running[first + i], row))
            alone = model(running[first + i][None], use_cache=False).logits[0, -new.shape[1] :]
            assert (logits[i] - alone).abs().max() < 1e-4
        longest.append(max(lengths) - min(lengths))

    running: list[torch.Tensor] = []
    longest: list[int] = []
    moved = 0
    for step in range(14):
        if len(running) < slots:
            running.append(torch.empty(0, dtype=torch.long))
            check(tokens(1, 1 + 3 * step % 10), len(running) - 1)
        check(tokens(len(running), 1 + step % 2), 0)
        for slot in reversed(range(len(running))):
            if running[slot].numel() > 12 or torch.rand((), generator=generator) < 0.1:
                last = running.pop()
                if slot < len(running):
                    cache.move(len(running), slot, last.numel())
                    running[slot] = last
                    moved += 1
    assert max(longest) > 6 and moved > 1, "sequences of like lengths"
    held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    assert cache.nbytes == sum(part.shape[1] * part.shape[3] for part in held) * slots * 14 * 4
    with pytest.raises(ValueError, match="4 slots of 14 tokens"):
        cache.inputs(tokens(2, 1), 0, [3, 14])


def test_answers_are_those_of_generate(server: Server) -> None:
    """Alone, as text and as token ids; the usage; the end token, which no answer shows."""
    for prompt in PROMPTS[:4]:
        answer = server.client.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 20, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == server.greedy(prompt, 20)
        count = len(server.tokenizer(prompt)["input_ids"])
        assert answer["usage"] == {"prompt_tokens": count, "completion_tokens": 20, "total_tokens": count + 20}
        assert answer["choices"][0]["finish_reason"] == "length" and answer["model"] == "tiny"
        assert server.complete(server.tokenizer(prompt)["input_ids"], max_tokens=20) == server.greedy(prompt, 20)
    tokens = server.greedy_tokens(PROMPTS[1], 9)
    ends, server.engine._ends = server.engine._ends, {tokens[4]}
    answer = server.client.post(COMPLETIONS, json={"prompt": PROMPTS[1], "max_tokens": 9, "temperature": 0}).json()
    server.engine._ends = ends
    text = server.tokenizer.decode(tokens[: tokens.index(tokens[4])])
    assert answer["choices"][0] == {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}


def test_original_model(folder: Path) -> None:
    """The same server without converting; no chat template, no chat; the bytes of keys and values."""
    with serving(folder / "original") as server:
        assert server.complete(PROMPTS[0], max_tokens=12) == server.greedy(PROMPTS[0], 12)
        answer = server.client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]})
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
        assert server.engine.status()["cache_bytes"] == 4 * 128 * 3 * (2 * 2 * 16) * 4


def test_many_requests_at_once(server: Server) -> None:
    """200 at once on 4 slots, of mixed lengths, half of them streams: each gets its own answer."""
    cases = [(PROMPTS[i % 40], 1 + i % 40 % 17) for i in range(200)]
    expected = {case: server.greedy(*case) for case in set(cases)}
    assert len(set(expected.values())) > 30

    async def ask(client: httpx.AsyncClient, i: int) -> str:
        prompt, max_tokens = cases[i]
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        if i % 2:
            return (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["text"]
        async with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
            lines = [line async for line in answer.aiter_lines()]
        found = [event["choices"][0] for event in events(iter(lines))]
        assert [choice["finish_reason"] for choice in found] == [None] * (len(found) - 1) + ["length"]
        return "".join(choice["text"] for choice in found)

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=server.client.base_url, limits=limits, timeout=600) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(200)))

    assert asyncio.run(ask_all()) == [expected[case] for case in cases]
    health = server.wait_until(lambda health: not health["active"])
    assert health["status"] == "ok" and health["waiting"] == 0


def test_openai_client(server: Server) -> None:
    """OpenAI's own client reads the answers: chat and completion, whole and as streams."""
    client = openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "tide"}]}]
    expected = server.greedy("user tide The ", 9)
    settings: dict[str, Any] = dict(model="tiny", max_tokens=9, temperature=0)
    chat = client.chat.completions.create(messages=messages, **settings)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (expected, "length")
    chunks = list(client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **settings))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage == chat.usage and chat.usage is not None and chat.usage.completion_tokens == 9
    stream = client.completions.create(prompt="The tide", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in stream) == server.greedy("The tide", 9)
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.completions.create(prompt="x", model="other")
    answer = server.client.post(CHAT, json={"messages": [{"role": "user", "content": "tide"}], "temperature": 0}).json()
    assert answer["usage"]["total_tokens"] == 128, "without a limit an answer fills its slot"


def test_stop_strings(server: Server) -> None:
    """An answer ends before the first of them, wherever tokens begin and end; a stream shows no part of one."""
    whole = server.greedy(PROMPTS[2], 30)
    for at in range(3, 12):
        stop = whole[at : at + 4]
        body = {"prompt": PROMPTS[2], "max_tokens": 30, "temperature": 0, "stop": ["never", stop]}
        choice = server.client.post(COMPLETIONS, json=body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        with server.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
            found = events(answer.iter_lines())
        assert "".join(event["choices"][0]["text"] for event in found) == choice["text"]
    # The beginning of a stop string at the very end is text.
    assert server.complete(PROMPTS[2], max_tokens=30, stop=whole[-3:] + "never") == whole


def test_sampling(server: Server) -> None:
    """A seed fixes the answer, whatever runs beside it; without one, answers differ."""

    def sample(**body: Any) -> str:
        return server.complete(PROMPTS[3], **{"max_tokens": 12, "temperature": 1, **body})

    first = sample(seed=1)
    threads = [threading.Thread(target=sample, kwargs={"seed": i}) for i in range(3)]
    for thread in threads:
        thread.start()
    assert sample(seed=1) == first != sample(seed=2)
    for thread in threads:
        thread.join()
    assert len({sample() for _ in range(3)}) == 3
    greedy = server.greedy(PROMPTS[3], 12)
    assert sample(temperature=1e-300) == sample(top_p=1e-300) == greedy != first


def test_draw() -> None:
    """4,000 draws have the probabilities of the softmax and of its largest part: 0.032 is 4 standard deviations."""
    logits, generator = torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.Generator().manual_seed(0)
    for temperature, top_p, kept in ((1.0, 1.0, 4), (2.0, 1.0, 4), (1.0, 0.7, 2), (1.0, 0.6, 1), (0.5, 0.9, 2)):
        expected = (logits.double() / temperature).softmax(-1)
        expected[expected < expected.sort(descending=True).values[kept - 1]] = 0
        expected /= expected.sum()
        sampling = Sampling(1, temperature, top_p)
        drawn = torch.tensor([draw(logits, sampling, generator) for _ in range(4_000)])
        assert (drawn.bincount(minlength=4) / 4_000 - expected).abs().max() < 0.032


def make_bytes_tokenizer() -> Any:
    """One token a byte: a character is up to 4 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_words_tokenizer() -> Any:
    """One token a word, like sentencepiece: the space before a word is its own, and dropped before the first."""
    vocabulary = {word: i for i, word in enumerate(("▁The", "▁tide", "▁was", "▁out"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁The"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("make", "prompt", "answer"),
    [
        (make_bytes_tokenizer, "a é", "ü — 日本 🙂 x"),
        (make_bytes_tokenizer, "日本語日本語日本語", "🙂🙂"),
        (make_words_tokenizer, "The tide", " was out was out The"),
    ],
)
def test_text_of_tokens(make: Callable[[], Any], prompt: str, answer: str) -> None:
    tokenizer = make()
    before, whole = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    stream = TextStream(tokenizer, before)
    pieces = [stream.push(token) for token in whole[len(before) :]]
    assert "".join(pieces) == answer and "\ufffd" not in answer and stream.finish() == ""
    if make is make_bytes_tokenizer:
        assert pieces[-1] and not all(pieces)
        stream = TextStream(tokenizer, before)
        for token in tokenizer("🙂")["input_ids"][:3]:
            assert stream.push(token) == ""
        assert stream.finish() == "\ufffd", "half a character is not lost"


BAD: dict[str, tuple[str, Any, int, str]] = {
    "not JSON": (COMPLETIONS, b'{"prompt": ', 400, "not JSON"),
    "not UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', 400, "error parsing the body"),
    "deep": (COMPLETIONS, b"[" * 100_000, 400, ""),
    "a list": (COMPLETIONS, [], 400, "the body: Input should be a valid dictionary"),
    "prompt of no kind": (COMPLETIONS, {"prompt": None}, 400,
                          "prompt: Input should be a valid string; prompt: Input should be a valid list"),
    "no prompt": (COMPLETIONS, {}, 400, "prompt: Field required"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, 400, "no tokens"),
    "two prompts": (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "2 prompts; one a request"),
    "prompt of numbers and words": (COMPLETIONS, {"prompt": [1, "b"]}, 400, "prompt"),
    "unknown token": (COMPLETIONS, {"prompt": [3, 256]}, 400, "from 0 to 255"),
    "half a character": (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "half a character"),
    "half a character in a message": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half"),
    "half a character in a key": (COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', 400, "unicode"),
    "unknown key": (COMPLETIONS, {"prompt": "x", "max_token": 3}, 400, "max_token: Extra inputs"),
    "type": (COMPLETIONS, {"prompt": "x", "max_tokens": "3"}, 400, "max_tokens: Input should be a valid integer"),
    "bool": (COMPLETIONS, {"prompt": "x", "max_tokens": True}, 400, "valid integer"),
    "no tokens": (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "greater than or equal to 1"),
    "too long": (COMPLETIONS, {"prompt": [5] * 100, "max_tokens": 29}, 400,
                 "the prompt has 100 tokens and max_tokens is 29: together more than the 128"),
    "long chat": (CHAT, {"messages": [{"role": "user", "content": "x " * 200}]}, 400, "more than the 128 tokens"),
    "temperature": (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature"),
    "not a number": (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', 400, "finite number"),
    "top_p": (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p"),
    "seed": (COMPLETIONS, {"prompt": "x", "seed": 1 << 63}, 400, "seed"),
    "n": (COMPLETIONS, {"prompt": "x", "n": 2}, 400, "n: Input should be 1"),
    "echo": (COMPLETIONS, {"prompt": "x", "echo": True}, 400, "echo"),
    "logprobs": (COMPLETIONS, {"prompt": "x", "logprobs": 1}, 400, "logprobs"),
    "penalty": (COMPLETIONS, {"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty"),
    "empty stop": (COMPLETIONS, {"prompt": "x", "stop": ""}, 400, "stop"),
    "five stops": (COMPLETIONS, {"prompt": "x", "stop": list("abcde")}, 400, "at most 4"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
    "template": (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "no tools"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools: Extra inputs"),
    "model": (COMPLETIONS, {"prompt": "x", "model": "other"}, 404, "'other' is not served here; the one that is: 't"),
    "no such path": ("/v1/embeddings", {}, 404, "Not Found"),
    "method": ("/v1/models", {}, 405, "Method Not Allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(server: Server, case: str) -> None:
    path, body, status, message = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"], error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}


def test_other_bodies(server: Server) -> None:
    assert server.client.post(COMPLETIONS, json={"prompt": "x" * (9 << 20)}).status_code == 413
    answer = server.client.post(COMPLETIONS, data={"prompt": "x"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_clients_that_go_away_free_their_slots(slow: Server) -> None:
    """A stream, a whole answer, one that waits: each would take 5 seconds, and none is decoded to its end."""
    body = {"prompt": "The tide", "max_tokens": 100, "temperature": 0}
    steps: list[int] = []
    hook = slow.model.register_forward_hook(lambda *_: steps.append(1))
    with slow.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
        assert slow.wait_until(lambda health: health["active"] == 1)["waiting"] == 0
    slow.wait_until(lambda health: health["active"] == 0)
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            slow.client.post(COMPLETIONS, json=body, timeout=0.2)
        slow.wait_until(lambda health: health["active"] == 0)
    with slow.client.stream("POST", COMPLETIONS, json={**body, "stream": True}):
        slow.wait_until(lambda health: health["active"] == 1)
        with pytest.raises(httpx.ReadTimeout):
            slow.client.post(COMPLETIONS, json=body, timeout=0.1)
        assert slow.wait_until(lambda health: health["waiting"] == 0)["active"] == 1
    slow.wait_until(lambda health: health["active"] == 0)
    hook.remove()
    assert 4 < len(steps) < 200, "of 500"
    assert slow.complete("The tide", max_tokens=5) == slow.greedy("The tide", 5)


def test_full_queue(slow: Server) -> None:
    """One runs, one waits, the third is refused; the one that waited gets its answer."""
    body = {"prompt": "The tide", "max_tokens": 30, "temperature": 0}
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(httpx.post(f"{slow.client.base_url}{COMPLETIONS}",
               json=body, timeout=60))) for _ in range(2)]  # fmt: skip
    threads[0].start()
    slow.wait_until(lambda health: health["active"] == 1)
    threads[1].start()
    slow.wait_until(lambda health: health["waiting"] == 1)
    refused = slow.client.post(COMPLETIONS, json=body)
    assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {slow.greedy("The tide", 30)}


def test_a_forward_that_fails(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Its own request gets the error, whole or as an event; the one beside it and the next are answered."""
    expected = server.greedy(PROMPTS[5], 100)

    def fail(_: Any, arguments: Any, words: dict[str, Any]) -> None:
        if (words["input_ids"] == 255).any() and words["input_ids"].numel() > 1:
            raise RuntimeError("out of memory")

    hook = server.model.register_forward_pre_hook(fail, with_kwargs=True)
    with server.client.stream("POST", COMPLETIONS, json={"prompt": PROMPTS[5], "max_tokens": 100, "temperature": 0,
                                                         "stream": True}) as beside:  # fmt: skip
        answer = server.client.post(COMPLETIONS, json={"prompt": [5, 255, 7]})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        with server.client.stream("POST", COMPLETIONS, json={"prompt": [5, 255], "stream": True}) as stream:
            assert [event["error"]["type"] for event in events(stream.iter_lines())] == ["server_error"]
        assert "".join(event["choices"][0]["text"] for event in events(beside.iter_lines())) == expected
    hook.remove()
    assert server.complete(PROMPTS[5], max_tokens=100) == expected
    assert "out of memory" in caplog.text


def test_engine_that_stops(folder: Path) -> None:
    """What runs ends with an error, nothing new is taken, and /health says so."""
    with serving(folder / "mla", seconds=0.05, slots=1) as server:
        body = {"prompt": "The tide", "max_tokens": 100, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=body) as answer:
            server.wait_until(lambda health: health["active"] == 1)
            server.engine.close()
            assert events(answer.iter_lines())[-1]["error"]["type"] == "server_error"
        assert server.client.post(COMPLETIONS, json=body).status_code == 429
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopped")


@pytest.mark.parametrize(
    ("changes", "max_length", "message"),
    [
        ({"model_type": "gpt2"}, 8, "model_type 'gpt2' is not one of mha2mla_llama, llama"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 8, "sliding window"),
        ({"model_type": "mistral", "sliding_window": 4096}, 8, "sliding window"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, 8, "rope_type dynamic"),
        ({}, 2049, "max_length: 2049 is more than the model's 2048"),
    ],
)
def test_models_that_slots_do_not_fit(changes: dict[str, Any], max_length: int, message: str) -> None:
    config = LlamaConfig()
    config.__dict__.update(changes)
    if "model_type" in changes:
        config.__class__ = type("Other", (LlamaConfig,), {"model_type": changes["model_type"]})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(config, max_length)


def test_benchmark(server: Server) -> None:
    words = "requests=3", "prompt_tokens=5", "max_tokens=4", "rounds=1"
    done = run_tool("benchmarks/serve", server.client.base_url, *words)
    assert re.fullmatch(r"1 at a time: [\d.]+ tokens/s\n3 at a time: [\d.]+ tokens/s\nratio: [\d.]+\n", done.stdout)
    assert "the server answers 400" in refused("benchmarks/serve", server.client.base_url, "max_tokens=999")
    assert "Connection refused" in refused("benchmarks/serve", "http://127.0.0.1:9")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import serve  # type: ignore[import-not-found]

    damaged = shutil.copytree(folder / "mla", tmp_path / "mla")
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(b"[]" if file == "tokenizer.json" else content[: len(content) // 2])
    with pytest.raises(serve.UserError, match=r"mla: cannot be loaded \(.*\)$"):
        serve.make_engine(str(damaged), serve.Settings(device="cpu"))


def test_slots_that_no_memory_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import serve  # type: ignore[import-not-found]

    for slots in (1 << 40, 1 << 70):
        with pytest.raises(serve.UserError, match="mla: "):
            serve.make_engine(str(folder / "mla"), serve.Settings(device="cpu", slots=slots))


def environment(tmp_path: Path) -> dict[str, str]:
    """That of a machine without this package: importing it is an error."""
    (tmp_path / "mha2mla_megatron.py").write_text("raise ImportError('not on a serving machine')")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("seconds", "ends"), [(30, True), (0, False)])
def test_command(folder: Path, tmp_path: Path, seconds: int, ends: bool) -> None:
    """The server as a process, where the package is not installed. SIGTERM lets the running answer end, or ends it with
    an error where there is no time; the exit code is 0."""
    command = [sys.executable, "examples/serve.py", str(folder / "mla"), "port=0", "slots=2", "max_length=4096",
               f"shutdown_seconds={seconds}"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"serving mla at (http://127\.0\.0\.1:\d+)", line)
    assert address, line
    body = {"prompt": "The tide", "max_tokens": 400 if ends else 4000, "stream": True}
    with httpx.Client(base_url=address[1], timeout=60) as client:
        assert client.get("/health").json()["slots"] == 2
        with client.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            found = events(iter([first, *lines]))
    if ends:
        assert found[-1]["choices"][0]["finish_reason"] == "length"
    else:
        assert found[-1]["error"]["type"] == "server_error"
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one MODEL is needed, 0 given; usage: serve.py MODEL"),
        (["m", "slot=3"], "'slot=3': unknown key 'slot'; known: host, port,"),
        (["m", "slots=many"], "slots: 'many' is not a whole number"),
        (["m", "slots=0"], "slots: 0 is too small; at least 1"),
        (["m", "dtype=int8"], "dtype: unknown value 'int8'"),
        (["m", "port=99999"], "127.0.0.1:99999: cannot listen there"),
        (["/no/such/folder", "port=0"], "/no/such/folder: "),
    ],
)
def test_refused_words(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import serve  # type: ignore[import-not-found]

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    with pytest.raises(SystemExit) as end:
        serve.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"error: {message}" in error and "Traceback" not in error
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    serve.main()
    assert "  slots=8\n      Requests that are decoded together.\n" in capsys.readouterr().out


@pytest.mark.slow
def test_transformers_serve(folder: Path, tmp_path: Path) -> None:
    """transformers' own server with the command of docs/serving.md."""
    text = (ROOT / "docs" / "serving.md").read_text()
    block = re.search(r"\n    python - serve MLA [^\n]*<<'END'\n(.*?)\n    END\n", text, re.DOTALL)
    assert block, "docs/serving.md has no such command"
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    program = "\n".join(line.strip() for line in block[1].splitlines())
    words = shlex.split(f"serve {folder / 'mla'} --trust-remote-code --port {port} --device cpu")
    process = subprocess.Popen([sys.executable, "-c", program, *words], cwd=tmp_path, env=environment(tmp_path))
    try:
        body = {"model": str(folder / "mla"), "prompt": "The tide", "max_tokens": 9, "temperature": 0}
        for _ in range(3000):
            time.sleep(0.1)
            assert process.poll() is None, "it has ended"
            try:
                answer = httpx.post(f"http://localhost:{port}{COMPLETIONS}", json=body, timeout=60)
                break
            except httpx.ConnectError:
                pass
    finally:
        process.terminate()
        process.wait()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "mla", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "mla", trust_remote_code=True)
    tokens = tokenizer("The tide", return_tensors="pt")["input_ids"]
    expected = model.generate(tokens, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
