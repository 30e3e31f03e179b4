"""The work behind the quality table: each stage is one of the tools, called in this process, and done once.

What is finished is known by files: a statistics file, a model folder, a run's newest step, and the results of a line
of the table, one small JSON file, which names the key of the settings that it was made with. So results can be taken
to another machine without the models, and the work goes on there at the first line that is not complete.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mha2mla_megatron.architecture import read_architecture
from mha2mla_megatron.calibration.run import calibrate
from mha2mla_megatron.checkpoint.convert_hf_megatron import (
    ToHFSettings,
    ToMegatronSettings,
    hf_to_megatron,
    megatron_to_hf,
)
from mha2mla_megatron.checkpoint.folders import model_sha256, resolve_model
from mha2mla_megatron.checkpoint.megatron import read_latest
from mha2mla_megatron.convert import convert_model
from mha2mla_megatron.errors import UserError
from mha2mla_megatron.evaluation.choices import evaluate_choices
from mha2mla_megatron.evaluation.perplexity import evaluate_perplexity
from mha2mla_megatron.files import file_sha256, new_files, require_file, write_json
from mha2mla_megatron.quality.settings import Entry, QualitySettings, expand, measurements, task_name
from mha2mla_megatron.ranks import require_one_process
from mha2mla_megatron.settings import require_keys
from mha2mla_megatron.training.config import FinetuneSettings
from mha2mla_megatron.training.run_picture import read_log


class OutOfTime(Exception):
    """The time budget is used up."""


class Quality:
    """The stages, in order. `entries`: the lines of the table; `results`: what there is of each so far."""

    def __init__(self, settings: QualitySettings) -> None:
        """Raises UserError for bad settings and missing files, before any work."""
        require_one_process("quality_table.py")
        require_keys(settings, "model", "out")
        text = settings.calibration_text
        self.model = resolve_model(str(settings.model))
        self.settings, self.out = settings, Path(str(settings.out))
        for file in (*settings.texts.values(), *settings.tasks, *([text] if text else [])):
            require_file(Path(file))
        hashes = model_sha256(self.model), None if text is None else file_sha256(Path(text))
        self.entries, self.work = expand(settings, *hashes)
        self.measurements = measurements(settings)
        self.results = {entry.name: self._read(entry) for entry in self.entries}

    def run(self) -> list[str]:
        """Do what is not done yet. Returns the names of the lines that are not complete: the time was up."""
        wanted = [e for e in self.entries if self.settings.only is None or e.row in self.settings.only]
        try:
            with _time_limit(self.settings.minutes):
                for number, entry in enumerate(wanted, start=1):
                    if not self.complete(entry):
                        print(f"== {number} of {len(wanted)}: {entry.name}", flush=True)
                        self._entry(entry)
        except OutOfTime:
            pass
        return [entry.name for entry in wanted if not self.complete(entry)]

    def complete(self, entry: Entry) -> bool:
        found = self.results[entry.name]
        return all(found[kind].keys() == wanted.keys() for kind, wanted in self.measurements.items())

    def _entry(self, entry: Entry) -> None:
        self._evaluate(entry, self._model(entry))
        if not self.settings.keep_models:
            self._delete_runs()

    def _model(self, entry: Entry) -> Path:
        """The line's model as a Hugging Face folder."""
        if entry.training is None:
            return self._converted(entry)
        exported = self.work.run(entry) / "hf"
        if not (exported / "config.json").exists():
            megatron_to_hf(self._trained(entry, entry.training), exported, ToHFSettings())
        return exported

    def _converted(self, entry: Entry) -> Path:
        if entry.conversion is None:
            return self.model
        folder = self.work.converted(entry)
        if not (folder / "config.json").exists():
            model = self.model if entry.source is None else self._model(entry.source)
            statistics = self.work.statistics(entry.source)
            if entry.conversion.statistics == str(statistics) and not statistics.exists():
                with self._timed(entry, "calibrate"):
                    calibrate(model, Path(str(self.settings.calibration_text)), statistics, self.settings.calibrate)
            with self._timed(entry, "convert"):
                convert_model(model, folder, entry.conversion)
        return folder

    def _trained(self, entry: Entry, training: FinetuneSettings) -> Path:
        """The line's checkpoints, after its last step."""
        from mha2mla_megatron.training.loop import finetune  # megatron takes seconds to import

        root = self.work.checkpoints(entry)
        if (root / "settings.yaml").exists() and read_latest(root) == training.steps:
            return root
        folder, start = self._converted(entry), self.work.original
        if entry.conversion is not None:
            start = folder.with_name(f"{folder.name}_megatron")
        _to_megatron(folder, start)
        if entry.teacher is not None and entry.teacher.training is not None:
            self._trained(entry.teacher, entry.teacher.training)
        elif training.distillation.teacher is not None:
            _to_megatron(self.model, self.work.original)
        with self._timed(entry, "fine-tune"):
            try:
                finetune(dataclasses.replace(training, load=str(start), save=str(root), keep_last=1))
            finally:
                self._keep_curve(entry, root)
        if read_latest(root) != training.steps:
            raise OutOfTime if self.settings.minutes is not None else KeyboardInterrupt
        return root

    def _delete_runs(self) -> None:
        """Those of complete lines that no line still to be done is made from, or learns from."""
        left = [entry for entry in self.entries if not self.complete(entry)]
        needed = {entry.key for line in left for entry in (line.source, line.teacher) if entry is not None}
        for entry in self.entries:
            if self.complete(entry) and entry.key not in needed:
                shutil.rmtree(self.work.run(entry), ignore_errors=True)

    def _evaluate(self, entry: Entry, folder: Path) -> None:
        found, settings = self.results[entry.name], self.settings
        architecture = read_architecture(folder)
        before = architecture.whole_cache_elements * architecture.num_layers
        layers = range(architecture.num_layers)
        after = before if entry.conversion is None else sum(architecture.layout(i).cache_elements for i in layers)
        found["cache_elements"], found["cache_fraction"] = after / architecture.num_layers, after / before
        if entry.training is None and entry.source is not None:
            found["tokens"] = self.results[entry.source.name]["tokens"]
        for name, text in settings.texts.items():
            if name not in found["texts"]:
                with self._timed(entry, f"perplexity {name}"):
                    (result,) = evaluate_perplexity([str(folder)], Path(text), settings.perplexity)
                self._measured(entry, "texts", name, dataclasses.asdict(result))
        for task in map(Path, settings.tasks):
            name = task_name(task)
            if name not in found["tasks"]:
                with self._timed(entry, name):
                    (scored,) = evaluate_choices([str(folder)], task, settings.choices)
                values = dataclasses.asdict(scored)
                for right in ("right", "right_norm"):
                    values[right] = "".join("01"[bit] for bit in values[right])
                self._measured(entry, "tasks", name, {**values, "file_sha256": file_sha256(task)})

    def _measured(self, entry: Entry, kind: str, name: str, values: dict[str, Any]) -> None:
        """Put one measurement into the results; the model's name is that of a folder that will go."""
        del values["model"]
        self.results[entry.name][kind][name] = {**values, "made_with": self.measurements[kind][name]}
        self._write(entry)

    def _keep_curve(self, entry: Entry, root: Path) -> None:
        """Put the run's losses against its tokens into the results; a long run's are thinned out."""
        if not (root / "log.jsonl").exists():
            return
        found = self.results[entry.name]
        tokens = 0 if entry.source is None else self.results[entry.source.name]["tokens"]
        curves: dict[str, list[list[float]]] = {"loss": [], "validation_loss": []}
        for line in read_log(root):
            tokens += line.get("tokens", 0)
            for name, curve in curves.items():
                if line.get(name) is not None:
                    curve.append([tokens, line[name]])
        found["tokens"] = tokens
        found["curves"] = {name: curve[:: max(1, len(curve) // 500)] for name, curve in curves.items()}
        self._write(entry)

    @contextmanager
    def _timed(self, entry: Entry, stage: str) -> Iterator[None]:
        """Seconds of this stage, over all calls, in the results; what it leaves of a GPU's memory is given back."""
        start = time.monotonic()
        print(f"-- {entry.name}: {stage}", flush=True)
        try:
            yield
        finally:
            seconds = self.results[entry.name]["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 1)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _read(self, entry: Entry) -> dict[str, Any]:
        file = self._file(entry)
        if file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                if found["key"] == entry.key:
                    for kind, wanted in self.measurements.items():
                        found[kind] = {n: v for n, v in found[kind].items() if wanted.get(n) == v["made_with"]}
                    return found
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(f"{file}: not a result of quality_table.py") from None
        return {
            "name": entry.name, "row": entry.row, "series": entry.series, "kind": entry.kind, "key": entry.key,
            "tokens": 0, "texts": {}, "tasks": {}, "seconds": {},
        }  # fmt: skip

    def _write(self, entry: Entry) -> None:
        found = self.results[entry.name]
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
        with new_files([self._file(entry)], overwrite=True) as (file,):
            write_json(file, found)

    def _file(self, entry: Entry) -> Path:
        return self.out / "results" / f"{entry.file}.json"


def _to_megatron(folder: Path, target: Path) -> None:
    if read_latest(target) is None:
        hf_to_megatron(folder, target, ToMegatronSettings())


@contextmanager
def _time_limit(minutes: float | None) -> Iterator[None]:
    """Turn the end of the time into what Ctrl-C does, which every stage survives, and that into `OutOfTime`."""
    if minutes is None:
        yield
        return
    late = False

    def interrupt(*_: Any) -> None:
        nonlocal late
        late = True
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
        yield
    except KeyboardInterrupt:
        if late:
            raise OutOfTime from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
