"""Statistics of a model's layers that know their unit, their sample count and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import atomic_folder, read_json, sha256_of, write_json
from hf_lowrank.model.targets import Target
from hf_lowrank.model.weights import digest
from hf_lowrank.statistics.kinds import KINDS, sum_shape
from hf_lowrank.statistics.kronecker import cosine
from hf_lowrank.statistics.names import ALTERNATING

FORMAT_VERSION = 2
TENSORS, RECORD = "statistics.safetensors", "statistics.json"


@dataclass
class Statistics:
    """Sums over samples, by kind (see `KINDS`) and module name, in float32.

    Modules that read the same input share one tensor of the kinds that depend on nothing else, in memory and on disk.

    Args:
        sums: {kind: {module name: sum}}; the shape of a sum is that of its kind, such as [out, in] of "fisher".
        samples: how many samples they are over.
        tokens: how many tokens of those were no padding.
        weights: a digest of every weight they were measured on, so that they cannot be used for another model.
        origin: in plain words which model, task, data and seed that was.
        curvature: what the Fisher information is multiplied by to be the curvature of the mean loss (see
            `curvature_per_fisher`).
        labels: whose labels the losses are by, "data" or "model" (see `compute_statistics`).
    """

    sums: Mapping[str, Mapping[str, Tensor]]
    samples: int
    tokens: int
    weights: dict[str, str]
    origin: dict[str, Any] = field(default_factory=dict)
    curvature: float = 1.0
    labels: str = "data"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were measured."""
        return tuple(self.sums)

    def joined(self, other: "Statistics") -> "Statistics":
        """These and the kinds of `other`, which was measured on the same samples.

        Args:
            other: of other kinds; where both have one, its sums count.

        Raises:
            LowRankError: they are by other labels.
        """
        self.check_labels(other.labels)
        return replace(self, sums={**self.sums, **other.sums})

    def check_labels(self, labels: str) -> None:
        """Raise unless the losses were by these labels.

        Args:
            labels: "data" or "model".

        Raises:
            LowRankError: they were by others.
        """
        if self.labels != labels:
            raise LowRankError(
                f"these statistics were measured with the labels of the {self.labels}, not of the {labels}; "
                "measure them again"
            )

    def has(self, kind: str) -> bool:
        """Whether `mean` can answer for a kind.

        Args:
            kind: a name in `KINDS`.
        """
        return kind in self.sums or (kind == "fisher_rows" and "fisher" in self.sums)

    def mean(self, kind: str, name: str) -> Tensor:
        """The mean over samples of a kind for the module called `name`.

        Args:
            kind: a name in `KINDS`, of which the mean has the shape, such as [out, in] of "fisher".
            name: of the module.

        Raises:
            LowRankError: the kind or the module was not measured.
        """
        return self._sum(kind, name) / self.samples

    def _sum(self, kind: str, name: str) -> Tensor:
        if not self.has(kind):
            raise LowRankError(
                f"these statistics have no {kind!r}, only {', '.join(self.kinds)}; measure it with "
                f"`hf-lowrank statistics MODEL --task … --kind {kind}`"
            )
        by_name = self.sums.get(kind, self.sums.get("fisher", {}))
        if name not in by_name:
            raise LowRankError(
                f"these statistics know nothing of the module {name!r}: measure it too, or leave it out (include); "
                f"they were measured on {self._source()}"
            )
        total = by_name[name]
        return total if kind in self.sums else total.sum(dim=0)

    def fisher_cosine(self, name: str) -> float | None:
        """That of the Kronecker factors of a module with the Fisher information of whole samples; None if not measured.

        To a few percent (see `cosine`).

        Args:
            name: of the module.
        """
        kinds = (*ALTERNATING, "fisher_sketch")
        return cosine(*(self.mean(kind, name) for kind in kinds)) if all(map(self.has, kinds)) else None

    def reach(self, name: str) -> bool:
        """Whether any sample's loss depended on the module: not on an expert that none was routed to.

        Where no gradients were kept, whether it depended on what the module reads.

        Args:
            name: of the module.
        """
        kinds = [kind for kind in self.sums if not KINDS[kind].of_input] or self.kinds
        return any(bool(self.sums[kind][name].any()) for kind in kinds if name in self.sums[kind])

    def check(self, targets: Mapping[str, Target], kinds: tuple[str, ...]) -> None:
        """Raise unless every target has these kinds, measured on the very weight it has now.

        Args:
            targets: the layers that are to be factorized (see `find_targets`).
            kinds: names in `KINDS`.

        Raises:
            LowRankError: a kind is missing, or a module is unknown, has another shape or other weights.
        """
        self.check_shapes(targets, kinds)
        for name, target in targets.items():
            if kinds and self.weights.get(name) != digest(target.module):
                raise LowRankError(
                    f"{name}: the statistics were measured on other weights ({self._source()}); "
                    "measure them again on this model"
                )

    def check_shapes(self, targets: Mapping[str, Target], kinds: tuple[str, ...]) -> None:
        """Raise unless every target has these kinds, in the shapes of its weight.

        Args:
            targets: layers, factorized or not.
            kinds: names in `KINDS`.

        Raises:
            LowRankError: a kind is missing, or a module is unknown or has another shape.
        """
        for name, target in targets.items():
            for kind in kinds:
                shape, expected = tuple(self._sum(kind, name).shape), sum_shape(kind, target)
                if shape != expected:
                    raise LowRankError(
                        f"{name}: {kind} has shape {shape}, its weight needs {expected}; is it another model's?"
                    )

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write `statistics.safetensors` and `statistics.json` into a new folder, both or none.

        Args:
            folder: a new one.
            overwrite: replace it, should it exist.

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

        Args:
            folder: where they were saved.

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
        counts = record["samples"], record["tokens"]
        of = record["weights"], record["origin"], record["curvature"], record.get("labels", "data")
        return cls(sums, *counts, *of)

    def _record(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kinds": {kind: KINDS[kind].unit for kind in self.sums},
            "samples": self.samples,
            "tokens": self.tokens,
            "curvature": self.curvature,
            "labels": self.labels,
            "origin": self.origin,
            "weights": self.weights,
        }

    def _source(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.origin.items()) or "an unnamed model"


def statistics_digest(folder: str | Path) -> str:
    """What tells saved statistics from all others: the checksum of their tensors."""
    return read_json(Path(folder) / RECORD)["sha256"]
