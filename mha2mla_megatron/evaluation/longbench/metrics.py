"""The metrics of LongBench v1: scores from 0 to 1 of a prediction against one right answer.

They are those of LongBench/metrics.py of github.com/THUDM/LongBench and of the packages that it uses (rouge 1.0.1,
fuzzywuzzy 0.18 without python-Levenshtein, jieba), with one exception: that ROUGE-L recurses, and gives 0 where a
sentence of the prediction and one of the answer have about 1000 words together or more; this one has no such limit.
"""

from __future__ import annotations

import difflib
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

from mha2mla_megatron.errors import UserError

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WITHOUT_ANY_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words, as bags; case, punctuation and English articles do not count."""

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()

    return _bag_f1(words(prediction), words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the words that jieba finds, as bags; case, punctuation and spaces do not count."""

    def words(text: str) -> list[str]:
        bare = ("".join(word.lower().translate(_WITHOUT_ANY_PUNCTUATION).split()) for word in cut_words(text))
        return [word for word in bare if word]

    return _bag_f1(words(prediction), words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the whole text, on distinct words.

    Sentences end with periods. The union of the longest common subsequences of every pair of sentences, over the
    words of the prediction, is the precision, over those of the answer the recall. 0 where either has no sentence.
    """
    predicted, wanted = _sentences(prediction), _sentences(answer)
    if not predicted or not wanted:
        return 0.0
    common = set[str]().union(*(_common_words(right, guess) for right in wanted for guess in predicted))
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in wanted for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(cut_words(prediction)), " ".join(cut_words(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 / the number of classes named in the prediction if the right one is among them, else 0.

    A class whose name is a part of the right one's is not held against it, but the one named after such a class in
    `classes` is not looked at: the benchmark removes from a list while it walks along it.
    """
    named = [name for name in classes if name in prediction]
    position = 0
    while position < len(named):
        if named[position] in answer and named[position] != answer:
            del named[position]
        position += 1
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """As `count`; the answer reads "Paragraph N"."""
    return count(prediction, _number_after("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """As `count`; the answer reads "段落N"."""
    return count(prediction, _number_after("段落", answer))


def code_similarity(prediction: str, answer: str) -> float:
    """How alike the answer and the first line without a comment or a code fence are, in whole per cent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric
    for metric in (
        qa_f1, qa_f1_zh, rouge_l, rouge_l_zh, classification, count, retrieval, retrieval_zh, code_similarity
    )
}  # fmt: skip


def cut_words(text: str) -> list[str]:
    """A Chinese text as the words that jieba finds. Raises UserError where jieba is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it imports setuptools
            import jieba  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("the Chinese tasks need the package jieba: pip install jieba, or the extra .[eval]") from None
    jieba.setLogLevel("WARNING")
    return jieba.lcut(text)


def _number_after(word: str, answer: str) -> str:
    found = re.search(rf"{word}(\d+)", answer)
    if found is None:
        raise ValueError(f"the answer {answer!r} does not read '{word}N'")
    return found[1]


def _bag_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = (Counter(prediction) & Counter(answer)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    """The words of what stands between periods; one empty word for a sentence of spaces."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """The words of one longest common subsequence; of several, the one found from the end by shortening `second`."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    words, i, j = set(), len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
