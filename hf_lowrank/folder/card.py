"""The record of a compression → its model card: metadata that the Hub validates, and what a user has to know."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.pipelines import SUPPORTED_TASKS
from transformers.utils.hub import cached_file
from yaml import YAMLError

from hf_lowrank.compression.report import described
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.citations import citations
from hf_lowrank.folder.facts import public_name, versions
from hf_lowrank.folder.quantizers import in_words
from hf_lowrank.folder.scores import KINDS, WORDS, comparable, last_score, left_out
from hf_lowrank.jobs.files import write_text
from hf_lowrank.nn.auto_lowrank import auto_class_of
from hf_lowrank.nn.publishing_lowrank import CARD, PICTURE, card_name
from hf_lowrank.solvers import METHODS
from hf_lowrank.tasks import TASKS, Task

TEMPLATE = "card_template.md"
# (the type that the Hub knows it by, in words)
METRICS = {
    "accuracy": ("accuracy", "accuracy (%)"),
    "f1": ("f1", "F1 (%)"),
    "entity_f1": ("f1", "entity F1 (%)"),
    "matthews": ("matthews_correlation", "Matthews correlation (%)"),
    "pearson_spearman": ("pearson_spearman", "mean of Pearson and Spearman correlation (%)"),
    "perplexity": ("perplexity", "perplexity"),
    "micro_f1": ("f1", "micro F1 (%)"),
    "squad_f1": ("f1", "F1 of answers (%)"),
    "rougeL": ("rouge", "ROUGE-L (%)"),
    "chrf": ("chrf", "chrF (%)"),
}
# Auto classes whose models the Hub knows by another word than transformers' pipelines, of which some have none.
TAGS = {"AutoModelForQuestionAnswering": "question-answering", "AutoModelForSeq2SeqLM": "text2text-generation"}
MOST_DRAWN = 1000
REQUIRED = ("settings", "parameters_before", "parameters_after", "layers")
INHERITED = ("license", "license_name", "license_link", "language", "datasets")

Record = dict[str, Any]


def render_card(record: Record, name: str) -> str:
    """The card of the model called `name` (a repository or a folder), from its record alone.

    What the record lacks is left out: nothing is measured or looked up here.

    Raises:
        LowRankError: it is no record of a compression.
    """
    if missing := [key for key in REQUIRED if key not in record]:
        raise LowRankError(f"a card cannot be written: the record of the compression lacks {', '.join(missing)}")
    template = _template().read_text(encoding="utf-8")
    facts: Record = {
        "name": name,
        "record": record,
        "method": METHODS.get(record["settings"]["method"]),
        "settings": {key: value for key, value in record["settings"].items() if key != "method" and value is not None},
        "factorized": [layer for layer in _all_layers(record) if layer["rank"] is not None],
        "quantized": in_words(record),
        "earlier": [described(step) for step in record.get("earlier", ())],
        "reader": _reader(record),
        "picture": PICTURE if _is_drawn(record) else None,
        "rows": _rows(record),
        "columns": _columns(record),
        "scored_on": _scored_on(record),
        "not_compared": left_out(record),
        "citations": citations(record["settings"]["method"]),
    }
    return str(ModelCard.from_template(_metadata(record, name), template_str=template, **facts)).strip() + "\n"


def _reader(record: Record) -> dict[str, str] | None:
    """How what reads a model's inputs is called and loaded, where it lies beside the model."""
    if record.get("image_processor"):
        return {"name": "processor", "auto_class": "AutoImageProcessor"}
    return {"name": "tokenizer", "auto_class": "AutoTokenizer"} if record.get("tokenizer") else None


def write_card(folder: str | Path, record: Record, name: str) -> None:
    """Write README.md and the picture of the ranks that it shows into `folder`."""
    from hf_lowrank.folder.picture import ranks_figure  # here, as matplotlib takes time to import
    from hf_lowrank.folder.style import save_png

    if _is_drawn(record):
        save_png(ranks_figure({layer["name"]: _drawn(layer) for layer in _all_layers(record)}), Path(folder) / PICTURE)
    write_text(Path(folder) / CARD, render_card(record, name))


def rendered_as(folder: str | Path, record: Record) -> str | None:
    """The name under which a folder's card was rendered from `record`; None if there is no card, or an edited one."""
    path = Path(folder) / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    name = card_name(card)
    whole = all(key in record for key in REQUIRED)
    return name if name is not None and whole and card == render_card(record, name) else None


def card_facts(model: PreTrainedModel) -> Record:
    """What a card says of a low-rank model and of the one it was made from, beside the report of its compression."""
    name = model.name_or_path or ""
    return {
        **({"base_model": public_name(name)} if name else {}),
        "base": base_facts(name),
        "architecture": type(model).__name__,
        "auto_class": auto_class_of(model),
        "versions": versions(),
    }


def base_facts(name: str) -> Record:
    """Of a folder or Hub name: whether it is on the Hub, the bytes of its weights, and what its card says of rights.

    What cannot be found out is left out.
    """
    config = name and stored(name, "config.json")
    if not config:
        return {}
    facts: Record = {"on_hub": not Path(name).is_dir(), "weights_bytes": weights_bytes(Path(config).parent)}
    if card := stored(name, CARD):
        with suppress(ValueError, YAMLError):  # a card whose metadata cannot be read says nothing
            data = ModelCard.load(Path(card), ignore_metadata_errors=True).data.to_dict()
            facts |= {key: data[key] for key in INHERITED if data.get(key)}
    return facts


def with_rights(
    record: Record, license_name: str | None, language: Sequence[str] | None, base_model: str | None
) -> Record:
    """A record that says, in place of what the base's card said, what its owner says; None leaves it as it is.

    Raises:
        LowRankError: the base's name is none that the Hub could have.
    """
    base = dict(record.get("base", {}))
    if license_name is not None:
        base |= {"license": license_name}
        base = {key: value for key, value in base.items() if key not in ("license_name", "license_link")}
    if language:
        base |= {"language": list(language)}
    if base_model is not None:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
            raise LowRankError(f"{base_model!r} is no name on the Hub, such as me/bert-stsb")
        return {**record, "base_model": base_model, "base": base | {"on_hub": True}}
    return {**record, "base": base} if base else record


def weights_bytes(folder: Path) -> int:
    """The size of the weights in a folder, as stored."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def stored(name: str, file: str) -> str | None:
    """Where a file of a folder or Hub name is on this machine, None where it has none or cannot be reached."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    return cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})


def _template() -> Path:
    """In an installed wheel beside this file, in a source tree where cards are kept."""
    inside = Path(__file__).with_name(TEMPLATE)
    return inside if inside.is_file() else Path(__file__).parents[2] / "model_cards" / TEMPLATE


def _all_layers(record: Record) -> list[Record]:
    """The layers that were targeted, and those that an earlier compression factorized."""
    return [*record["layers"], *record.get("untouched", ())]


def _is_drawn(record: Record) -> bool:
    """Whether there are layers to draw, and not so many (the experts of a large model) that nobody could see them."""
    return 0 < len(_all_layers(record)) <= MOST_DRAWN


def _drawn(layer: Record) -> Record:
    return {"out": layer["out_features"], "in": layer["in_features"], "rank": layer["rank"]}


# --- metadata ---


def _metadata(record: Record, name: str) -> ModelCardData:
    base, task = record.get("base", {}), TASKS.get(record.get("task", ""))
    datasets = base.get("datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    if task is not None and (hub := _hub(record, task)):
        datasets.append(hub)
    facts: Record = {key: base[key] for key in INHERITED if key in base and key != "datasets"}
    if base.get("on_hub") and "base_model" in record:
        facts["base_model"] = record["base_model"]
        # The Hub knows four relations. Of a smaller model for the same use, this one is the nearest.
        facts["base_model_relation"] = "finetune" if "score_finetuned" in record else "quantized"
    if scores := _eval_results(record):
        facts |= {"eval_results": scores, "model_name": name.rpartition("/")[2]}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline(record),
        tags=["low-rank", "compression", "svd", record["settings"]["method"], "custom_code"],
        datasets=list(dict.fromkeys(datasets)) or None,
        **facts,
    )


def _hub(record: Record, task: Task) -> str | None:
    """The data set on the Hub that statistics were measured on, if it was one."""
    data = record.get("data")
    return data if data and data in (task.hub[0], record.get("dataset")) else None


def _pipeline(record: Record) -> str | None:
    """The word by which the Hub knows what a model does: of what writes texts the task, else by its Auto class."""
    auto_class, task = record.get("auto_class"), record.get("task")
    if auto_class in TAGS:
        return task if task in ("summarization", "translation") else TAGS[auto_class]
    pipelines: dict[str, Any] = SUPPORTED_TASKS
    tags = (tag for tag, one in pipelines.items() if auto_class in [known.__name__ for known in one["pt"]])
    return next(tags, None)


def _eval_results(record: Record) -> list[EvalResult] | None:
    """The last measured score, with the data it was measured on."""
    task = TASKS.get(record.get("task", ""))
    last = last_score(record)
    tag = _pipeline(record)
    if task is None or last in (None, "dense") or tag is None:
        return None
    known, scored = _hub(record, task), (_scored_on(record) or {}).get("data")
    score, hub = record[f"score_{last}"], scored if scored and scored in (task.hub[0], known) else None
    return [
        EvalResult(
            task_type=tag,
            dataset_type=hub or task.name,
            dataset_name=task.name,
            dataset_config=task.hub[1] if hub else None,
            dataset_split=task.validation[0],
            metric_type=_metric(record, task)[0],
            metric_name=_metric(record, task)[1],
            metric_value=round(score, 4),
        )
    ]


# --- the table ---


def _columns(record: Record) -> list[str]:
    return [WORDS[kind] for kind in _kinds(record)]


def _kinds(record: Record) -> list[str]:
    """Of `KINDS`, those that have a column."""
    later = {"finetuned": "score_finetuned" in record, "quantized": "unquantized_bytes" in record}
    return [kind for kind in KINDS if later.get(kind, True)]


def _rows(record: Record) -> list[list[str]]:
    """What was measured, dense and compressed; a row of which nothing is known is left out, a lone gap stays empty."""
    task = TASKS.get(record.get("task", ""))
    metric = _metric(record, task)[1] if task else "score"
    base, latency = record.get("base", {}), record.get("latency", {})
    before, after = record["parameters_before"], record["parameters_after"]
    size = record.get("weights_bytes")
    floats = record.get("unquantized_bytes", size)
    last, kinds = last_score(record) or "", _kinds(record)
    scores = {kind: record.get(f"score_{kind}") if comparable(record, kind, last) else None for kind in KINDS}
    counts = {"dense": f"{before:,}", "compressed": f"{after:,} ({after / before:.1%})"}
    sizes = {"dense": base.get("weights_bytes"), "quantized": size}
    rows = [
        [metric, *(_number(scores[kind], "{:.2f}") for kind in kinds)],
        *_divergences(record, kinds),
        ["parameters", *(counts.get(kind, f"{after:,}") for kind in kinds)],
        ["weights on disk (MB)", *(_number(sizes.get(kind, floats), "{:.1f}", 1e6) for kind in kinds)],
        ["latency (ms)", *(_number(_latency(latency, kind, kinds), "{:.3g}") for kind in kinds)],
    ]
    return [row for row in rows if any(row[1:])]


def _latency(latency: Record, kind: str, kinds: list[str]) -> float | None:
    """Fine-tuning leaves it as it is, quantizing does not: `bench` timed the model before it or after."""
    quantized = latency.get("quantized_by") and "quantized" in kinds
    timed = ("quantized",) if quantized else ("compressed", "finetuned")
    found: float | None = latency.get("dense" if kind == "dense" else "compressed")
    return found if kind in ("dense", *timed) else None


def _divergences(record: Record, kinds: list[str]) -> list[list[str]]:
    """How far predictions are from the dense model's, where that was measured."""
    known: dict[str, Record] = record.get("divergence", {})
    measures = dict.fromkeys(each["measure"] for each in known.values())
    texts = {kind: f"{each['mean']:.4g} ± {each['standard_error']:.2g}" for kind, each in known.items()}
    return [
        [measure, *(texts[kind] if kind in known and known[kind]["measure"] == measure else "" for kind in kinds)]
        for measure in measures
    ]


def _scored_on(record: Record) -> Record | None:
    """The validation data of the last score; None where that is not recorded."""
    found: Record | None = record.get("scored_on", {}).get(last_score(record))
    return found


def _metric(record: Record, task: Task) -> tuple[str, str]:
    """That of the score: a task has another where the library that computes its own was not installed."""
    score = record.get("metric", task.score)
    return METRICS.get(score, (score, score.replace("_", " ")))


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value / unit)
