"""A model of sentence-transformers → what follows its transformer, such as pooling, and the files that say so.

The transformer itself is in its folder, or on the Hub, as transformers writes it. `modules.json` lists it and what
follows.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.hub_errors import hub_problem, one_line
from hf_lowrank.folder.tokenizers import stored_file
from hf_lowrank.model.locating import resolve
from hf_lowrank.model.predictions import Readout

MODULES = "modules.json"
FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
FOLLOWING = ("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")


@dataclass(frozen=True)
class Sentences:
    """What makes embeddings of texts out of a transformer's hidden states.

    Args:
        parts: sentence-transformers' own modules, in their order.
    """

    parts: tuple[nn.Module, ...]

    @property
    def readout(self) -> Readout | None:
        """What counts of the transformer's outputs; None of cross-encoders, whose own outputs do."""
        return self.sentence_embedding if self.parts else None

    def sentence_embedding(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """A readout: the embedding of every text of a batch [batch, features]."""
        features = {"token_embeddings": outputs.last_hidden_state, "attention_mask": batch["attention_mask"]}
        for part in self.parts:
            features = part.to(outputs.last_hidden_state.device)(features)
        return features["sentence_embedding"]


def copy_modules(model: PreTrainedModel, folder: Path) -> None:
    """Write beside a saved model what makes a sentence-transformers folder of it, if it was loaded from one.

    Not of a model that got a head since: what follows the transformer there is for its hidden states.

    Raises:
        LowRankError: a dense model is packed by compressed-tensors.
    """
    source = _known(model.name_or_path) if model.name_or_path else None
    if source is None or source.resolve() == folder.resolve():
        return
    listed = json.loads((source / MODULES).read_text(encoding="utf-8"))  # whatever it names: copying needs no more
    paths = [module["path"] for module in listed if module["path"]]
    if paths and model.base_model is not model:
        return
    _refuse_packed_dense(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in paths:
        if (source / path).is_dir():  # older folders have none for what needs no settings
            shutil.copytree(source / path, folder / path, dirs_exist_ok=True)


def _refuse_packed_dense(config: dict[str, Any]) -> None:
    """compressed-tensors widens at a first call, which sentence-transformers passes; low-rank models do it before."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "compressed-tensors" and not config.get("ranks"):
        raise LowRankError(
            "sentence-transformers cannot run a dense model that compressed-tensors has packed: compress it first, or "
            "quantize it with --library torchao"
        )


def read_sentences(name: str) -> Sentences | None:
    """What follows the transformer of the model called `name`; None if it is not of sentence-transformers.

    Raises:
        LowRankError: it has modules that are not known, pickled weights, or no transformer at its top; or
            sentence-transformers is not installed.
    """
    folder = _found(name)
    if folder is None:
        return None
    listed = _listed(folder)
    paths = tuple(module["path"] for module in listed[1:])
    if not Path(resolve(name)).is_dir():
        _download(name, paths)
    if pickled := [path for path in paths if any((folder / path).glob("*.bin"))]:
        raise LowRankError(
            f"the weights in {folder / pickled[0]} are pickled, and are never read: save the model again"
        )
    return Sentences(_parts(resolve(name), len(listed)))


def embeds_sentences(name: str) -> bool:
    """Whether the model called `name` is of sentence-transformers, and no cross-encoder."""
    folder = _found(name)
    return folder is not None and len(_listed(folder)) > 1


def _found(name: str) -> Path | None:
    """The folder with `MODULES` of the model called `name`, of one on the Hub that of its copy; None without."""
    path = stored_file(resolve(name), MODULES)
    return None if path is None else Path(path).parent


def _known(name: str) -> Path | None:
    """As `_found`, of a copy that is here already."""
    if (Path(name) / MODULES).is_file():
        return Path(name)
    with suppress(HFValidationError):  # a path
        path = try_to_load_from_cache(name, MODULES)
        return Path(path).parent if isinstance(path, str) else None
    return None


def _download(name: str, paths: Sequence[str]) -> None:
    """Bring what is not the transformer's from the Hub, beside its copy."""
    try:
        snapshot_download(name, allow_patterns=[*FILES, *(f"{path}/*" for path in paths)])
    except Exception as error:
        raise LowRankError(f"{name}: {hub_problem(error) or one_line(error)}") from error


def _listed(folder: Path) -> Sequence[dict[str, Any]]:
    """The modules of a folder, checked."""
    try:
        listed = sorted(json.loads((folder / MODULES).read_text(encoding="utf-8")), key=lambda module: module["idx"])
        kinds = [module["type"] for module in listed]
        first = (kinds[0].rpartition(".")[2], listed[0]["path"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise LowRankError(f"{folder / MODULES} is not a list of sentence-transformers' modules") from error
    if first != ("Transformer", ""):
        raise LowRankError(
            f"{folder / MODULES} begins with a {first[0]} in {first[1] or 'the folder itself'}; only a Transformer in "
            "the folder itself can be compressed: save the model again with a current sentence-transformers"
        )
    for kind in kinds:
        known = kind.startswith("sentence_transformers.") and kind.rpartition(".")[2] in ("Transformer", *FOLLOWING)
        if not known:
            raise LowRankError(
                f"{folder / MODULES} names {kind}, which is not known what it does; known are {', '.join(FOLLOWING)}"
            )
    return listed


def _parts(folder: str, count: int) -> tuple[nn.Module, ...]:
    """What follows the transformer, as sentence-transformers loads it."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise LowRankError(
            f"{folder} is of sentence-transformers, which is not installed: pip install sentence-transformers"
        ) from error
    if count == 1:
        return ()
    model = SentenceTransformer(folder, device="cpu", local_files_only=Path(folder).is_dir())
    return tuple(model[number].eval().requires_grad_(False) for number in range(1, count))
