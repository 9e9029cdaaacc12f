"""compress --bits and --bytes crossed with what else a job may be: resumed, divided, sequential, tied, of experts."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.folder.quantize import quantize_folder
from hf_lowrank.folder.quantizers import QUANTIZERS, Quantization
from hf_lowrank.folder.saving import read_record, save_compressed
from hf_lowrank.folder.verify import verify
from hf_lowrank.pipeline import Pipeline
from tests.helpers import outputs, tiny_bert, tiny_llama, word_tokenizer
from tests.hub_client import Client, environment
from tests.launches import Job, hf_lowrank, make_data, make_model
from tests.loopback_hub import LoopbackHub
from tests.tiny_task import run

pytestmark = pytest.mark.skipif(
    find_spec(QUANTIZERS["compressed-tensors"].package) is None, reason="compressed-tensors is not installed"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data."""
    folder = tmp_path_factory.mktemp("places")
    make_model(folder / "model", hidden_size=64, intermediate_size=128)
    make_data(folder / "cola")
    return folder


def words(places: Path, output: Path, *more: Any) -> list[Any]:
    task = ["--task", "cola", "--data-dir", places / "cola", "--samples", 16]
    return ["compress", places / "model", *task, *more, "--output", output]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two folders have the same tensors and the same codes."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    codes = [name for name in first if name.endswith("_packed")]
    return bool(codes) and all(torch.equal(first[name], second[name]) for name in codes)


@pytest.mark.parametrize("more", [("--bits", 4, "--heal"), ("--bytes", "50KB")], ids=str)
def test_it_goes_with_other_options(
    more: tuple[Any, ...], places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    code, _, error = run(monkeypatch, capfd, *words(places, tmp_path / "out", *more, "--evaluate"))
    assert code == 0, error
    assert not [line for line in error.splitlines() if "Could not match" in line or "it/s" in line]
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record["quantization"]["rounding"] == "kfac"
    assert not [check for check in verify(tmp_path / "out") if check.status == "FAIL"]
    if "--bytes" in more:
        assert record["weights_bytes"] <= 50_000
        assert (
            "- quantized afterwards: 8 or 4 bits by layer, weight-only" in (tmp_path / "out" / "README.md").read_text()
        )
    else:
        rest = ("--teacher", places / "model", "--task", "cola", "--data-dir", places / "cola")
        code, _, error = run(monkeypatch, capfd, "heal", tmp_path / "out", *rest, "--output", tmp_path / "again")
        assert code == 2
        assert "heal the model as it was before, with the dense one as teacher, then quantize it" in error


def test_saved_statistics_and_a_pipeline_give_the_same_codes(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    task = ["--task", "cola", "--data-dir", places / "cola", "--samples", 16]
    run(monkeypatch, capfd, *words(places, tmp_path / "at-once", "--bits", 4))
    pipeline = Pipeline.load(
        str(places / "model"), "cola", places / "cola", samples=16, progress=False, quantization=Quantization(4)
    )
    pipeline.compress(CompressionConfig())
    pipeline.save(tmp_path / "by-pipeline")
    assert same(tmp_path / "at-once", tmp_path / "by-pipeline")
    run(monkeypatch, capfd, "statistics", places / "model", *task, "--output", tmp_path / "statistics")
    run(monkeypatch, capfd, *words(places, tmp_path / "small"))
    words_ = ["quantize", tmp_path / "small", tmp_path / "later", "--bits", 4, "--statistics", tmp_path / "statistics"]
    code, _, error = run(monkeypatch, capfd, *words_, "--embedding-bits", 4)
    assert code == 0, error
    first, second = weights(tmp_path / "at-once"), weights(tmp_path / "later")
    factors = [name for name in first if name.endswith("weight_packed") and ".encoder." in name]
    assert factors
    assert all(torch.equal(first[name], second[name]) for name in factors)


@pytest.mark.slow
def test_two_processes_and_a_resumed_job_make_what_one_does(places: Path, tmp_path: Path) -> None:
    """From one measurement, in one shot: sums that processes divide are equal to rounding, and codes follow ties."""
    measured, include = tmp_path / "measured", ("bert.encoder.layer.*", "bert.embeddings.word_embeddings")
    task = ["--task", "cola", "--data-dir", places / "cola", "--samples", 16]
    wanted = [word for pattern in include for word in ("--include", pattern)]
    Job(tmp_path / "log", hf_lowrank, "statistics", places / "model", *task, *wanted, "--output", measured).done()
    rest = ("--bytes", "50KB", "--no-sequential", "--statistics", measured)
    one, two = tmp_path / "one", tmp_path / "two"
    Job(tmp_path / "log1", hf_lowrank, *words(places, one, *rest)).done()
    Job(tmp_path / "log2", hf_lowrank, *words(places, two, *rest, "--evaluate"), processes=2).done()
    assert same(one, two)
    resumed = words(places, tmp_path / "resumed", *rest)
    job = Job(tmp_path / "log3", hf_lowrank, *resumed)
    job.until(tmp_path / "resumed.work" / "job.json").kill()
    job.wait()
    Job(tmp_path / "log4", hf_lowrank, *resumed, "--resume").done()
    assert same(one, tmp_path / "resumed")


def test_a_resumed_job_has_the_bits_that_it_began_with(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    job = Job(tmp_path / "log", hf_lowrank, *words(places, tmp_path / "out", "--bits", 4))
    job.until(tmp_path / "out.work" / "job.json").kill()
    job.wait()
    code, _, error = run(monkeypatch, capfd, *words(places, tmp_path / "out", "--bits", 8, "--resume"))
    assert code == 2
    assert "bits" in error


def test_statistics_that_do_not_know_the_embedding_leave_nothing_behind(
    places: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    task = ["--task", "cola", "--data-dir", places / "cola", "--samples", 16]
    run(monkeypatch, capfd, "statistics", places / "model", *task, "--output", tmp_path / "measured")
    budget = ("--bytes", "50KB", "--statistics", tmp_path / "measured")
    code, _, error = run(monkeypatch, capfd, *words(places, tmp_path / "out", *budget))
    assert code == 2
    assert (
        "know nothing of the module 'bert.embeddings.word_embeddings': measure it too, or leave it out (include)"
        in error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["measured"]
    code, _, error = run(
        monkeypatch, capfd, *words(places, tmp_path / "out", *budget, "--include", "bert.encoder.layer.*")
    )
    assert code == 0, error


def save(model: Any, folder: Path, dtype: torch.dtype | None = None, **settings: Any) -> Path:
    compressed, report = compress(model, CompressionConfig("svd", **settings), progress=False)
    save_compressed(compressed, word_tokenizer(), report, folder, dtype=dtype)
    return folder


def test_factors_of_experts_are_rounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_local_experts": 2, "num_key_value_heads": 2, "vocab_size": 64}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts)).eval()
    source = save(model, tmp_path / "source", keep=0.6)
    quantize_folder(source, tmp_path / "out", Quantization(8))
    loaded, expected = (
        outputs(AutoModelForCausalLM.from_pretrained(folder).eval()) for folder in (tmp_path / "out", source)
    )
    assert any("experts" in name and name.endswith("_packed") for name in weights(tmp_path / "out"))
    assert (loaded - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_train_on_factors_of_few_bits(bits: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    quantize_folder(save(tiny_bert(), tmp_path / "source", keep=0.5), tmp_path / "few", Quantization(bits))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "few").eval()
    before = outputs(model)
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(outputs(adapted), before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=torch.arange(5, 12)[None], labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    expected = outputs(adapted.eval())
    assert not torch.allclose(expected, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "few").eval()  # not run before
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(loaded), expected)


@pytest.mark.slow
def test_a_folder_of_few_bits_is_pushed_and_loaded_without_this_library(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    quantize_folder(save(tiny_bert(), tmp_path / "source", keep=0.5), tmp_path / "few", Quantization(4))
    expected = outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "few").eval())
    torch.save(expected, tmp_path / "expected.pt")
    with LoopbackHub(tmp_path_factory.mktemp("hub"), {"hf_secret": ("alice", "write")}) as hub:
        homes = [tmp_path_factory.mktemp("home") for _ in range(2)]
        settings = [environment(hub.url, home, "hf_secret") for home in homes]
        with Client(settings[0], tmp_path, library=True) as client:
            assert client.command("push", "few", "alice/few", "--json").code == 0
        with Client(settings[1], tmp_path, library=False) as bare:
            bare.done(
                "model = AutoModelForSequenceClassification.from_pretrained('alice/few', trust_remote_code=True); "
                "ids = torch.randint(5, 64, (3, 7), generator=torch.Generator().manual_seed(0)); "
                "torch.testing.assert_close(model.eval()(input_ids=ids).logits, torch.load('expected.pt'))\n"
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(tiny_llama(tie_word_embeddings=True), tmp_path / "source", dtype, keep=0.5)
    quantize_folder(source, tmp_path / "few", Quantization(4))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = outputs(AutoModelForCausalLM.from_pretrained(source).eval()).float()
    assert (outputs(loaded).float() - expected).norm() < 0.4 * expected.norm()
