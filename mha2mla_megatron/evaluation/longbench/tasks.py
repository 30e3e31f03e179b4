"""The 21 tasks of LongBench v1: in which averages they count, how they are asked and how they are scored.

Groups, metrics and generation lengths are those of task.md, eval.py and config/dataset2maxlen.json of
github.com/THUDM/LongBench.
"""

from __future__ import annotations

from typing import NamedTuple

from mha2mla_megatron.evaluation.longbench.prompts import PROMPTS

SINGLE = "Single-document QA"
MULTI = "Multi-document QA"
SUMMARIZATION = "Summarization"
FEW_SHOT = "Few-shot learning"
SYNTHETIC = "Synthetic tasks"
CODE = "Code completion"
GROUPS = (SINGLE, MULTI, SUMMARIZATION, FEW_SHOT, SYNTHETIC, CODE)

EN, ZH, BOTH = ("en",), ("zh",), ("en", "zh")


class LongBenchTask(NamedTuple):
    """One task."""

    name: str

    group: str

    languages: tuple[str, ...]
    """The averages that it counts in; code counts in both."""

    metric: str
    """A key of `metrics.METRICS`."""

    max_new_tokens: int

    @property
    def prompt(self) -> str:
        return PROMPTS[self.name]

    @property
    def chat(self) -> bool:
        """Whether a chat model gets the prompt as a message; few-shot examples and code are continued as they are."""
        return self.group not in (FEW_SHOT, CODE)

    @property
    def one_line(self) -> bool:
        """Whether only the first line of an answer counts: what follows is the next example."""
        return self.group == FEW_SHOT

    @property
    def stops_at_newline(self) -> bool:
        """Whether a line end also ends the generation: models go on with more dialogues."""
        return self.name == "samsum"


TASKS = {
    row[0]: LongBenchTask(*row)
    for row in (
        ("narrativeqa", SINGLE, EN, "qa_f1", 128),
        ("qasper", SINGLE, EN, "qa_f1", 128),
        ("multifieldqa_en", SINGLE, EN, "qa_f1", 64),
        ("multifieldqa_zh", SINGLE, ZH, "qa_f1_zh", 64),
        ("hotpotqa", MULTI, EN, "qa_f1", 32),
        ("2wikimqa", MULTI, EN, "qa_f1", 32),
        ("musique", MULTI, EN, "qa_f1", 32),
        ("dureader", MULTI, ZH, "rouge_l_zh", 128),
        ("gov_report", SUMMARIZATION, EN, "rouge_l", 512),
        ("qmsum", SUMMARIZATION, EN, "rouge_l", 512),
        ("multi_news", SUMMARIZATION, EN, "rouge_l", 512),
        ("vcsum", SUMMARIZATION, ZH, "rouge_l_zh", 512),
        ("trec", FEW_SHOT, EN, "classification", 64),
        ("triviaqa", FEW_SHOT, EN, "qa_f1", 32),
        ("samsum", FEW_SHOT, EN, "rouge_l", 128),
        ("lsht", FEW_SHOT, ZH, "classification", 64),
        ("passage_count", SYNTHETIC, EN, "count", 32),
        ("passage_retrieval_en", SYNTHETIC, EN, "retrieval", 32),
        ("passage_retrieval_zh", SYNTHETIC, ZH, "retrieval_zh", 32),
        ("lcc", CODE, BOTH, "code_similarity", 64),
        ("repobench-p", CODE, BOTH, "code_similarity", 64),
    )
}
