"""hf-lowrank narrow: from texts to an ordinary model with fewer inner channels, and in one line what has none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lowrank import CompressionConfig, compress
from tests.helpers import WIDE, tiny_bert, tiny_llama, word_tokenizer
from tests.launches import Job, hf_lowrank
from tests.tiny_task import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, `model`, every other of whose inner channels is idle, and texts."""
    place = tmp_path_factory.mktemp("narrow")
    model, tokenizer = tiny_llama(), word_tokenizer()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::2] = 0
    model.half().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    (place / "texts.txt").write_text("\n".join(" ".join(f"w{(n * 7 + k) % 30}" for k in range(9)) for n in range(40)))
    return place


def test_what_is_saved_is_an_ordinary_model_that_says_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output, texts = tmp_path / "narrow", ["--texts", place / "texts.txt", "--samples", 20]
    words: list[Any] = ["narrow", place / "model", "--keep", 0.55, *texts, "--output", output]
    with monkeypatch.context() as stopped:  # after the measuring, when the model is to be saved
        stopped.setattr("hf_lowrank.folder.saving.save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(stopped, capfd, *words)[0] == 130
    assert not output.exists()
    with monkeypatch.context() as measured:
        measured.setattr("hf_lowrank.statistics.one_pass.Pass.add", None)  # it is not measured again
        code, printed, error = run(measured, capfd, *words, "--resume", "--evaluate", "--json")
    assert code == 0, error
    facts = json.loads(printed)
    sizes = {"intermediate_size": (WIDE, WIDE // 2), "mlp_parameters": (6 * 32 * WIDE, 3 * 32 * WIDE)}
    assert {name: (facts[f"{name}_before"], facts[f"{name}_after"]) for name in sizes} == sizes
    assert facts["parameters_before"] - facts["parameters_after"] == 3 * 32 * WIDE
    assert facts["divergence"]["mean"] < 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert (type(loaded), loaded.dtype) == (LlamaForCausalLM, torch.float16)
    assert loaded.num_parameters() == facts["parameters_after"]
    assert (output / "tokenizer.json").is_file()
    assert not (tmp_path / "narrow.work").exists()
    code, _, error = run(monkeypatch, capfd, *words)
    assert (code, "narrow exists" in error) == (2, True)


def test_what_cannot_be_narrower_is_told_in_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small, _ = compress(tiny_llama(), CompressionConfig("svd", rank_ratio=0.3), None, progress=False)
    damaged = tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data[3, 4] = torch.nan
    for name, model in (("small", small), ("bert", tiny_bert()), ("damaged", damaged)):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    texts = ["--texts", place / "texts.txt"]
    for words, said in (
        ([place / "model"], "narrow needs a --task or --texts"),
        ([place / "model", *texts, "--keep", 1.5], "keep is a share of the MLPs' channels, in (0, 1], such as 0.8"),
        ([place / "model", *texts, "--keep", 0.01], f"1% of {WIDE} channels are fewer than align, 8"),
        ([tmp_path / "small", *texts], "mlp.gate_proj is a LowRankLinear: narrow the dense model"),
        ([tmp_path / "damaged", *texts], "layers.1.mlp.gate_proj: 1 of its 2048 weights are not finite"),
        ([tmp_path / "bert", *texts], "no MLPs of gate_proj, up_proj and down_proj cannot be made narrower"),
    ):
        code, _, error = run(monkeypatch, capfd, "narrow", *words, "--output", tmp_path / "no")
        assert (code, said in error, error.count("hf-lowrank: ")) == (2, True, 1), error
        assert not (tmp_path / "no").exists()
        assert not (tmp_path / "no.work").exists()


@pytest.mark.slow
def test_two_processes_make_the_same_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["narrow", place / "model", "--keep", 0.4, "--texts", place / "texts.txt", "--samples", 20]
    Job(tmp_path / "log", hf_lowrank, *words, "--output", tmp_path / "both", processes=2).done()
    assert run(monkeypatch, capfd, *words, "--output", tmp_path / "alone")[0] == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-3, atol=1e-4)
