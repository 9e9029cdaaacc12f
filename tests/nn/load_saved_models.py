"""Loads what saved_models.py saved: `python load_saved_models.py FOLDER library`, or `own` for the folders' own code.

It imports nothing of the tests, as those import the library.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def computed(folder: Path, input: torch.Tensor, own_code: bool) -> torch.Tensor:
    auto_class = getattr(transformers, folder.name.partition("-")[0])
    model = auto_class.from_pretrained(folder, trust_remote_code=own_code).eval()
    inputs = {"input_ids": input} | ({"decoder_input_ids": input} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model(**inputs)[0]


def main(root: Path, code: str) -> None:
    if code == "library":
        import hf_lowrank  # noqa: F401
    else:
        sys.modules["hf_lowrank"] = None  # type: ignore[assignment]  # where it is installed, it is not imported
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for folder in folders:
        expected = load_file(folder / "expected.safetensors")
        output = computed(folder, expected["input"], own_code=code != "library")
        torch.testing.assert_close(output, expected["output"])
    print(f"transformers {transformers.__version__}: {len(folders)} models give the same outputs, code: {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
