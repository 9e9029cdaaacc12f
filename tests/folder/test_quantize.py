"""quantize: an ordinary folder of fewer bits, by the libraries that people load it with, and nothing else lost."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.compression.codes import coded, measured_to_round, solver_for_codes
from hf_lowrank.folder.inspect import inspect
from hf_lowrank.folder.packing import rounding_for
from hf_lowrank.folder.quantize import quantizable, quantize_, quantize_folder
from hf_lowrank.folder.quantizers import QUANTIZERS, Quantization
from hf_lowrank.folder.reading import load_low_rank, load_own
from hf_lowrank.folder.saving import read_record, save_compressed
from hf_lowrank.folder.verify import verify
from hf_lowrank.nn.layers_lowrank import LowRankLayer
from hf_lowrank.pipeline import Pipeline
from hf_lowrank.studies.bench import BenchConfig, bench
from hf_lowrank.studies.bench.measure import operations, weight_bytes
from hf_lowrank.training.similarity import shared_neighbours
from tests.helpers import HIDDEN, outputs, tiny_bert, tiny_llama, token_ids
from tests.hub_client import Client, environment
from tests.loopback_hub import LoopbackHub
from tests.tasks.test_kinds import bart
from tests.tiny_task import WORDS, write_encoder

OFFERED = [(q.name, bits, scheme) for q in QUANTIZERS.values() for bits, scheme in q.offers]


def needs(library: str) -> None:
    if find_spec(QUANTIZERS[library].package) is None:
        pytest.skip(f"{library} is not installed")


def saved(folder: Path, model: Any, form: str = "factors", dtype: torch.dtype | None = None, **settings: Any) -> Path:
    """A compressed model with its record."""
    compressed, report = compress(model, CompressionConfig("svd", keep=0.5, form=form, **settings), progress=False)
    save_compressed(compressed, None, report, folder, dtype=dtype)
    return folder


def wide_bert() -> Any:
    """Large enough that weights are more than what formats say of them."""
    return tiny_bert(hidden_size=64, intermediate_size=256)


def bert(folder: Path) -> Path:
    return saved(folder, wide_bert())


def embedded_bert(folder: Path) -> Path:
    return saved(folder, wide_bert(), include=("word_embeddings", "*.dense"), align=1)


def interpolative_bert(folder: Path) -> Path:
    return saved(folder, wide_bert(), form="interpolative")


def half_bert(folder: Path) -> Path:
    return saved(folder, wide_bert(), dtype=torch.bfloat16)


def dense_bert(folder: Path) -> Path:
    wide_bert().save_pretrained(folder)
    return folder


def tied_llama(folder: Path) -> Path:
    return saved(folder, tiny_llama(tie_word_embeddings=True))


def compressed_twice(folder: Path) -> Path:
    model, _ = compress(wide_bert(), CompressionConfig("svd", keep=0.6), progress=False)
    return saved(folder, model)


MAKES: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (bert, embedded_bert, interpolative_bert, half_bert, dense_bert, tied_llama, compressed_twice)
}


def auto_class(make: str) -> Any:
    return AutoModelForCausalLM if make == "tied_llama" else AutoModelForSequenceClassification


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(("library", "bits", "scheme"), OFFERED)
def test_a_quantized_folder_loads_as_any_other(library: str, bits: int, scheme: str, make: str, tmp_path: Path) -> None:
    needs(library)
    source = MAKES[make](tmp_path / "source")
    told = quantize_folder(source, tmp_path / "out", Quantization(bits, library, scheme))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == library
    assert config.get("ranks") == json.loads((source / "config.json").read_text()).get("ranks")
    assert told.bytes_after < told.bytes_before or make == "tied_llama"
    loaded = auto_class(make).from_pretrained(tmp_path / "out").eval()
    expected = outputs(auto_class(make).from_pretrained(source).eval())
    found = outputs(loaded).float()
    assert not torch.equal(found, expected.float())
    far = (found - expected.float()).norm() / expected.float().norm()
    assert far < (0.35 if bits == 4 else 0.1)
    if make == "dense_bert":
        return  # what else becomes of it is transformers' own
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(auto_class(make).from_pretrained(tmp_path / "again").eval()).float(), found)
    assert not [check for check in verify(tmp_path / "out") if check.status == "FAIL"]
    assert inspect(str(tmp_path / "out"))["parameters"] == inspect(str(source))["parameters"]
    with pytest.raises(LowRankError, match="quantized already, by"):
        quantize_folder(tmp_path / "out", tmp_path / "twice", Quantization(bits, library, scheme))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(("library", "bits", "scheme"), [OFFERED[1], OFFERED[3]])
def test_without_this_library_it_loads_by_the_code_that_travels_with_it(
    library: str, bits: int, scheme: str, tmp_path: Path
) -> None:
    needs(library)
    quantize_folder(bert(tmp_path / "source"), tmp_path / "out", Quantization(bits, library, scheme))
    expected = outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval())
    code = (
        "import sys, torch; sys.modules['hf_lowrank'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"output = model(input_ids=torch.tensor({token_ids().tolist()})).logits.float().detach()\n"
        f"torch.testing.assert_close(output, torch.tensor({expected.float().tolist()}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"HF_HOME": str(tmp_path / "hub")})


def test_every_factor_is_quantized_and_what_is_tied_or_a_head_is_not(tmp_path: Path) -> None:
    needs("compressed-tensors")
    quantize_folder(tied_llama(tmp_path / "source"), tmp_path / "out", Quantization(4))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layers = [name for name, layer in loaded.named_modules() if isinstance(layer, LowRankLayer)]
    assert layers
    assert all(f"{name}.{factor}.weight_packed" in stored for name in layers for factor in ("up", "down"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.is_floating_point()


def test_the_record_says_how_and_keeps_what_it_said(tmp_path: Path) -> None:
    needs("compressed-tensors")
    source = bert(tmp_path / "source")
    quantize_folder(source, tmp_path / "out", Quantization(4))
    before, record = read_record(source), read_record(tmp_path / "out")
    assert before is not None
    assert record is not None
    assert (record["layers"], record["settings"]) == (before["layers"], before["settings"])
    told = record["quantization"]
    assert (told["bits"], told["library"], told["scheme"]) == (4, "compressed-tensors", "weight-only")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 bits, weight-only, by compressed-tensors" in card
    assert "| dense | compressed | quantized |" in card


def test_embeddings_stay_where_engines_are_to_read_them(tmp_path: Path) -> None:
    needs("compressed-tensors")
    quantize_folder(bert(tmp_path / "source"), tmp_path / "out", Quantization(8, embedding_bits=0))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.bert.embeddings.word_embeddings.weight.is_floating_point()


def test_a_model_that_was_packed_and_run_is_saved_packed(tmp_path: Path) -> None:
    needs("compressed-tensors")
    model, _ = compress(wide_bert(), CompressionConfig("svd", keep=0.5), progress=False)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    quantize_(model, Quantization(4))
    expected = outputs(model)
    with pytest.raises(LowRankError, match="is quantized by compressed-tensors"):
        compress(model, CompressionConfig("svd", keep=0.3), progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()), expected)
    assert (tmp_path / "model.safetensors").stat().st_size < floats / 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_has_the_very_codes_that_the_moments_gave(bits: int, dtype: str, tmp_path: Path) -> None:
    needs("compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    source, statistics = measured_bert(tmp_path)
    solver = solver_for_codes(load_low_rank(source), "kfac", statistics)
    model = load_low_rank(source)
    layers = quantizable(model, Quantization(bits))
    scales_in = getattr(torch, dtype)
    expected = coded(model, solver, {n: rounding_for(layer, bits).grid(scales_in) for n, layer in layers.items()})
    quantize_folder(source, tmp_path / "out", Quantization(bits, dtype=dtype), statistics=statistics)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    of_linears = {name: codes for name, codes in expected.items() if type(layers[name]) is torch.nn.Linear}
    assert len(of_linears) >= 12
    for name, rounded in of_linears.items():
        packed = stored[f"{name}.weight_packed"], bits, torch.Size(stored[f"{name}.weight_shape"].tolist())
        assert torch.equal(unpack_from_int32(*packed), rounded.codes)
        assert torch.equal(stored[f"{name}.weight_scale"].float(), rounded.scales.float())
        bias = model.get_submodule(name).bias
        if bias is not None:
            torch.testing.assert_close(stored[f"{name}.bias"], bias.to(scales_in))
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record["quantization"]["rounding"] == "kfac"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    quantize_folder(source, tmp_path / "nearest", Quantization(bits, dtype=dtype))
    nearest = AutoModelForSequenceClassification.from_pretrained(tmp_path / "nearest").eval()
    exact = outputs(load_low_rank(source))
    assert (outputs(loaded).float() - exact).norm() < (outputs(nearest).float() - exact).norm()


def measured_bert(folder: Path) -> tuple[Path, Any]:
    """A compressed model, and statistics of the dense one."""
    model = wide_bert()
    config = CompressionConfig(keep=0.5)
    batches = [{"input_ids": token_ids(seed), "labels": torch.tensor([0, 1, 0])} for seed in range(40)]
    include = measured_to_round(model, config)
    statistics = compute_statistics(model, batches, config.needs, include=include, progress=False)
    compressed, report = compress(model, config, statistics, progress=False)
    save_compressed(compressed, None, report, folder / "source")
    return folder / "source", statistics


def test_statistics_of_another_model_and_libraries_that_round_by_themselves_are_refused(tmp_path: Path) -> None:
    needs("torchao")
    source, statistics = measured_bert(tmp_path)
    with pytest.raises(LowRankError, match="torchao rounds by itself: statistics are for compressed-tensors"):
        quantize_folder(source, tmp_path / "out", Quantization(8, "torchao"), statistics=statistics)
    tiny_bert().save_pretrained(tmp_path / "narrow")
    with pytest.raises(LowRankError, match=r"has shape .* is it another model's\?"):
        quantize_folder(tmp_path / "narrow", tmp_path / "out", statistics=statistics)
    tiny_bert(seed=1, hidden_size=64, intermediate_size=256).save_pretrained(tmp_path / "other")
    with pytest.raises(LowRankError, match="measured on other weights"):
        quantize_folder(tmp_path / "other", tmp_path / "out", statistics=statistics)
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_refused_with_and_without_statistics(tmp_path: Path) -> None:
    needs("compressed-tensors")
    source, statistics = measured_bert(tmp_path)
    model = load_low_rank(source)
    name = next(name for name, layer in model.named_modules() if isinstance(layer, LowRankLayer))
    model.get_submodule(f"{name}.down").weight.data[0, 0] = torch.nan
    model.save_pretrained(source)
    for known in (None, statistics):
        with pytest.raises(LowRankError, match=rf"{name}\.down: 1 of its \d+ weights are not finite"):
            quantize_folder(source, tmp_path / "out", statistics=known)


def test_an_encoder_decoder_runs_if_it_was_compressed(tmp_path: Path) -> None:
    needs("compressed-tensors")
    model = bart()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(LowRankError, match="cannot run a dense encoder-decoder that compressed-tensors has packed: "):
        quantize_folder(tmp_path / "dense", tmp_path / "dense8")
    saved(tmp_path / "small", model)
    quantize_folder(tmp_path / "small", tmp_path / "small8")
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    small, small8 = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).eval() for name in ("small", "small8"))
    found, wanted = (each(input_ids=ids, decoder_input_ids=ids).logits for each in (small8, small))
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert small8.generate(ids, max_new_tokens=3).shape[0] == 1


def test_embeddings_of_four_bits(tmp_path: Path) -> None:
    needs("compressed-tensors")
    source = embedded_bert(tmp_path / "source")
    eight = quantize_folder(source, tmp_path / "eight", Quantization(4))
    four = quantize_folder(source, tmp_path / "four", Quantization(4, embedding_bits=4))
    assert four.bytes_after < eight.bytes_after
    found, expected = (
        outputs(AutoModelForSequenceClassification.from_pretrained(folder).eval())
        for folder in (tmp_path / "four", source)
    )
    assert (found - expected).norm() / expected.norm() < 0.35
    with pytest.raises(
        LowRankError, match="cannot load a dense BertForSequenceClassification with embeddings of 4 bits"
    ):
        quantize_folder(dense_bert(tmp_path / "dense"), tmp_path / "out", Quantization(4, embedding_bits=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_integer_products_and_the_codes_of_weights_are_counted(library: str, tmp_path: Path) -> None:
    needs(library)
    few = tmp_path / "few"
    quantize_folder(bert(tmp_path / "source"), few, Quantization(8, library, "dynamic"))
    model, exact = (load_own(folder, torch.float32) for folder in (few, tmp_path / "source"))
    with torch.inference_mode():
        found, expected = (operations(lambda each=each: each(input_ids=token_ids(0))) for each in (model, exact))
    assert found == expected
    assert weight_bytes(model) < 0.7 * weight_bytes(exact)
    with pytest.raises(LowRankError, match=f"is quantized by {library}: say what to measure it against"):
        bench(few, None, BenchConfig((1,), (4,), rounds=1), progress=False)


# What cannot be done


@pytest.mark.parametrize(
    ("bits", "library", "scheme", "message"),
    [
        (3, "compressed-tensors", "weight-only", "does not quantize to 3 bits, weight-only; there are"),
        (4, "torchao", "dynamic", "does not quantize to 4 bits, dynamic; there are"),
        (8, "gguf", "weight-only", "unknown library 'gguf'; there are compressed-tensors: 8 bits"),
        (8, "quanto", "weight-only", "transformers cannot save the models it quantizes"),
    ],
)
def test_what_is_not_offered_is_refused_with_what_there_is(bits: int, library: str, scheme: str, message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        Quantization(bits, library, scheme)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(LowRankError, match="torchao does not give embeddings 8 bits"):
        Quantization(8, "torchao", embedding_bits=8)
    with pytest.raises(LowRankError, match="unknown dtype 'int8'; there are float32, bfloat16, float16"):
        Quantization(dtype="int8")


@pytest.mark.parametrize("library", QUANTIZERS)
def test_a_library_that_is_absent_is_named_with_its_extra(library: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("hf_lowrank.folder.quantizers.find_spec", lambda name: None)
    bits, scheme = QUANTIZERS[library].offers[0]
    with pytest.raises(LowRankError, match=f'{library} is not installed: pip install "hf_lowrank\\[quantizers\\]"'):
        quantize_folder(tmp_path, tmp_path / "out", Quantization(bits, library, scheme))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_quantized_folder_of_sentence_transformers_keeps_its_neighbours_and_is_pushed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    needs("compressed-tensors")
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    body = Transformer(str(write_encoder(tmp_path / "body")))
    SentenceTransformer(modules=[body, Pooling(HIDDEN), Normalize()], device="cpu").save(str(tmp_path / "dense"))
    texts = [" ".join(WORDS[(n * k + k) % 40] for k in range(1, n % 5 + 2)) for n in range(40)]
    pipeline = Pipeline.load(str(tmp_path / "dense"), texts=texts)
    pipeline.compress(rank_ratio=0.5)
    pipeline.save(tmp_path / "small")
    quantize_folder(tmp_path / "small", tmp_path / "small8", Quantization(8))
    folders = (tmp_path / "small8", tmp_path / "small")
    found, whole = (SentenceTransformer(str(folder), device="cpu").encode(texts) for folder in folders)
    assert not np.array_equal(found, whole)
    assert ((found * whole).sum(axis=1) > 0.999).all()
    assert shared_neighbours(whole, found, 3) > 95
    with pytest.raises(LowRankError, match="cannot run a dense model that compressed-tensors has packed: compress it"):
        quantize_folder(tmp_path / "dense", tmp_path / "dense8", Quantization(8))
    assert not (tmp_path / "dense8").exists()
    quantize_folder(tmp_path / "small", tmp_path / "small4", Quantization(4))
    np.save(tmp_path / "expected.npy", SentenceTransformer(str(tmp_path / "small4"), device="cpu").encode(texts))
    homes = [tmp_path_factory.mktemp("home") for _ in range(2)]
    with LoopbackHub(tmp_path_factory.mktemp("hub"), {"hf_secret": ("alice", "write")}) as hub:
        settings = [environment(hub.url, home, "hf_secret") for home in homes]
        with Client(settings[0], tmp_path, library=True) as client:
            assert client.command("push", "small4", "alice/small4", "--json").code == 0
        with Client(settings[1], tmp_path, library=False) as bare:
            bare.done(f"""
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("alice/small4", device="cpu", trust_remote_code=True)
np.testing.assert_allclose(model.encode({texts!r}), np.load("expected.npy"), atol=1e-5)
""")
