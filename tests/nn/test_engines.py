"""Engines that put layers of their own in a model's place leave the factorized ones what they are."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_lowrank.nn import modeling_lowrank
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.engines_lowrank import warn_of_older_engines
from hf_lowrank.nn.layers_lowrank import LowRankEmbedding
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from tests.helpers import RANK, factorize, outputs, tiny_llama
from tests.launches import QUIET, ROOT
from tests.nn import vllm_source

ATTENTION, GATED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
PATTERNS: list[tuple[str, ...]] = [
    (),
    *((name,) for name in (*ATTENTION, *GATED, "self_attn.o_proj", "mlp.down_proj")),
    *(ATTENTION[:2], ATTENTION[1:], ATTENTION, GATED, (*ATTENTION, *GATED)),
]


@pytest.mark.skipif(vllm_source.source() is None, reason="HF_LOWRANK_VLLM names no vLLM sources: run .ci/engines")
@pytest.mark.parametrize("first", PATTERNS, ids="+".join)
def test_vllm_merges_the_layers_of_dense_blocks_alone(first: tuple[str, ...]) -> None:
    """Two blocks, whichever of their layers are factorized: vLLM's forward computes what the model's does."""
    with vllm_source.fusers() as fuser:
        for second in PATTERNS:
            blocks = enumerate((first, second))
            names = [f"model.layers.{number}.{name}" for number, layers in blocks for name in layers]
            model = factorize(tiny_llama(), names=names)
            fused = copy.deepcopy(model)
            merged = vllm_source.fuse(fuser, fused)
            torch.testing.assert_close(outputs(fused), outputs(model), msg=f"{first} {second}")
            whole = sum(not {*layers} & {*part} for layers in (first, second) for part in (ATTENTION, GATED))
            assert merged >= whole


@pytest.mark.slow
def test_engines_find_config_and_model_without_remote_code(tmp_path: Path) -> None:
    """As they look: the config by AutoConfig, the class by its name in transformers, the model by AutoModel."""
    factorize(tiny_llama()).save_pretrained(tmp_path)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = dict(re.findall(r'\[project.entry-points."(.+)"\]\nhf_lowrank = "(.+)"', project))
    assert set(groups) == {"vllm.general_plugins", "sglang.srt.plugins"}
    code = f"""
from importlib.metadata import EntryPoint
for group, value in {groups!r}.items():
    EntryPoint("hf_lowrank", value, group).load()()
import transformers
config = transformers.AutoConfig.from_pretrained({str(tmp_path)!r})
(name,) = config.architectures
found = getattr(transformers, name)
assert found.is_backend_compatible() or found._can_set_attn_implementation()
body = transformers.AutoModel.from_config(config, trust_remote_code=False)
assert type(body) is transformers.LowRankLlamaModel and body.lowrank_ranks
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | QUIET | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_an_engine_has_its_own_layers_for_is_refused_there(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, engine, ALL_ATTENTION_FUNCTIONS["sdpa"])
    low, head = to_low_rank_class(tiny_llama()), factorize(tiny_llama(), names=["lm_head"])
    replace_module(low, "model.embed_tokens", LowRankEmbedding.like(low.model.embed_tokens, RANK))
    for model, name in ((low, "embed_tokens"), (head, "lm_head")):
        AutoModelForCausalLM.from_config(model.config)
        model.config._attn_implementation_internal = engine
        with pytest.raises(
            ValueError, match=f"layers of its own .* and {name} is factorized: compress the model without"
        ):
            AutoModel.from_config(model.config)


@pytest.mark.parametrize(
    ("engine", "version", "message"),
    [
        ("vllm", "0.20.1", "vLLM 0.20.1 is older than 0.33, .* upgrade it, or serve the dense form"),
        ("sglang", "0.4.9", "SGLang 0.4.9 is older than 0.5, "),
        ("vllm", "0.33.0", None),
    ],
)
def test_an_older_engine_is_named(
    engine: str, version: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{engine}-{version}.dist-info").mkdir()
    (tmp_path / f"{engine}-{version}.dist-info" / "METADATA").write_text(f"Name: {engine}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings() if message is None else pytest.warns(UserWarning, match=message):
        warn_of_older_engines()


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.initialization", None)
    monkeypatch.delattr(sys.modules["transformers"], "initialization", raising=False)
    source = Path(modeling_lowrank.__file__).read_text(encoding="utf-8")
    with pytest.raises(ImportError, match="need transformers 5.5 or newer, and this is .*: upgrade it"):
        exec(compile(source, "modeling_lowrank.py", "exec"), {"__name__": "copied"})
