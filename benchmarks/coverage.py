"""Every head class of every model type of transformers: compress, save, load by the Auto class, compare.

Results go to a file of JSON lines, so that a sweep that was stopped goes on where it was; a whole sweep also writes
`architectures.json` next to this file.
"""

import gc
import json
import multiprocessing
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.architectures import write_data
from benchmarks.harness import Options, Result
from benchmarks.tiny import outputs, tiny_models
from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.jobs.progress import bar

REPRESENTATIVE = (
    *("bert", "roberta", "distilbert", "albert", "mobilebert", "deberta-v2", "electra", "gpt2", "llama", "qwen3"),
    *("gemma", "mistral", "t5", "bart", "vit", "clip", "whisper", "mamba"),
)
SECONDS = 300  # for all heads of one model type

Head = tuple[str, str, str]  # model type, class, Auto class

MEANINGS = {
    "ok": "saved and loaded by its Auto class: bitwise the same tensors, parameters as reported, the same outputs",
    "ok, not run": "the same but for outputs: it takes inputs that are not made up here",
    "nothing to factorize": "it has no linear layer inside of a block",
    "not built": "transformers builds no model of less than 50M parameters from its default config, whole or shrunk",
    "dense fails too": "the dense model does not survive saving and loading by plain transformers either",
    "failed": "the low-rank model differs or raises",
}


def run(options: Options) -> Result:
    """Sweep the representative model types, or all of them with `--all`."""
    found = dict(_heads())
    types = list(found) if options.everything else list(REPRESENTATIVE)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"coverage-{transformers.__version__}.jsonl"
    done = {(record["type"], record["class"]): record for record in _read(path)}
    heads = [(kind, *head) for kind in types for head in found[kind]]
    with bar("coverage", len(heads), "classes") as shown:
        for kind in types:
            waiting = [(kind, *head) for head in found[kind] if (kind, head[0]) not in done]
            for record in _in_a_process(waiting):
                done[record["type"], record["class"]] = record
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            shown.update(len(found[kind]))
    records = [done[kind, name] for kind, name, _ in heads]
    if options.everything:
        write_data(records, MEANINGS)
    return _result(records)


def _result(records: list[dict[str, Any]]) -> Result:
    counts = Counter(record["status"] for record in records)
    rows = [
        {"outcome": status, "head classes": str(counts[status]), "meaning": meaning}
        for status, meaning in MEANINGS.items()
        if counts[status]
    ]
    notes = [f"{r['type']} {r['class']}: {r['note']}" for r in records if r["status"] == "failed"]
    title = f"{len(records)} head classes of {len({r['type'] for r in records})} model types"
    return Result(f"{title}, transformers {transformers.__version__}", rows, notes, {"records": records})


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _heads() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(model type, [(class, Auto class)]) of all Auto mappings."""
    auto_classes = {
        name: auto_class._model_mapping
        for name, auto_class in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(auto_class, "_model_mapping", None) is not None
    }
    for model_type, config_class in CONFIG_MAPPING.items():
        classes: dict[str, str] = {}
        for auto_name, mapping in auto_classes.items():
            try:
                known = mapping[config_class]
            except (KeyError, ValueError):  # no such head, or one that this version of transformers lacks
                continue
            for one in known if isinstance(known, (list, tuple)) else [known]:
                classes.setdefault(one.__name__, auto_name)
        if classes:
            yield model_type, list(classes.items())


def _in_a_process(heads: list[Head]) -> Iterator[dict[str, Any]]:
    """The records of some heads, each as soon as it is there, from a process that may die or hang."""
    if not heads:
        return
    context = multiprocessing.get_context("fork")  # transformers need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check_all, args=(heads, sender))
    process.start()
    sender.close()
    waiting = list(heads)
    why = "took too long"
    while waiting and receiver.poll(SECONDS):
        try:
            record = receiver.recv()
        except EOFError:
            why = "ended its process"
            break
        waiting.pop(0)
        yield record
    process.kill() if waiting else None
    process.join()
    if waiting:  # the first one is to blame, the others are tried without it
        yield _record(waiting[0], "failed", why)
        yield from _in_a_process(waiting[1:])


def _check_all(heads: list[Head], sender: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for head in heads:
        sender.send(check(head))
        gc.collect()


def _record(head: Head, status: str, note: str = "", **facts: Any) -> dict[str, Any]:
    return {"type": head[0], "class": head[1], "auto_class": head[2], "status": status, "note": note, **facts}


def check(head: Head) -> dict[str, Any]:
    """What becomes of one head class, with the outcome (see `MEANINGS`) in `status`."""
    model_class = getattr(transformers, head[1], None) or _by_name(head)
    candidates: list[tuple[PreTrainedModel, dict[str, Any] | None]] = []
    try:
        for candidate in tiny_models(model_class):
            candidates.append(candidate)
            if candidate[1] is not None:
                break
    except Exception as error:
        return _record(head, "not built", _in_one_line(error))
    model, inputs = candidates[-1] if candidates[-1][1] is not None else candidates[0]
    status, note = _dense_control(model, inputs, head[2])
    try:
        low_rank, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    except LowRankError as error:
        nothing = "no linear layer to factorize" in str(error)
        return _record(head, "nothing to factorize" if nothing else "failed", "" if nothing else str(error))
    facts = {"factorized": len(report.ranks), "before": report.parameters_before, "after": report.parameters_after}
    problem = _round_trip(low_rank, inputs, head[2], report.parameters_after)
    if problem:
        return _record(head, "dense fails too" if status else "failed", problem if not status else note, **facts)
    return _record(head, "ok" if inputs is not None else "ok, not run", **facts)


def _dense_control(model: PreTrainedModel, inputs: dict[str, Any] | None, auto_class: str) -> tuple[bool, str]:
    """Whether, and why, the dense model does not survive a round trip by plain transformers."""
    problem = _round_trip(model, inputs, auto_class, model.num_parameters())
    return bool(problem), problem


def _round_trip(model: PreTrainedModel, inputs: dict[str, Any] | None, auto_class: str, parameters: int) -> str:
    """Save a model, load it by its Auto class and compare; the answer says what is wrong, and is empty if nothing."""
    expected = outputs(model, inputs) if inputs is not None else None
    if inputs is not None and expected is None:
        return "the model no longer runs"
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = getattr(modeling_auto, auto_class).from_pretrained(folder).eval()
    except Exception as error:
        return _in_one_line(error)
    if type(loaded) is not type(model):
        return f"loaded as a {type(loaded).__name__}"
    before, after = model.state_dict(), loaded.state_dict()
    if before.keys() != after.keys():
        return f"other tensors: {sorted(before.keys() ^ after.keys())[0]}"
    different = [key for key, value in before.items() if not torch.equal(value, after[key])]
    if different:
        return f"another value: {different[0]}"
    if loaded.num_parameters() != parameters:
        return f"{loaded.num_parameters()} parameters instead of {parameters}"
    if expected is not None and inputs is not None:
        found = outputs(loaded, inputs) or []
        if len(found) != len(expected) or not all(_close(a, b) for a, b in zip(expected, found, strict=True)):
            return "other outputs"
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of summation, which depends on where a weight lies in memory."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def _by_name(head: Head) -> type[PreTrainedModel]:
    known = getattr(modeling_auto, head[2])._model_mapping[CONFIG_MAPPING[head[0]]]
    classes = known if isinstance(known, (list, tuple)) else [known]
    return next(one for one in classes if one.__name__ == head[1])


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
