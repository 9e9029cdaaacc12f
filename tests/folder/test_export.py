"""export: the ONNX file computes what the model does at every shape, with its factors kept."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, ViTConfig, ViTModel

from hf_lowrank import LowRankError, cli
from hf_lowrank.folder.export import _to_onnx as to_onnx
from hf_lowrank.folder.export import export_onnx
from hf_lowrank.folder.export_int8 import export_int8
from hf_lowrank.folder.onnx_runtime import open_onnx
from tests.helpers import RANK, factorize, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_onnx_runtime_computes_the_same_at_other_shapes(make: Callable[[], Any], tmp_path: Path) -> None:
    model = factorize(make())
    model.save_pretrained(tmp_path / "low")
    assert export_onnx(tmp_path / "low", tmp_path / "out" / "model.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    names = ["input_ids", "attention_mask", "token_type_ids"][: 3 if make is tiny_bert else 2]
    assert [one.name for one in session.get_inputs()] == names
    assert [one.name for one in session.get_outputs()] == ["logits"]
    for batch, length in ((1, 1), (5, 9)):
        ids = token_ids(batch=batch, length=length)
        inputs = dict(zip(names, (ids, torch.ones_like(ids), torch.arange(length).expand_as(ids) % 2), strict=False))
        (found,) = session.run(None, {name: one.numpy() for name, one in inputs.items()})
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_a_dense_model_is_exported_too(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "dense")
    assert export_onnx(tmp_path / "dense", tmp_path / "model.onnx") < 1e-5


@pytest.mark.slow
def test_the_factors_stay_factors(tmp_path: Path) -> None:
    factorize(tiny_bert()).save_pretrained(tmp_path / "low")
    export_onnx(tmp_path / "low", tmp_path / "model.onnx")
    shapes = [set(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert sum(RANK in shape for shape in shapes) == 24  # two for each of 12 layers


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_export_takes_free_sizes() -> None:
    model = factorize(tiny_bert())
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (), {"input_ids": token_ids()}, dynamic_shapes={"input_ids": sizes})
    ids = token_ids(batch=5, length=11)
    torch.testing.assert_close(exported.module()(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    factorize(tiny_t5()).save_pretrained(tmp_path / "t5")
    factorize(tiny_bert()).save_pretrained(tmp_path / "low")
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    with pytest.raises(LowRankError, match=r"two graphs: give a folder for them, such as .*/model$"):
        export_onnx(tmp_path / "t5", tmp_path / "model.onnx")
    with pytest.raises(LowRankError, match="low holds other files than graphs; choose a new folder"):
        export_onnx(tmp_path / "t5", tmp_path / "low")
    with pytest.raises(LowRankError, match="ViTModel reads pixel_values; only models of tokens are exported"):
        export_onnx(tmp_path / "vit", tmp_path / "model.onnx")
    with pytest.raises(LowRankError, match=r"must end in \.onnx"):
        export_onnx(tmp_path / "low", tmp_path / "model")
    monkeypatch.setattr("hf_lowrank.folder.export._to_onnx", _to_other_onnx)
    with pytest.raises(LowRankError, match="computes something else than the model"):
        export_onnx(tmp_path / "low", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(LowRankError, match="pip install onnx onnxruntime onnxscript"):
        export_onnx(tmp_path / "low", tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["low", "t5", "vit"]


def _to_other_onnx(graph: Any, path: Path) -> None:
    to_onnx(graph, path)
    nn.init.normal_(graph.model.classifier.weight)


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **layers, **heads)
    return BartForConditionalGeneration(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "int8"), [(tiny_t5, False), (tiny_bart, True)], ids=["float32", "int8"])
def test_an_encoder_decoder_is_two_graphs(make: Callable[[], Any], int8: bool, tmp_path: Path) -> None:
    model = factorize(make())
    model.save_pretrained(tmp_path / "low")
    (tmp_path / "graphs").mkdir()
    if int8:
        assert export_int8(tmp_path / "low", tmp_path / "graphs").cosine > 0.99
    else:
        assert export_onnx(tmp_path / "low", tmp_path / "graphs") < 1e-5
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == ["decoder_model.onnx", "encoder_model.onnx"]
    graphs = open_onnx(tmp_path / "graphs", model.config)
    ids, mask = token_ids(batch=2, length=9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for length in (1, 5):
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": token_ids(1, batch=2, length=length)}
        with torch.no_grad():
            expected = model(**inputs).logits
        close = {"rtol": 0.1, "atol": 0.1} if int8 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(graphs(**inputs).logits, expected, **close)


@pytest.mark.slow
def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    factorize(tiny_bert()).save_pretrained(tmp_path / "low")
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", "export", str(tmp_path / "low"), str(tmp_path / "model.onnx")])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert not exit_info.value.code
    assert "ONNX Runtime differs from the model by" in capfd.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert "exists; choose another file or pass --overwrite" in capfd.readouterr().err
