"""A folder with a low-rank model, and what its record says of it → checks, each passed, failed or skipped."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.fingerprint import probe, probe_output, sample
from hf_lowrank.folder.reading import load_low_rank, load_whole, low_rank_class, read_low_rank_config
from hf_lowrank.folder.saving import read_record
from hf_lowrank.jobs.files import sha256_of
from hf_lowrank.nn.editing_lowrank import unstack_experts
from hf_lowrank.nn.layers_lowrank import LowRankLayer, dense_weight
from hf_lowrank.nn.modeling_lowrank import LowRankMixin

PASS, FAIL, SKIP, INFO = "PASS", "FAIL", "SKIP", "INFO"  # the last one is measured and not judged

# Largest difference of outputs, relative to their norm: between processors and library versions, not between models.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_PRECISION_TOLERANCE = 0.05
LATER = {"finetuning": "fine-tuned", "quantization": "quantized"}  # keys of a record
LAYER_TOLERANCE = 1e-3  # of a layer's relative error, which is measured on the stored factors


@dataclass(frozen=True)
class Check:
    """One check: what was checked, its outcome, and the evidence in a sentence."""

    name: str
    status: str
    detail: str


def verify(folder: str | Path, against: str | Path | None = None) -> list[Check]:
    """Check that a saved low-rank model is whole, and is the one that its record describes.

    Files by their SHA-256, config and shapes by loading, all weights for finiteness, and the outputs for a fixed
    input. With `against`, the dense model it was made from, also that the layers left alone are still its own and that
    the factorized ones are as far from it as the record says.

    Raises:
        LowRankError: there is no model to check, or no dense one to compare with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LowRankError(f"there is no folder {folder}")
    record = read_record(folder) or {}
    checks = [_files(folder, record)]
    try:
        model: Any = load_low_rank(folder)
    except LowRankError as error:
        return [*checks, Check("config and shapes", FAIL, str(error))]
    layers = len(model.factorized_layers())
    loaded = f"{type(model).__name__}, {model.num_parameters():,} parameters, {layers} layers factorized"
    checks += [Check("config and shapes", PASS, loaded), _finite(model), _output(model, record)]
    if against is not None:
        dense = load_whole(low_rank_class(read_low_rank_config(folder)).base_model_class, against, model.dtype)
        checks += _against(model, dense, record)
    return checks


def _files(folder: Path, record: dict[str, Any]) -> Check:
    """Every file that the record lists is there and unchanged, and no weights are there that it does not list."""
    digests = record.get("fingerprint", {}).get("files")
    if not digests:
        return Check("checksums", SKIP, "the record holds none; the model was saved without")
    outside = [name for name in digests if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        return Check("checksums", FAIL, f"the record names {outside[0]!r}, which is outside of the folder")
    missing = [name for name in digests if not (folder / name).is_file()]
    changed = [name for name in digests if name not in missing and sha256_of(folder / name) != digests[name]]
    weights = {path.name for path in folder.glob("*.safetensors")}
    problems = [
        *(f"{name} is missing" for name in missing),
        *(f"{name} has changed" for name in changed),
        *(f"{name} was added" for name in sorted(weights - digests.keys())),
    ]
    if problems:
        return Check("checksums", FAIL, ", ".join(problems))
    return Check("checksums", PASS, f"{len(digests)} files by SHA-256")


def _finite(model: PreTrainedModel) -> Check:
    bad = {name: int((~torch.isfinite(_plain(weight))).sum()) for name, weight in model.named_parameters()}
    for name, count in bad.items():
        if count:
            return Check("finite", FAIL, f"{name}: {count} of its weights are not finite")
    return Check("finite", PASS, f"{len(bad)} tensors")


def _plain(weight: Tensor) -> Tensor:
    """A weight as numbers, where a quantizer made it something else."""
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()


def _output(model: PreTrainedModel, record: dict[str, Any]) -> Check:
    """What the model computes for the fixed input is what it computed when it was saved."""
    recorded = record.get("fingerprint", {}).get("output")
    if not recorded or "skipped" in recorded:
        return Check("outputs as recorded", SKIP, (recorded or {}).get("skipped", "the record holds none"))
    output = probe_output(model)
    if list(output.shape) != recorded["shape"]:
        return Check("outputs as recorded", FAIL, f"shape {list(output.shape)}, recorded {recorded['shape']}")
    difference = _difference(torch.tensor(sample(output)), torch.tensor(recorded["values"]))
    tolerance = TOLERANCE.get(model.dtype, HALF_PRECISION_TOLERANCE)
    status = PASS if difference <= tolerance else FAIL  # NaN fails
    return Check("outputs as recorded", status, f"relative difference {difference:.1e}, at most {tolerance:g}")


def _against(model: LowRankMixin, dense: PreTrainedModel, record: dict[str, Any]) -> Iterator[Check]:
    """Comparisons with the dense model."""
    changed = [how for key, how in LATER.items() if key in record]
    low_rank = model.factorized_layers()
    unstack_experts(dense, low_rank)
    misfit = next((problem for name in low_rank if (problem := _misfit(name, low_rank[name], dense))), None)
    if misfit:
        yield Check("same architecture", FAIL, misfit)
        return
    saved = dense.num_parameters() - model.num_parameters()
    share = f"{model.num_parameters():,} of {dense.num_parameters():,} parameters"
    yield Check("smaller", PASS if saved > 0 else FAIL, share)
    if changed:
        yield Check("other weights unchanged", SKIP, f"the model was {changed[0]} after compression")
        yield Check("layers' errors as recorded", SKIP, f"the model was {changed[0]} after compression")
    else:
        yield _unchanged(model, dense)
        yield _layer_errors(low_rank, dense, record)
    if skipped := probe(model).get("skipped"):
        yield Check("outputs", SKIP, skipped)
    else:
        difference = _difference(probe_output(model), probe_output(dense))
        yield Check("outputs", INFO, f"{difference:.1%} from the dense model's, on random tokens")


def _misfit(name: str, layer: LowRankLayer, dense: nn.Module) -> str | None:
    try:
        weight = dense_weight(dense.get_submodule(name))
    except (AttributeError, ValueError):
        return f"the dense model has no linear layer {name}"
    if weight.shape != (layer.out_features, layer.in_features):
        return f"{name} is {list(weight.shape)} in the dense model, {[layer.out_features, layer.in_features]} here"
    return None


def _unchanged(model: PreTrainedModel, dense: PreTrainedModel) -> Check:
    before, after = dense.state_dict(), model.state_dict()
    shared = before.keys() & after.keys()
    changed = sorted(key for key in shared if not torch.equal(before[key], after[key]))
    if changed:
        return Check("other weights unchanged", FAIL, f"{len(changed)} of {len(shared)} differ, such as {changed[0]}")
    return Check("other weights unchanged", PASS, f"{len(shared)} tensors are equal")


def _layer_errors(low_rank: dict[str, LowRankLayer], dense: nn.Module, record: dict[str, Any]) -> Check:
    """‖W − UD‖ / ‖W‖ of every layer is what the record says."""
    name_of_check = "layers' errors as recorded"
    if "healing" in record:
        return Check(name_of_check, SKIP, "the factors were healed after compression")
    recorded = {layer["name"]: layer["relative_error"] for layer in record.get("layers", [])}
    unknown = sorted(low_rank.keys() - recorded.keys())
    if unknown:
        return Check(name_of_check, SKIP, f"the record does not name {unknown[0]}")
    furthest, distance = "", 0.0
    for name, layer in low_rank.items():
        weight = dense_weight(dense.get_submodule(name)).float()
        up, down = layer.matrices()
        product = up.float() @ down.float()
        off = abs(_difference(product, weight) - recorded[name])
        if not off <= distance:
            furthest, distance = name, off
    if not distance <= LAYER_TOLERANCE:
        return Check(name_of_check, FAIL, f"{furthest}: off by {distance:.1e}, at most {LAYER_TOLERANCE:g}")
    return Check(name_of_check, PASS, f"{len(low_rank)} layers, off by at most {distance:.1e}")


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
