"""Tiny low-rank models, saved with what they compute: `python -m tests.nn.saved_models FOLDER` (see .ci/versions)."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.helpers import factorize, outputs, tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids

# By the Auto class that loads them. Some of the layers may be dense, as they are in most compressed models.
MODELS = {
    "AutoModelForSequenceClassification-bert": lambda: factorize(tiny_bert()),
    "AutoModelForSequenceClassification-albert": lambda: factorize(tiny_albert()),
    "AutoModelForCausalLM-gpt2": lambda: factorize(tiny_gpt2()),
    "AutoModelForCausalLM-llama": lambda: factorize(tiny_llama(), names=["model.layers.0.self_attn.q_proj"]),
    "AutoModelForSeq2SeqLM-t5": lambda: factorize(tiny_t5()),
}


def save(folder: Path) -> None:
    """A folder for every model, with the `input` and `output` of a batch in expected.safetensors."""
    for name, make in MODELS.items():
        model = make()
        model.save_pretrained(folder / name)
        save_file({"input": token_ids(), "output": outputs(model)}, folder / name / "expected.safetensors")


if __name__ == "__main__":
    save(Path(sys.argv[1]))
