"""The benchmark's language model: its text, its training after an interruption, and what is measured of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import lm, lm_train, tokens
from benchmarks.harness import Options
from benchmarks.lm_text import Corpus, Windows, prepare
from benchmarks.lm_train import Recipe, train, trained
from benchmarks.models import LlamaShape
from hf_lowrank import compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.statistics.kinds import KINDS
from tests.helpers import tiny_llama

CORPUS = Corpus(training=("jinja2",), held_out=("joblib",), vocabulary=300, sample=20_000)
RECIPE = Recipe(CORPUS, LlamaShape(16, 32, 4, 2, 2), length=16, batch=2, tokens=16 * 2 * 6)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    prepare(folder / "text", CORPUS)
    return folder


def test_text_is_read_back_whole_and_no_package_is_on_both_sides(text: Path) -> None:
    import jinja2.runtime

    tokenizer, training, held_out = prepare(text / "text", CORPUS)
    source = Path(jinja2.runtime.__file__).read_text(encoding="utf-8")
    assert source in tokenizer.decode(training)
    assert source not in tokenizer.decode(held_out)
    row = Windows(training, 16)[3]["input_ids"]
    assert row.tolist() == training[48:64].tolist()
    with pytest.raises(LowRankError, match="another corpus"):
        prepare(text / "text", replace(CORPUS, vocabulary=301))
    with pytest.raises(LowRankError, match="'no_such_package'.* is not installed"):
        prepare(text / "else", replace(CORPUS, training=("no_such_package",)))


def test_an_interrupted_training_goes_on_to_the_same_weights(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").symlink_to(text / "text")
    with pytest.raises(LowRankError, match="no language model is in .* --train"):
        trained(tmp_path / "whole")
    whole = train(tmp_path / "whole", RECIPE, minutes=0, progress=False)

    scored = lm_train._loss

    def killed(model: torch.nn.Module, rows: object) -> float:
        if len((tmp_path / "halves" / "training.jsonl").read_text().splitlines()) == 3:
            raise KeyboardInterrupt
        return scored(model, rows)

    (tmp_path / "halves" / "training.jsonl").touch()
    monkeypatch.setattr(lm_train, "_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "halves", RECIPE, minutes=0, progress=False)
    assert trained(tmp_path / "halves") == (tmp_path / "halves" / "checkpoints" / "checkpoint-4", 4 * 32)
    monkeypatch.setattr(lm_train, "_loss", scored)
    halves = train(tmp_path / "halves", RECIPE, minutes=0, progress=False)

    assert trained(tmp_path / "halves") == (halves, RECIPE.tokens)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line) for line in (tmp_path / "halves" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]


@pytest.mark.slow
def test_methods_are_compared_on_held_out_text_and_read_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").symlink_to(text / "text")
    train(tmp_path, RECIPE, minutes=0, progress=False)
    monkeypatch.setattr(lm, "Recipe", lambda: RECIPE)
    monkeypatch.setattr(lm, "SEEDS", (0,))
    options = Options(cache=tmp_path, methods=("svd", "kfac", "narrow"))
    result = lm.run(options)
    assert [row["method"] for row in result.rows] == ["svd", "kfac", "narrow"]
    study = lm.Study(tmp_path, RECIPE)
    for share in lm.SHARES:
        assert study.known["kfac", share, 0]["kept"] <= share
    assert study.known["narrow", 0.8, 0]["kept"] == pytest.approx(0.8, abs=0.02)
    # By hand: the mean over the tokens of all windows
    ids = torch.stack(study.test)
    with torch.no_grad():
        logits = study.model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert study.dense_figures["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert study.dense_figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == ids[:, 1:]).float().mean()))
    made = {path.name for path in (tmp_path / f"measured-{RECIPE.tokens}").iterdir()}
    assert made == {"models.jsonl", "statistics-model-0"}
    assert study.known["svd", 0.4, 0]["divergence"] > study.known["svd", 0.9, 0]["divergence"] > 0


def test_moments_are_of_the_tokens_that_a_treatment_leaves() -> None:
    model, ids = tiny_llama(), torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    layer, name = model.model.layers[1].mlp.up_proj, "model.layers.1.mlp.up_proj"
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    x, before = seen[0][:, :-1], dict(KINDS)  # the last token predicts nothing
    length = x.norm(dim=-1)

    def moment(treatment: str) -> torch.Tensor:
        batches = [{"input_ids": ids, "labels": ids}]
        with tokens.treating(tokens.TREATMENTS[treatment]):
            found = compute_statistics(model, batches, tokens.INPUTS, include=(name,), progress=False)
        return found.sums["activation_moment"][name]

    torch.testing.assert_close(moment("plain"), torch.einsum("bti,btj->ij", x, x))
    torch.testing.assert_close(moment("first"), torch.einsum("bti,btj->ij", x[:, 1:], x[:, 1:]))
    even = x / length[..., None]
    torch.testing.assert_close(moment("even"), torch.einsum("bti,btj->ij", even, even))
    assert before == KINDS
    rows = torch.arange(1.0, 17.0).repeat(2, 1)[..., None] * torch.ones(3)
    assert tokens.outer(rows)[0].tolist() == [0.0] * 2 + [1.0] * 12 + [0.0] * 2
    assert (rows * tokens.clipped(rows)[..., None])[0, :, 0].tolist() == [*range(1, 17)]
    rows[1, -1] = 1000
    assert (rows * tokens.clipped(rows)[..., None])[1, -1].tolist() == pytest.approx([16.0] * 3)
    assert tokens._of_largest(rows.square().sum(dim=-1)) > 0.99
