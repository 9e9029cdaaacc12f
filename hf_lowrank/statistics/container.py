"""Statistics of a model's layers that know their unit, their sample count and where they come from."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lowrank.errors import LowRankError
from hf_lowrank.files import atomic_folder, read_json, sha256_of, write_json
from hf_lowrank.modeling_lowrank import dense_weight
from hf_lowrank.statistics.kinds import KINDS

FORMAT_VERSION = 2
TENSORS, RECORD = "statistics.safetensors", "statistics.json"


@dataclass
class Statistics:
    """Sums over samples, by kind (see `KINDS`) and module name, in float32.

    Modules that read the same input share one tensor of the kinds that depend on nothing else, in memory and on disk.

    `weights` holds a digest of every weight they were measured on, so that they cannot be used for another model;
    `origin` says in plain words which model, task, data and seed that was.
    """

    sums: dict[str, dict[str, Tensor]]
    samples: int
    tokens: int
    weights: dict[str, str]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were measured."""
        return tuple(self.sums)

    def joined(self, other: "Statistics") -> "Statistics":
        """These and the kinds of `other`, which was measured on the same samples."""
        return Statistics(self.sums | other.sums, self.samples, self.tokens, self.weights, self.origin)

    def has(self, kind: str) -> bool:
        """Whether `mean` can answer for a kind."""
        return kind in self.sums or (kind == "fisher_rows" and "fisher" in self.sums)

    def mean(self, kind: str, name: str) -> Tensor:
        """The mean over samples of a kind for the module called `name`.

        Raises:
            LowRankError: the kind or the module was not measured.
        """
        if not self.has(kind):
            raise LowRankError(
                f"these statistics have no {kind!r}, only {', '.join(self.kinds)}; measure it with "
                f"`hf-lowrank statistics MODEL --task … --kind {kind}`"
            )
        by_name = self.sums.get(kind, self.sums.get("fisher", {}))
        if name not in by_name:
            raise LowRankError(
                f"these statistics know nothing of the module {name!r}; they were measured on {self._source()}"
            )
        total = by_name[name]
        return (total if kind in self.sums else total.sum(dim=0)) / self.samples

    def check(self, targets: dict[str, nn.Module], kinds: tuple[str, ...]) -> None:
        """Raise unless every target has these kinds, measured on the very weight it has now.

        Raises:
            LowRankError: a kind is missing, or a module is unknown, has another shape or other weights.
        """
        for name, module in targets.items():
            out_features, in_features = dense_weight(module).shape
            for kind in kinds:
                shape, expected = tuple(self.mean(kind, name).shape), KINDS[kind].shape(out_features, in_features)
                if shape != expected:
                    raise LowRankError(
                        f"{name}: {kind} has shape {shape}, its weight needs {expected}; is it another model's?"
                    )
            if kinds and self.weights.get(name) != digest(module):
                raise LowRankError(
                    f"{name}: the statistics were measured on other weights ({self._source()}); "
                    "measure them again on this model"
                )

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `statistics.safetensors` and `statistics.json` into a new folder, both or none.

        Raises:
            LowRankError: the folder exists and `overwrite` is off.
        """
        with atomic_folder(folder, overwrite) as whole:
            first: dict[int, str] = {}  # a shared tensor is written under the first of its keys
            keys = {f"{kind}/{name}": t for kind, by_name in self.sums.items() for name, t in by_name.items()}
            stored_as = {key: first.setdefault(id(tensor), key) for key, tensor in keys.items()}
            save_file({key: keys[key].contiguous() for key in first.values()}, whole / TENSORS)
            shared = {key: other for key, other in stored_as.items() if key != other}
            write_json(whole / RECORD, self._record() | {"shared": shared, "sha256": sha256_of(whole / TENSORS)})

    @classmethod
    def load(cls, folder: str | Path) -> "Statistics":
        """Read what `save` wrote. The tensors stay on disk, mapped into memory, until they are used.

        Raises:
            LowRankError: a file is missing, damaged, or of a newer format.
        """
        record = read_json(Path(folder) / RECORD)
        if record.get("format_version") != FORMAT_VERSION:
            raise LowRankError(
                f"{folder}: statistics of format {record.get('format_version')}, this version reads {FORMAT_VERSION}"
            )
        path = Path(folder) / TENSORS
        if not path.is_file() or sha256_of(path) != record["sha256"]:
            raise LowRankError(
                f"{path} is missing or damaged (its checksum is not the recorded one); measure the statistics again"
            )
        try:
            flat = load_file(path)
        except SafetensorError as error:
            raise LowRankError(f"{path} cannot be read: {error}") from None
        flat |= {key: flat[other] for key, other in record["shared"].items()}
        sums: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            kind, _, name = key.partition("/")
            sums.setdefault(kind, {})[name] = tensor
        return cls(sums, record["samples"], record["tokens"], record["weights"], record["origin"])

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kinds": {kind: KINDS[kind].unit for kind in self.sums},
            "samples": self.samples,
            "tokens": self.tokens,
            "origin": self.origin,
            "weights": self.weights,
        }

    def _source(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.origin.items()) or "an unnamed model"


def digest(module: nn.Module) -> str:
    """A digest of a linear's weight, the same in float32 and in the half precision it was read from."""
    return hashlib.blake2b(
        dense_weight(module).detach().float().contiguous().cpu().numpy().tobytes(), digest_size=16
    ).hexdigest()
