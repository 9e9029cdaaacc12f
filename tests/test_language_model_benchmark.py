"""The benchmark's language model: its text, its training after an interruption, and what is measured of it."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import lm, lm_ranks, lm_train, tokens
from benchmarks.basis_sharing import basis_sharing
from benchmarks.harness import Options
from benchmarks.lm_picture import language_model_figure, points
from benchmarks.lm_text import Corpus, Windows, prepare
from benchmarks.lm_train import Recipe, train, trained
from benchmarks.modegpt import Widths, _rows, modegpt
from benchmarks.models import LlamaShape
from hf_lowrank import compute_statistics
from hf_lowrank.errors import LowRankError
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.kinds import KINDS
from hf_lowrank.statistics.prefix import marked_batches
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
    options = Options(cache=tmp_path, methods=("svd", "kfac", "whiten", "kfac-searched", *lm.RIVALS))
    result = lm.run(options)
    assert [row["way"] for row in result.rows] == [
        *("kfac", "whiten", "svd", "modegpt", "basis-sharing", "narrow", "kfac-searched")
    ]
    figures, dense = {tuple(row["of"]): row for row in result.figures["all"]}, result.figures["dense"]["loss"]
    added = 1000 * (figures["kfac", 0.4, 0]["loss"] - dense)
    assert next(row for row in result.rows if row["way"] == "kfac")["40% kept"].startswith(f"{added:+.2f}, KL ")
    assert f"40%: {added / (1000 * (figures['whiten', 0.4, 0]['loss'] - dense)):.2f} (KL " in result.notes[1]
    study = lm.Study(tmp_path, RECIPE)
    for share in lm.SHARES:
        assert study.known["kfac", share, 0]["kept"] <= share
        assert study.known["kfac-searched", share, 0]["kept"] <= share
    assert study.known["narrow", 0.8, 0]["kept"] == pytest.approx(0.8, abs=0.02)
    # By hand: the mean over the tokens of all windows
    ids = torch.stack(study.test)
    with torch.no_grad():
        logits = study.model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert study.dense_figures["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert study.dense_figures["accuracy"] == pytest.approx(float((logits.argmax(-1) == ids[:, 1:]).float().mean()))
    made = {path.name for path in (tmp_path / f"measured-{RECIPE.tokens}").iterdir()}
    assert made == {"models.jsonl", "statistics-model-0", "statistics-data-0", "profile-kfac-0.jsonl"}
    assert study.known["svd", 0.4, 0]["divergence"] > study.known["svd", 0.9, 0]["divergence"] > 0


@pytest.mark.slow
def test_ranks_are_compared_before_and_after_healing_by_text_that_is_new(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").symlink_to(text / "text")
    train(tmp_path, RECIPE, minutes=0, progress=False)
    monkeypatch.setattr(lm_ranks, "Recipe", lambda: RECIPE)
    monkeypatch.setattr(lm_ranks, "RATIOS", (0.3,))
    monkeypatch.setattr(lm_ranks, "LEARNT_FROM", 64)
    options = Options(cache=tmp_path, seed=1)
    result = lm_ranks.run(options)
    assert [(row["factors"], row["seeds"]) for row in result.rows] == [(name, "1") for name in lm_ranks.VARIANTS]
    before, *_, sequential, healed = rows = result.figures["rows"]
    assert result.rows[-1]["×"] == f"{healed['divergence'] / before['divergence']:.2f}"
    assert healed["divergence_after"] <= healed["divergence_before"]
    assert sequential["seconds"] > 0
    assert lm_ranks.run(options).figures["rows"] == rows  # read again

    study = lm.Study(tmp_path, RECIPE)
    measured = {study.tokenizer.decode(ids) for batch in study.calibration(1) for ids in batch["input_ids"]}
    learnt = lm_ranks._new_text(study, 1)
    assert learnt.texts is not None
    assert not measured & {row[0] for row in learnt.texts.rows}
    assert (learnt.packed, learnt.max_length) == (True, study.length)


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


def test_modegpt_changes_nothing_at_full_width_and_counts_what_it_keeps() -> None:
    ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_llama()
    needs = ("activation_moment", "active_tokens")
    known = compute_statistics(model, [{"input_ids": ids, "labels": ids}], needs, progress=False)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        whole, kept = modegpt(deepcopy(model), known, 1.0)
        torch.testing.assert_close(whole(input_ids=ids).logits, before, rtol=1e-3, atol=1e-4)
        assert kept == sum(target.module.weight.numel() for target in find_targets(model).values())
        small, fewer = modegpt(deepcopy(model), known, 0.5)
        assert 0.3 * kept < fewer <= 0.5 * kept
        widths = Widths.of(model.config, 0.5)
        attention, config = small.model.layers[0].self_attn, model.config
        assert int((small.model.layers[0].mlp.down_proj.weight != 0).any(dim=0).sum()) == widths.inner
        assert int((attention.k_proj.weight != 0).any(dim=1).sum()) == 2 * widths.pairs * config.num_key_value_heads
        # The product of values and outputs is the best of its rank for the inputs (Eckart & Young)
        queries, keys = _rows(config, 0)
        inputs = known.mean("activation_moment", "model.layers.0.self_attn.q_proj").double()
        root = torch.linalg.cholesky(inputs + 1e-3 * inputs.diagonal().mean() * torch.eye(len(inputs)))
        products = []
        for each in (model.model.layers[0].self_attn, attention):
            heads = each.o_proj.weight[:, queries].double().split(config.head_dim, dim=1)
            products.append(torch.cat([head @ each.v_proj.weight[keys].double() for head in heads]) @ root)
        lost = torch.linalg.svdvals(products[0])[widths.values :].square().sum()
        torch.testing.assert_close((products[0] - products[1]).square().sum(), lost, rtol=1e-4, atol=1e-9)


def test_blocks_that_share_a_basis_lose_the_directions_that_their_joint_inputs_have_least_of() -> None:
    ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    model = tiny_llama()
    needs = ("activation_moment", "active_tokens")
    known = compute_statistics(model, [{"input_ids": ids, "labels": ids}], needs, progress=False)
    small, kept = basis_sharing(deepcopy(model), known, 0.4)
    assert kept <= 0.4 * sum(target.module.weight.numel() for target in find_targets(model).values())
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(2)]
    before, after = (torch.cat([each.get_submodule(name).weight.detach() for name in names]) for each in (model, small))
    rank = int(0.4 * before.numel() / sum(before.shape))
    assert torch.linalg.matrix_rank(after) == rank
    inputs = sum(known.mean("activation_moment", name).double() for name in names)
    inputs = inputs + 1e-3 * inputs.diagonal().mean() * torch.eye(len(inputs))
    root = torch.linalg.cholesky(inputs)
    lost = torch.linalg.svdvals(before.double() @ root)[rank:].square().sum()
    torch.testing.assert_close(((before - after).double() @ root).square().sum(), lost, rtol=1e-4, atol=1e-9)


def test_all_tokens_of_a_window_but_the_last_count(text: Path, tmp_path: Path) -> None:
    (tmp_path / "text").symlink_to(text / "text")
    train(tmp_path, RECIPE, minutes=0, progress=False)
    study = lm.Study(tmp_path, RECIPE)
    expected = marked_batches(study.model, study.targets, study.calibration(1)[:2], "model", progress=False)
    pairs = list(zip(expected, study.marks(1), strict=False))
    assert len(pairs) == 2
    for marked, own in pairs:
        assert marked.active.keys() == own.active.keys()
        assert all(torch.equal(mask.bool(), own.active[name]) for name, mask in marked.active.items())


def test_the_picture_has_a_line_for_each_way_of_means_over_seeds() -> None:
    found = [("kfac", 0.4, 0, 0.1), ("kfac", 0.4, 1, 0.3), ("kfac", 0.8, 0, 0.01), ("svd", 0.4, 0, 0.5)]
    rows = [{"of": [way, share, seed], "divergence": nats} for way, share, seed, nats in found]
    assert points(rows, "kfac") == [(80.0, 0.01), (40.0, 0.2)]
    assert [line.get_label() for line in language_model_figure(rows).axes[0].lines] == ["SVD", "the default"]
