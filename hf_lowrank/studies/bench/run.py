"""A folder with a low-rank model (and its dense base) → both loaded, and timed in turns over shapes of input."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.card import weights_bytes
from hf_lowrank.folder.densify import densify, densify_folder
from hf_lowrank.folder.packing import widened
from hf_lowrank.folder.reading import load_low_rank, load_whole, own_class, quantized_by, read_config
from hf_lowrank.jobs.progress import bar
from hf_lowrank.jobs.turns import Call, seconds_in_turns
from hf_lowrank.studies.bench.cache import cache_bytes
from hf_lowrank.studies.bench.machine import machine_facts
from hf_lowrank.studies.bench.measure import operations, peak_bytes, weight_bytes
from hf_lowrank.studies.bench.record import DENSE, LOW, BenchRecord, Case

LOADS = 5  # of each model, after one that is not counted
DECODED = 16  # tokens in one turn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure. `dtype` is float32 on a CPU, and that of the checkpoint on an accelerator, unless given.

    Raises:
        LowRankError: a number below 1 or a dtype that is not in `DTYPES`.
    """

    batches: tuple[int, ...] = (1, 32)
    lengths: tuple[int, ...] = (16, 128)
    rounds: int = 20
    dtype: str | None = None
    compiled: bool = False

    def __post_init__(self) -> None:
        if min((*self.batches, *self.lengths, self.rounds), default=0) < 1 or not self.batches or not self.lengths:
            raise LowRankError("batches, lengths and rounds must be at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"unknown dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")


def bench(
    folder: str | Path, against: str | Path | None = None, config: BenchConfig | None = None, progress: bool = True
) -> BenchRecord:
    """Measure the model in `folder` beside another: `against`, or its own dense form (see `densify`).

    Either may be dense or low-rank, quantized or not; the other one is called dense in the record. Quantized models
    are timed as their library runs them here: compressed-tensors' weight-only ones with widened weights.

    Tokens are random. A causal language model is measured at reading a prompt ("prefill") and at writing after it
    ("decode", per token), others at a "forward" pass.

    Raises:
        LowRankError: a model of images or sound, one that is not whole, nothing `against` one that is dense or that
            another library than compressed-tensors quantized, one of another vocabulary, or inputs too long for it.
    """
    config = config or BenchConfig()
    low_class = own_class(model_config := read_config(folder))
    if against is None and not getattr(model_config, "ranks", None):
        raise LowRankError(f"{folder} is dense: say what to measure it against, such as the model it was made from")
    if not hasattr(model_config.get_text_config(), "vocab_size"):
        raise LowRankError(f"{folder} reads other things than tokens, such as images; only models of tokens are timed")
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None) or max(config.lengths)
    if max(config.lengths) > longest:
        raise LowRankError(f"{folder} takes at most {longest} tokens, not {max(config.lengths)}")
    with tempfile.TemporaryDirectory(prefix="hf-lowrank-bench-") as scratch:
        if against is None:
            _write_dense_form(folder, Path(scratch) / "dense")
        other = against or Path(scratch) / "dense"
        places = {DENSE: (own_class(read_config(other)), other), LOW: (low_class, folder)}
        return _bench(places, str(against or "densified"), config, progress)


def _write_dense_form(folder: str | Path, output: Path) -> None:
    """The densified model, of a quantized one that of its widened weights.

    Raises:
        LowRankError: as `densify_folder`; the library that quantized it has no way back.
    """
    library = quantized_by(folder)
    if library is None:
        densify_folder(folder, output)
    elif library == "compressed-tensors":
        densify(widened(load_low_rank(folder))).save_pretrained(output)
    else:
        raise LowRankError(
            f"{folder} is quantized by {library}: say what to measure it against, such as the model it was made from"
        )


def _bench(places: dict[str, Any], dense_name: str, config: BenchConfig, progress: bool) -> BenchRecord:
    device = PartialState().device
    on_cpu = device.type == "cpu"
    dtype: Any = DTYPES[config.dtype] if config.dtype else (torch.float32 if on_cpu else "auto")

    def load(which: str) -> PreTrainedModel:
        model_class, place = places[which]
        return nn.Module.to(load_whole(model_class, place, dtype), device)

    loads, first_outputs = _time_loading(load, config, device)
    models = {which: load(which) for which in places}
    if models[DENSE].config.vocab_size != models[LOW].config.vocab_size:
        raise LowRankError(f"{places[DENSE][1]} has another vocabulary than {places[LOW][1]}: is it the dense model?")
    shapes = [(batch, length) for batch in config.batches for length in config.lengths]
    measured: list[Case] = []
    with bar("benchmarking", len(shapes), "shapes", progress) as shown, torch.inference_mode():
        for batch, length in shapes:
            measured += cases(models, batch, length, config, device)
            shown.update()
    return BenchRecord(
        model=Path(places[LOW][1]).resolve().name,
        dense=Path(dense_name).name,
        dtype=str(models[LOW].dtype).removeprefix("torch."),
        compiled=config.compiled,
        quantized_by=quantized_by(places[LOW][1]),
        rounds=config.rounds,
        machine=machine_facts(device),
        parameters={which: model.num_parameters() for which, model in models.items()},
        bytes={which: _file_bytes(place) for which, (_, place) in places.items()},
        load_seconds=loads,
        first_output_seconds=first_outputs,
        cases=tuple(measured),
        cache_bytes=cache_bytes(models[LOW]) if _is_causal(models[LOW]) else {},
    )


def _time_loading(
    load: Callable[[str], PreTrainedModel], config: BenchConfig, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds to load each model, and to load it and have its first output. Files are in the system's cache."""
    loaded: dict[str, list[float]] = {DENSE: [], LOW: []}
    answered: dict[str, list[float]] = {DENSE: [], LOW: []}
    for turn in range(LOADS + 1):
        for which in loaded:
            started = time.perf_counter()
            model = load(which)  # the one before is let go with it
            between = time.perf_counter()
            with torch.inference_mode():
                model(**_inputs(model, min(config.batches), min(config.lengths)))[0].cpu()
            if turn > 0:
                loaded[which].append(between - started)
                answered[which].append(time.perf_counter() - started)
    return _medians(loaded), _medians(answered)


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {which: statistics.median(taken) for which, taken in seconds.items()}


def cases(
    models: dict[str, PreTrainedModel], batch: int, length: int, config: BenchConfig, device: torch.device
) -> Iterator[Case]:
    """The phases of one shape of input, both models in turns."""
    generates = _is_causal(models[LOW])
    phases: dict[str, Callable[[PreTrainedModel], Call]] = {
        "prefill" if generates else "forward": lambda model: _forward(model, batch, length)
    }
    if generates:
        phases["decode"] = lambda model: _decode(model, batch, length)
    for phase, prepare in phases.items():
        calls = {which: prepare(model) for which, model in models.items()}
        counts = {which: operations(call) for which, call in calls.items()}
        peaks = {which: peak_bytes(call, device) + weight_bytes(models[which]) for which, call in calls.items()}
        if config.compiled:
            compiled = {which: _compiled(model) for which, model in models.items()}
            calls = {which: prepare(model) for which, model in compiled.items()}
        per_call = DECODED if phase == "decode" else 1
        seconds = seconds_in_turns(calls, config.rounds, device)
        yield Case(
            phase,
            batch,
            length,
            {which: [one / per_call for one in times] for which, times in seconds.items()},
            {which: count // per_call for which, count in counts.items()},
            peaks,
        )


def _forward(model: Any, batch: int, length: int) -> Call:
    inputs = _inputs(model, batch, length)
    return lambda: model(**inputs)


def _decode(model: Any, batch: int, length: int) -> Call:
    """Write `DECODED` tokens after a prompt; the cache is then cut back to the prompt."""
    prompt = _inputs(model, batch, length)
    cache = model(**prompt, use_cache=True).past_key_values
    token = prompt["input_ids"][:, -1:]

    def call() -> None:
        for _ in range(DECODED):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-DECODED)

    return call


def _inputs(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs = {"input_ids": ids}
    if not _is_causal(model):
        inputs["attention_mask"] = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def _is_causal(model: PreTrainedModel) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


def _compiled(model: PreTrainedModel) -> Any:
    torch._dynamo.reset()
    return torch.compile(model)


def _file_bytes(place: str | Path) -> int | None:
    """Bytes of the weight files of a folder; None for a model on the Hub."""
    return weights_bytes(Path(place)) if Path(place).is_dir() else None
