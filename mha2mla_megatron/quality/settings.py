"""Settings of tools/quality_table.py, and the models that they ask for."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from mha2mla_megatron.calibration.run import CalibrateSettings
from mha2mla_megatron.convert import OF_THE_OUTPUT, ConvertSettings
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.choices import ChoicesSettings
from mha2mla_megatron.evaluation.perplexity import PerplexitySettings
from mha2mla_megatron.files import file_sha256
from mha2mla_megatron.settings import make_settings, require_keys, to_dict
from mha2mla_megatron.sweep import conversion_settings, leaves
from mha2mla_megatron.training.config import DistillationSettings, FinetuneSettings

KINDS = ("as it is", "fine-tuned", "distilled")
"""What a model has been through after the conversion, if there was one."""


@dataclass(frozen=True)
class QualitySettings:
    """Settings of tools/quality_table.py."""

    model: str | None = None
    """The original: a folder or a hub id."""

    out: str | None = None
    """Folder of the results: results/*.json, table.md, table.png; what is large goes to work/."""

    calibration_text: str | None = None
    """For tools/calibrate.py. null: no row needs statistics."""

    calibrate: CalibrateSettings = field(default_factory=CalibrateSettings)

    base: dict[str, Any] = field(default_factory=dict)
    """Conversion settings common to all rows, as of tools/convert_mha_to_mla.py."""

    rows: dict[str, Any] = field(default_factory=dict)
    """Name -> conversion settings. Beside them `series`, which rows of several cache sizes share and the picture
    connects (default: the name), `finetune` and `distill`, whether the row is trained so (default: true), or settings
    that differ from those below, and `from`: a trained line of the table above this row, such as "a row, fine-tuned",
    whose model is converted instead of the original: with its own statistics if it is not converted yet, such as
    "original, fine-tuned", otherwise without any."""

    finetune: dict[str, Any] = field(default_factory=dict)
    """Settings of tools/finetune.py for all runs, but load, save and distillation. Empty: nothing is fine-tuned."""

    distillation: dict[str, Any] = field(default_factory=dict)
    """Settings of the runs that learn from a teacher, as of tools/finetune.py. `teacher`: a line of the table above
    theirs, "original" (the default) or one that is trained, such as "original, fine-tuned". Empty: no such runs."""

    texts: dict[str, str] = field(default_factory=dict)
    """Name -> held-out text, for the perplexity."""

    perplexity: PerplexitySettings = field(default_factory=PerplexitySettings)

    tasks: list[str] = field(default_factory=list)
    """Files of rows, as of tools/evaluate_choices.py."""

    choices: ChoicesSettings = field(default_factory=ChoicesSettings)

    only: list[str] | None = None
    """Work on these rows alone ("original" is one); all that is there is in the table still. null: all rows."""

    minutes: float | None = None
    """Stop after so many minutes, in the middle of what is going on; the same command goes on from there."""

    keep_models: bool = False
    """Leave runs and fine-tuned models in OUT/work once their results are complete; converted ones stay always."""

    def __post_init__(self) -> None:
        if self.perplexity.output is not None or self.choices.output is not None:
            raise UserError("perplexity.output, choices.output: results go into OUT/results; leave them unset")
        names = [task_name(Path(task)) for task in self.tasks]
        if len(set(names)) < len(names):
            raise UserError(f"tasks: two of the same folder and name: {', '.join(names)}")
        if self.rows and not self.texts and not self.tasks:
            raise UserError("texts, tasks: both empty; there is nothing to measure")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes: {self.minutes} is not a positive number")
        if self.distillation and not self.finetune:
            raise UserError("distillation: given without finetune")


class Entry(NamedTuple):
    """One line of the table. conversion, training: None where there is none.

    conversion_key, key: hashes of all that decides the converted model, and the line. source, teacher: the trained
    lines whose models it is converted from, and learns from; None for the original, or none.
    """

    row: str
    series: str
    kind: str
    conversion: ConvertSettings | None
    training: FinetuneSettings | None
    conversion_key: str
    key: str
    source: Entry | None
    teacher: Entry | None

    @property
    def name(self) -> str:
        return self.row if self.kind == KINDS[0] else f"{self.row}, {self.kind}"

    @property
    def file(self) -> str:
        """Its name as a file's."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", re.sub(r"-(?=\d)", "minus ", self.name)).strip("_")


class Work:
    """Where the large things are, under OUT/work; their names say what they are made of.

    model: hash of the original. statistics: of all that these depend on.
    """

    def __init__(self, out: Path, model: str, statistics: str) -> None:
        self.root = out / "work"
        self.made_of = statistics
        self.original = self.root / f"original_{model[:12]}_megatron"

    def statistics(self, source: Entry | None) -> Path:
        """Of the original, or of the fine-tuned original of the line `source`."""
        name = self.made_of[:12] if source is None else f"{self.made_of[:12]}_{source.key[:12]}"
        return self.root / f"statistics_{name}.safetensors"

    def converted(self, entry: Entry) -> Path:
        return self.root / f"converted_{entry.conversion_key[:12]}"

    def run(self, entry: Entry) -> Path:
        return self.root / f"run_{entry.key[:12]}"

    def checkpoints(self, entry: Entry) -> Path:
        return self.run(entry) / "run"


def expand(settings: QualitySettings, model_sha256: str, text_sha256: str | None) -> tuple[list[Entry], Work]:
    """Every line of the table, the original first, and where their work is done.

    Raises UserError for settings that any of the tools refuses.
    """
    calibrate = _less(to_dict(settings.calibrate), to_dict(CalibrateSettings()))
    inputs = {"model": model_sha256, "text": text_sha256, "calibrate": calibrate}
    work = Work(Path(str(settings.out)), model_sha256, hash_of(inputs))
    entries: list[Entry] = []
    sha256 = functools.cache(file_sha256)  # rows share token files, which may be large
    for row, values in {"original": None, **settings.rows}.items():
        if not isinstance(values, dict | None):
            raise UserError(f"rows.{row}: {values!r} is not a mapping of settings")
        own = dict(values or {})
        series, fit, distill = (own.pop(k, v) for k, v in (("series", row), ("finetune", True), ("distill", True)))
        source = _trained_line(f"rows.{row}.from", own.pop("from", None), entries)
        conversion = None
        if values is not None:
            known = settings.calibration_text is not None and (source is None or source.conversion is None)
            given = {"statistics": str(work.statistics(source))} if known else {}
            given.update({**dict(leaves("base", settings.base)), **dict(leaves(f"rows.{row}", own))})
            conversion = conversion_settings(row, given)
        about = {**(inputs if conversion else {"model": model_sha256}), "conversion": _plain(conversion)}
        about.update({} if source is None else {"from": source.key})
        for kind, values_of_kind in _trainings(row, settings, fit, distill if values is not None else False).items():
            training, teacher = None, None
            if values_of_kind is not None:
                training, teacher = _training(row, values_of_kind, entries, work)
            keys = hash_of(about), hash_of({**about, "training": _identity(training, teacher, sha256)})
            entries.append(Entry(row, str(series), kind, conversion, training, *keys, source, teacher))
    files = [entry.file for entry in entries]
    for entry in entries:
        if files.count(entry.file) > 1:
            raise UserError(f"rows: '{entry.name}' and another one would share the file {entry.file}.json")
    for row in settings.only or []:
        if row not in ("original", *settings.rows):
            raise UserError(f"only: no row '{row}'; there are: original, {', '.join(settings.rows)}")
    return entries, work


def _trainings(row: str, settings: QualitySettings, fit: Any, distill: Any) -> dict[str, dict[str, Any] | None]:
    """Kind of line -> settings of its training, for the lines that a row has. fit, distill: its `finetune` and
    `distill`."""
    for key, value in (("finetune", fit), ("distill", distill)):
        if not isinstance(value, bool | dict):
            raise UserError(f"rows.{row}.{key}: {value!r}; valid: true, false, or a mapping of settings")
    found: dict[str, dict[str, Any] | None] = {KINDS[0]: None}
    if not settings.finetune:
        return found
    common = _merged(FinetuneSettings, settings.finetune, fit if isinstance(fit, dict) else {})
    for key in ("load", "save", "distillation"):
        if key in common:
            raise UserError(f"finetune.{key}: set for each run; leave it out")
    if fit is not False:
        found[KINDS[1]] = common
    if settings.distillation and distill is not False:
        own = _merged(DistillationSettings, settings.distillation, distill if isinstance(distill, dict) else {})
        found[KINDS[2]] = {**common, "distillation": {"teacher": "original", **own}}
    return found


def _training(
    row: str, values: dict[str, Any], above: list[Entry], work: Work
) -> tuple[FinetuneSettings, Entry | None]:
    """(the settings of a line's training, the line that is its teacher, if that is trained). above: lines so far."""
    teacher = None
    if "distillation" in values:
        name = values["distillation"]["teacher"]
        if name != "original":
            teacher = _trained_line(f"rows.{row}: distillation.teacher", name, above)
        folder = work.original if teacher is None else work.checkpoints(teacher)
        values = {**values, "distillation": {**values["distillation"], "teacher": str(folder)}}
    training = make_settings(FinetuneSettings, values, "finetune")
    require_keys(training, "data.train")
    return training, teacher


def _trained_line(key: str, name: Any, above: list[Entry]) -> Entry | None:
    """The trained line of this name, None for None."""
    if name is None:
        return None
    trained = {entry.name: entry for entry in above if entry.training is not None}
    if not isinstance(name, str) or name not in trained:
        raise UserError(f"{key}: {name!r} is no trained line of the table above it; there are: {'; '.join(trained)}")
    return trained[name]


def _merged(schema: type, common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of a dataclass, of which the second ones count where both have a key. As in `load_settings` a
    blend, and whatever else is not always a mapping, is taken as a whole; other mappings of names add up."""
    types, merged = get_type_hints(schema), {**common, **own}
    for key, value in own.items():
        if not isinstance(value, dict) or not isinstance(common.get(key), dict):
            continue
        if is_dataclass(kind := types.get(key)):
            merged[key] = _merged(kind, common[key], value)  # type: ignore[arg-type]
        elif kind is not Any and value:
            merged[key] = {**common[key], **value}
    return merged


def _plain(conversion: ConvertSettings | None) -> dict[str, Any] | None:
    """The settings that weights depend on; the statistics are known by what they are made of."""
    if conversion is None:
        return None
    values = {k: v for k, v in to_dict(conversion).items() if k not in OF_THE_OUTPUT}
    for part, name in (("partial_rope", "scores"), ("low_rank", "statistics")):
        if values[part][name] == conversion.statistics:
            values[part] = {**values[part], name: None}
    values["statistics"] = conversion.statistics is not None
    return _less(values, to_dict(ConvertSettings()))


def _identity(
    training: FinetuneSettings | None, teacher: Entry | None, sha256: Callable[[Path], str]
) -> dict[str, Any] | None:
    """The settings that are not the default ones, with the contents of the token files, and of the teacher's training,
    in place of their names. So a setting that a later version brings changes no result's hash. sha256: of a file."""
    if training is None:
        return None
    values = to_dict(training)
    for part, key in (("data", "train"), ("validation", "data")):
        blend = values[part][key]
        weights = {blend: 1.0} if isinstance(blend, str) else blend or {}
        values[part][key] = [
            [[sha256(Path(f"{prefix}{suffix}")) for suffix in (".idx", ".bin")], weight]
            for prefix, weight in weights.items()
        ]
    for key in ("load", "save", "save_interval", "keep_last"):
        del values[key]
    del values["data"]["cache"]
    values["distillation"]["teacher"] = (
        values["distillation"]["teacher"] is not None if teacher is None else teacher.key
    )
    return _less(values, to_dict(FinetuneSettings()))


def _less(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values without those that are in `defaults`, too."""
    kept = {}
    for key, value in values.items():
        other = defaults.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            value, other = _less(value, other), {}
        if value != other:
            kept[key] = value
    return kept


def measurements(settings: QualitySettings) -> dict[str, dict[str, str]]:
    """Kind (texts, tasks) -> name of a text, or `task_name` -> hash of all that its numbers depend on."""
    perplexity, choices = settings.perplexity, settings.choices
    windows = [perplexity.window, perplexity.max_windows, perplexity.dtype, perplexity.bos, perplexity.cache]
    rows = [choices.max_rows, choices.dtype, choices.bos]
    return {
        "texts": {name: hash_of([file_sha256(Path(text)), windows]) for name, text in settings.texts.items()},
        "tasks": {task_name(Path(task)): hash_of([file_sha256(Path(task)), rows]) for task in settings.tasks},
    }


def task_name(file: Path) -> str:
    """Folder and name of a task's file: those of several tasks are often called alike."""
    return f"{file.absolute().parent.name}/{file.name}"


def hash_of(values: Any) -> str:
    """Hex digest of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
