"""The tasks of `cloze` for lighteval 0.13: `lighteval accelerate ... "mmlu_cf|0" --custom-tasks THIS_FILE`.

MHA2MLA_EVAL_DATA=FOLDER takes the rows from FOLDER/NAME/SPLIT.jsonl[.gz] in the place of the hub.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from lighteval.metrics.metrics import Metrics  # type: ignore[import-not-found]
from lighteval.metrics.metrics_sample import ExactMatches, LoglikelihoodAcc  # type: ignore[import-not-found]
from lighteval.metrics.normalizations import (  # type: ignore[import-not-found]
    LogProbCharNorm,
    harness_triviaqa_normalizer,
)
from lighteval.metrics.utils.metric_utils import SampleLevelMetric  # type: ignore[import-not-found]
from lighteval.tasks.lighteval_task import LightevalTaskConfig  # type: ignore[import-not-found]
from lighteval.tasks.requests import Doc, SamplingMethod  # type: ignore[import-not-found]

from mha2mla_megatron.evaluation.cloze import TASKS, ClozeTask

acc_norm = SampleLevelMetric(
    metric_name="acc_norm",
    sample_level_fn=LoglikelihoodAcc(logprob_normalization=LogProbCharNorm(ignore_first_space=True)),
    category=SamplingMethod.LOGPROBS,
    corpus_level_fn=np.mean,
    higher_is_better=True,
)
exact_match = SampleLevelMetric(
    metric_name="em",
    sample_level_fn=ExactMatches(
        strip_strings=True, normalize_gold=harness_triviaqa_normalizer, normalize_pred=harness_triviaqa_normalizer
    ),
    category=SamplingMethod.GENERATIVE,
    corpus_level_fn=np.mean,
    higher_is_better=True,
)


def _config(name: str, task: ClozeTask) -> LightevalTaskConfig:
    def prompt(line: dict, task_name: str = name) -> Doc:
        query, choices, gold = task.ask(line, name)
        return Doc(task_name=task_name, query=query, choices=[choices] if task.generates else choices, gold_index=gold)

    local = os.environ.get("MHA2MLA_EVAL_DATA")
    examples = "train" if local else task.examples
    return LightevalTaskConfig(
        name=name,
        prompt_function=prompt,
        hf_repo=str(Path(local, task.folder)) if local else task.repo,
        hf_subset=None if local else task.subset,
        hf_avail_splits=[task.split, examples],
        evaluation_splits=[task.split],
        few_shots_split=examples,
        generation_size=20 if task.generates else -1,
        stop_sequence=["Question:", "Question"] if task.generates else None,
        metrics=[exact_match] if task.generates else [Metrics.loglikelihood_acc, acc_norm],
    )


TASKS_TABLE = [_config(name, task) for name, task in TASKS.items()]
