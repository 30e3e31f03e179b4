"""A needle in a haystack: sentences "The secret number of KEY is VALUE." in a long text, and a question for one.

    filler ... The secret number of the amber lighthouse is 48213. ... filler
    The secret number of the amber lighthouse is

The question repeats the needle's words, so that a small model that was never told to answer can do it. The answer is
scored among other numbers (a cloze with choices), the values of further needles first. Filler is a piece of a text; a
needle stands after the end of a sentence where one is near. Everything is drawn from the seed and the sample's number,
so that all depths and lengths of a sample ask for the same needle.

Source of the idea: G. Kamradt's needle in a haystack; with several needles, the multi-key form of RULER (arXiv
2404.06654).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mha2mla_megatron.errors import UserError

ADJECTIVES = ("amber", "broken", "crimson", "distant", "elder", "frozen", "golden", "hidden", "ivory", "little",
              "northern", "quiet", "silver", "sunken", "velvet", "winter")  # fmt: skip
NOUNS = ("anchor", "bridge", "castle", "desert", "engine", "forest", "garden", "harbour", "island", "lantern",
         "lighthouse", "library", "mountain", "orchard", "railway", "tower")  # fmt: skip
NUMBERS = range(10_000, 100_000)
BACK = 100
"""Tokens that a needle may stand before its depth, to follow the end of a sentence."""


class Haystack(NamedTuple):
    """One question."""

    ids: list[int]
    """The text with its needles, up to and including the question."""

    choices: list[list[int]]
    """Tokens that may follow; the first is the right answer. No two are equal."""

    key: str

    values: list[str]
    """The choices as they are read."""


class HaystackMaker:
    """Makes questions of an exact length in one tokenizer's tokens.

    encode: text -> ids, without special tokens; decode: ids -> text; filler: int64 [n], tokens of the text; prefix: BOS
    or nothing. needles: of each question; choices: answers to choose from, the right one included.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        filler: Sequence[int],
        prefix: Sequence[int],
        needles: int,
        choices: int,
        seed: int,
    ) -> None:
        self.encode, self.filler, self.prefix = encode, list(filler), list(prefix)
        self.needles, self.choices, self.seed = needles, choices, seed
        ends = {token for token in set(self.filler) if decode([token]).rstrip(" ").endswith((".", "!", "?", "\n"))}
        self.ends = [token in ends for token in self.filler]

    def make(self, length: int, depth: float, sample: int) -> Haystack:
        """A question of `length` tokens, the right answer included; its needle at `depth`, from 0 (first) to 1 (last).

        Raises UserError where the length has no room for the needles, or the text is shorter.
        """
        chance = random.Random(f"{self.seed} {sample}")
        keys = [f"the {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
        keys = chance.sample(keys, self.needles)
        numbers = chance.sample(NUMBERS, self.needles)
        places = [depth, *(chance.random() for _ in keys[1:])]
        place_in_text = chance.random()

        # Drawn apart: how many choices there are changes nothing in the haystack.
        others = random.Random(f"{self.seed} {sample} choices").sample(NUMBERS, self.choices + self.needles)
        values = [str(number) for number in [*numbers, *(n for n in others if n not in numbers)]][: self.choices]

        needles = [self.encode(f"\nThe secret number of {k} is {v}.\n") for k, v in zip(keys, numbers, strict=True)]
        question = f"\nThe secret number of {keys[0]} is"
        asked = self.encode(question)
        choices = [self.encode(f"{question} {value}")[len(asked) :] for value in values]

        room = length - len(self.prefix) - sum(map(len, needles)) - len(asked) - len(choices[0])
        if room < 1:
            raise UserError(
                f"lengths: {length} tokens have no room for filler beside {self.needles} needles and the question; at "
                f"least {length - room + 1} are needed"
            )
        if room > len(self.filler):
            raise UserError(f"the text has {len(self.filler)} tokens, fewer than the {room} that fill {length}")
        start = int(place_in_text * (len(self.filler) - room + 1))
        ids = list(self.prefix)
        done = start
        for place, needle in sorted(zip((self._cut(start, room, p) for p in places), needles, strict=True)):
            ids += self.filler[done:place] + needle
            done = place
        ids += self.filler[done : start + room] + asked
        return Haystack(ids, choices, keys[0], values)

    def _cut(self, start: int, room: int, depth: float) -> int:
        """Where in the filler a needle stands: after the last end of a sentence before its depth, if one is near."""
        exact = start + round(depth * room)
        for place in range(exact, max(start, exact - BACK), -1):
            if self.ends[place - 1]:
                return place
        return exact


def score_choices(
    first_logits: torch.Tensor, rest_logits: Sequence[torch.Tensor], choices: Sequence[Sequence[int]]
) -> tuple[list[float], bool]:
    """(summed log-probability of each choice in nats, whether greedy decoding gives the first choice).

    first_logits: [V], after the question; rest_logits: of each choice [n - 1, V], after its tokens 1 to n - 1. Float32
    log-probabilities, summed in float64.
    """
    sums, greedy = [], False
    for number, (rest, choice) in enumerate(zip(rest_logits, choices, strict=True)):
        logits = torch.cat([first_logits[None], rest]).float()  # [n, V]
        targets = torch.tensor(choice, device=logits.device)
        sums.append(logits.log_softmax(-1).gather(1, targets[:, None]).double().sum().item())
        if number == 0:
            greedy = bool((logits.argmax(-1) == targets).all())
    return sums, greedy
