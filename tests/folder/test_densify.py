"""densify: what comes out is an ordinary checkpoint of the base class, and computes the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank import LowRankError
from hf_lowrank.folder.densify import densify, densify_folder
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.nn.modeling_lowrank import LowRankMixin
from tests.helpers import factorize, outputs, tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": tiny_bert,
    "albert": tiny_albert,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tie_word_embeddings=True),
    "t5": tiny_t5,
}


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_checkpoint_is_one_of_the_base_class(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = MODELS[architecture]()
    low_rank = factorize(MODELS[architecture]()).to(dtype)
    expected = outputs(low_rank)
    low_rank.save_pretrained(tmp_path / "low")
    densify_folder(tmp_path / "low", tmp_path / "dense")

    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == [type(original).__name__]
    assert config["model_type"] == original.config.model_type
    assert not config.keys() & {"ranks", "auto_map", "base_model_type", "lowrank_format_version"}
    assert not list((tmp_path / "dense").glob("*.py"))

    dense, info = type(original).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    assert dense.dtype == dtype
    assert {name: weight.shape for name, weight in dense.state_dict().items()} == {
        name: weight.shape for name, weight in original.state_dict().items()
    }
    assert dense.num_parameters() == original.num_parameters()  # shared and tied ones counted once
    rounding = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        outputs(dense.eval()), expected, rtol=rounding, atol=rounding * float(expected.abs().max())
    )


def test_a_model_in_memory_is_edited_in_place() -> None:
    model = factorize(tiny_gpt2())
    expected, own_bias = outputs(model), model.transformer.h[0].mlp.c_fc.bias
    dense = densify(model)
    assert dense is model
    assert not any(isinstance(module, (LowRankLinear, LowRankMixin)) for module in dense.modules())
    assert isinstance(dense.transformer.h[0].mlp.c_fc, Conv1D)
    assert dense.transformer.h[0].mlp.c_fc.bias is own_bias
    assert dense.lm_head.weight is dense.transformer.wte.weight
    torch.testing.assert_close(outputs(dense), expected)


@pytest.mark.slow
def test_a_process_without_the_library_loads_and_generates(tmp_path: Path) -> None:
    model = factorize(tiny_gpt2())
    model.generation_config.max_new_tokens = 5
    expected = model.generate(token_ids(), do_sample=False)
    model.save_pretrained(tmp_path / "low")
    (tmp_path / "low" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "low" / "1_Pooling").mkdir()
    (tmp_path / "low" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "low" / "pytorch_model.bin").write_bytes(b"a pickle")
    densify_folder(tmp_path / "low", tmp_path / "dense")
    assert (tmp_path / "dense" / "tokenizer_config.json").is_file()
    assert (tmp_path / "dense" / "1_Pooling" / "config.json").is_file()
    assert not (tmp_path / "dense" / "pytorch_model.bin").exists()
    script = f"""
import sys; sys.modules["hf_lowrank"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("dense")
assert type(model).__name__ == "GPT2LMHeadModel"
ids = torch.tensor({token_ids().tolist()})
assert model.generate(ids, do_sample=False).tolist() == {expected.tolist()}
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_sharded_checkpoints_go_in_and_come_out_whole(tmp_path: Path) -> None:
    model = factorize(tiny_llama())
    expected = outputs(model)
    model.save_pretrained(tmp_path / "low", max_shard_size="30KB")
    assert (tmp_path / "low" / "model.safetensors.index.json").is_file()
    densify_folder(tmp_path / "low", tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    torch.testing.assert_close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_what_cannot_be_densified_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "dense")
    factorize(tiny_bert()).save_pretrained(tmp_path / "low")
    cases: list[tuple[Any, Any, str]] = [
        ("nowhere", "out", "there is no folder"),
        ("dense", "out", "is an ordinary bert model"),
        ("low", "dense", "exists and is not empty"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, target, message in cases:
        with pytest.raises(LowRankError, match=message):
            densify_folder(tmp_path / source, tmp_path / target)
    with pytest.raises(LowRankError, match="BertForSequenceClassification is not a low-rank model"):
        densify(tiny_bert())
    wrapped = factorize(tiny_bert())
    wrapped.bert.encoder.layer[0].output.dense.up = nn.Sequential(nn.Linear(8, 32))
    with pytest.raises(LowRankError, match="merging its adapters"):
        densify(wrapped)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_cannot_name_anything_but_a_model(tmp_path: Path) -> None:
    factorize(tiny_bert()).save_pretrained(tmp_path / "low")
    path = tmp_path / "low" / "config.json"
    config = json.loads(path.read_text())
    for name in ("os", "replace_module", "LowRankMixin", "LowRankNothing", ""):
        path.write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(LowRankError, match="which this version of transformers does not have"):
            densify_folder(tmp_path / "low", tmp_path / "out")
