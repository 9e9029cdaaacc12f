"""What directions are worth, beside the weights: written without being in memory all at once."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from weakref import WeakSet

import torch

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression.directions import Directions
from hf_lowrank.folder.directions import load_directions, save_directions
from hf_lowrank.folder.saving import save_compressed
from tests.helpers import tiny_bert


class Counted(Mapping[str, Directions]):
    """Directions that are made when they are asked for, and how many layers' were there at once."""

    def __init__(self, directions: Mapping[str, Directions]) -> None:
        self.directions, self.alive, self.most = directions, WeakSet[torch.Tensor](), 0

    def __getitem__(self, name: str) -> Directions:
        found = Directions(*(part.clone() for part in vars(self.directions[name]).values()))
        self.alive.add(found.basis)
        self.most = max(self.most, len(self.alive))
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.directions)

    def __len__(self) -> int:
        return len(self.directions)


def test_they_are_saved_a_layer_at_a_time(tmp_path: Path) -> None:
    config = CompressionConfig("svd", rank_ratio=0.5, align=1)
    model, report = compress(tiny_bert(num_hidden_layers=3), config, progress=False)
    save_compressed(model, None, report, tmp_path / "model")
    (tmp_path / "model" / "directions.safetensors").unlink()
    counted = Counted(report.directions)
    save_directions(counted, model, tmp_path / "model")
    assert len(counted) > 4
    assert counted.most <= 2
    assert not [*(tmp_path / "model").glob("*.raw")]
    for name, found in load_directions(model, str(tmp_path / "model")).items():
        for part, tensor in vars(found).items():
            assert torch.equal(tensor, getattr(report.directions[name], part))
