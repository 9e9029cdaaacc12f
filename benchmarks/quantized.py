"""Low rank and few bits together: bytes, score and divergence of a model's dense and compressed forms, seed by seed.

Each form is written as a folder of compressed-tensors and loaded again; as graphs of ONNX Runtime, each is timed.
"""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bytes_picture import bytes_figure
from benchmarks.harness import Lines, Options, Result, Row, mean_of
from benchmarks.smaller import EPOCHS, half
from hf_lowrank import CompressionConfig, Statistics
from hf_lowrank.allocation.budget import ImpossibleBudget
from hf_lowrank.compression.codes import solver_for_codes
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.loading import load_model
from hf_lowrank.folder.quantize import quantize_
from hf_lowrank.folder.quantizers import Quantization
from hf_lowrank.folder.style import save_png
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.evaluate import evaluate_splits

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "33%": {"rank_ratio": 0.33},
    "20%": {"rank_ratio": 0.2},
    "10%": {"rank_ratio": 0.1},
    "16 MB": {"bytes": "16MB"},
    "12 MB": {"bytes": "12MB"},
    "9 MB": {"bytes": "9MB"},
    "6 MB": {"bytes": "6MB"},
}
HALF = "half the blocks"  # a smaller model of the family
CHOSEN, NEAREST, NEAREST_8 = "chosen by layer", "int4, to the nearest", "int8, to the nearest"
FORMS = ("float32", "int8", "int4")
STORED_IN = torch.float16  # what is not rounded
TO_NEAREST = ("dense", "20%")  # the models that are rounded so too


def run(options: Options) -> Result:
    """The forms that the file has not yet, of one seed; the table of all its seeds, and its picture."""
    study = Study.begin(options)
    for name in (*MODELS, HALF):
        study.measure(name)
    return study.result()


class Study:
    """The model, its data, what was measured of it by one seed, and the file of figures."""

    def __init__(self, options: Options, pipeline: Pipeline) -> None:
        name = Path(options.model or "").name
        options.output.mkdir(parents=True, exist_ok=True)
        self.name, self.output, self.seed, self.pipeline = name, options.output, options.seed, pipeline
        self.lines = Lines(options.output / f"{name}_bytes.jsonl")
        self.reference = Reference(pipeline.model, *pipeline.reading, pipeline.validation)

    @classmethod
    def begin(cls, options: Options) -> "Study":
        """That of a real model and its task."""
        if options.model is None or options.task is None:
            raise LowRankError("bytes needs a real model: --model FOLDER --task NAME --data-dir FOLDER")
        rest: Any = {"seed": options.seed, "progress": False, "quantization": Quantization()}
        pipeline = Pipeline.load(options.model, options.task, options.data_dir, **rest)
        pipeline.dtype = STORED_IN
        return cls(options, pipeline)

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of all layers that any of the models rounds, measured once and kept beside the figures."""
        place = self.output / f"{self.name}_{self.seed}.statistics"
        if place.is_dir():
            return Statistics.load(place)
        measured = self.pipeline.statistics(CompressionConfig())
        assert measured is not None
        measured.save(place)
        return measured

    def measure(self, name: str) -> None:
        """The forms of one of `MODELS`, or of the smaller model, that are not known yet."""
        bits = _forms(name)
        missing = [form for form in bits if not self.lines.has(model=name, bits=form, seed=self.seed)]
        if not missing:
            return
        try:
            model = self.made(name)
        except ImpossibleBudget as error:
            print(f"{name} left out: {error}")  # of a model of another size
            return
        for form in missing:
            with tempfile.TemporaryDirectory() as folder:
                stored = self._stored(copy.deepcopy(model), form, Path(folder))
                far = self.reference.divergence(stored, progress=False).mean
                self.add(name, form, weights_bytes(Path(folder)) / 1e6, self.scored(stored), divergence=far)

    def add(self, model: str, bits: str, megabytes: float, score: float, **more: Any) -> None:
        """Note what was measured of a form."""
        task = self.pipeline.reading[1].name
        known = {"task": task, "seed": self.seed, "model": model, "bits": bits, "megabytes": round(megabytes, 2)}
        self.lines.add(**known, score=score, **more)

    def made(self, name: str) -> Any:
        """The model itself, a copy compressed, or one of half its blocks."""
        if name == HALF:
            return half(self.pipeline, self.output / f"{self.name}_half")
        if not MODELS[name]:
            return self.pipeline.model
        candidate = self.pipeline.candidate()
        candidate.compress(CompressionConfig(**MODELS[name]), self.statistics)
        return candidate.model

    def scored(self, model: Any) -> float:
        """On the whole validation set."""
        return evaluate_splits(model, *self.pipeline.reading, self.pipeline.validation, progress=False)["score"]

    def result(self) -> Result:
        """The table of all seeds, and its picture beside the JSON."""
        rows = self.lines.rows()
        keys = list(dict.fromkeys((row["model"], row["bits"]) for row in rows))
        table = [_row(*key, [row for row in rows if (row["model"], row["bits"]) == key]) for key in keys]
        save_png(bytes_figure(rows), self.output / f"{self.name}_bytes.png")
        return Result(
            f"{self.pipeline.reading[1].score} of {self.name} by bytes and bits",
            table,
            [
                "No fine-tuning, whole validation set; mean and standard error over seeds. int8 and int4: folders of "
                "weights, rounded with the moments of kfac, computed in float32 after widening; what is not quantized "
                "is in float16. Divergence: from the dense model, in nats. Half the blocks: every second one of the "
                f"dense model's, trained for {EPOCHS} epochs with it as teacher. Graphs and their speed: `graphs`."
            ],
            {"model": self.name, "rows": rows},
        )

    def _stored(self, model: Any, form: str, folder: Path) -> Any:
        """A form of a model, written and loaded again; it remembers its outputs."""
        if form != "float32":
            to_few_bits(model, form, None if form in (NEAREST, NEAREST_8) else self.statistics)
        model.save_pretrained(folder)
        self.pipeline.reading[0].save_pretrained(folder)
        return remembering(load_model(str(folder), self.pipeline.reading[1])[0])


def _forms(name: str) -> list[str]:
    """In which forms a model is measured; the smaller one without statistics of its own."""
    if name == HALF:
        return [FORMS[0], NEAREST_8]
    return [CHOSEN] if "bytes" in MODELS[name] else [*FORMS, *([NEAREST] if name in TO_NEAREST else [])]


def to_few_bits(model: Any, form: str, statistics: Statistics | None) -> None:
    """Round a model in place, by what was measured of it or each weight to the nearest."""
    bits = getattr(getattr(model, "compression_report", None), "bits", {})
    few = 8 if form in ("int8", NEAREST_8, CHOSEN) else 4
    embeddings = few if isinstance(model, LowRankMixin) else 8  # transformers could not load fewer
    solver = None if statistics is None else solver_for_codes(model, "kfac", statistics)
    quantize_(model, Quantization(few, embedding_bits=embeddings), bits, solver, STORED_IN)


def remembering(model: Any) -> Any:
    """The model, which runs once for each batch, whether it is scored or compared."""
    run, known = model.forward, {}

    @functools.wraps(run)
    def forward(**batch: Any) -> Any:
        key = batch["input_ids"].numpy().tobytes()
        if key not in known:
            known[key] = run(**batch)
        return known[key]

    model.forward = forward
    return model


def _row(model: str, bits: str, rows: list[dict[str, Any]]) -> Row:
    """The figures of all seeds."""
    speeds = [value for row in rows for value in row.get("speed", ())]
    divergences = [row["divergence"] for row in rows if "divergence" in row]
    return {
        "model": model,
        "bits": bits,
        "MB": mean_of([row["megabytes"] for row in rows], 1),
        "score": mean_of([row["score"] for row in rows], 2),
        "divergence": mean_of(divergences, 4) if divergences else "",
        "speed": f"{sorted(speeds)[len(speeds) // 2]:.2f} ({min(speeds):.2f}–{max(speeds):.2f})" if speeds else "",
    }
