"""Healing brings a low-rank model nearer to its teacher, by its factors alone, and never takes it farther away."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import hf_lowrank.training.heal as healing
from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.model.predictions import IGNORED
from hf_lowrank.tasks import get_task, load_split, load_validation
from hf_lowrank.tasks.encoding import encode_chosen
from hf_lowrank.tasks.texts import given_texts, texts_task
from hf_lowrank.training.divergence import Reference
from hf_lowrank.training.heal import heal
from hf_lowrank.training.metric import DAMPING, hidden_metrics
from hf_lowrank.training.running import SameBatches
from hf_lowrank.training.settings import HealConfig
from hf_lowrank.training.told import Teacher, Told
from tests.helpers import bert_config, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from tests.launches import Job
from tests.tiny_task import WORDS, tiny_tokenizer, write_cola

FAST: dict[str, Any] = {
    "rates": (3e-3,),
    "batch_size": 8,
    "epochs": 4,
    "held_out": 16,
    "hidden": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cola(tmp_path_factory.mktemp("data"))


def dense(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(num_labels=2, initializer_range=0.3, **changes)).eval()


def low_rank(form: str = "factors", **changes: Any) -> PreTrainedModel:
    return compress(dense(**changes), CompressionConfig("svd", 0.25, form=form), progress=False)[0]


def distance(model: PreTrainedModel, tokenizer: Any, data: Path, teacher: PreTrainedModel | None = None) -> float:
    """From the teacher, on the validation texts, which healing does not see."""
    task = get_task("cola").without_labels()
    rows = load_validation(task, data, tokenizer, model.config)
    return Reference(teacher or dense(), tokenizer, task, rows).divergence(model, progress=False).mean


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.state_dict().items())


@pytest.mark.parametrize("form", ["factors", "interpolative"])
def test_it_comes_nearer_and_the_factors_alone_have_changed(data: Path, tokenizer: Any, form: str) -> None:
    model, start, teacher = low_rank(form), low_rank(form), dense()
    facts = heal(model, teacher, tokenizer, get_task("cola"), data, **FAST)
    assert facts["healed"]
    assert facts["divergence_after"] < facts["divergence_before"]
    assert distance(model, tokenizer, data) < distance(start, tokenizer, data)
    assert same(teacher, dense())
    inside = tuple(f"{name}." for name in model.lowrank_ranks)
    before = start.state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith(inside) and not name.endswith(".order") for name in changed)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training
    json.dumps(facts)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_the_best_rate_goes_on(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are tried upwards until one learns less; what the best one learnt is where the training begins."""
    begun: list[dict[str, torch.Tensor]] = []
    train = healing._Healing.train

    def watched(self: Any, rate: float, steps: int, folder: Path, best: Any = None, *rest: Any, **saved: Any) -> float:
        begun.append(self.state())
        loss = train(self, rate, steps, folder, best, *rest, **saved)
        begun.append(self.state())
        return loss

    monkeypatch.setattr(healing._Healing, "train", watched)
    models = [low_rank(), low_rank()]
    rates = {"rates": (10.0, 3e-3, 30.0, 1e-6), "epochs": 5}
    facts = [heal(model, dense(), tokenizer, get_task("cola"), data, **FAST | rates) for model in models]
    assert same(*models)
    assert [trial["rate"] for trial in facts[0]["tried"]] == [1e-6, 3e-3, 10.0]
    assert facts[0]["learning_rate"] == min(facts[0]["tried"], key=lambda tried: tried["loss"])["rate"] == 3e-3
    assert facts[0]["tried"] == facts[1]["tried"]
    first, after_first, second, after_second, third, after_third, whole = begun[:7]
    for name, start in first.items():
        assert torch.equal(second[name], start)
        assert torch.equal(third[name], start)
        assert torch.equal(whole[name], after_second[name])
    assert len(begun) == 16
    assert not all(torch.equal(after_first[name], after_third[name]) for name in first)


@pytest.mark.parametrize("rate", [30.0, 1e30])
@pytest.mark.parametrize("rates", [1, 2])
def test_what_makes_it_worse_is_undone(data: Path, tokenizer: Any, rate: float, rates: int) -> None:
    model = low_rank()
    options = FAST | {"rates": tuple(rate * 2**k for k in range(rates)), "epochs": 1}
    facts = heal(model, dense(), tokenizer, get_task("cola"), data, **options)
    assert not facts["healed"]
    assert facts["divergence_after"] == facts["divergence_before"]
    assert same(model, low_rank())


def test_rounding_counts_and_half_precision_stays(data: Path, tokenizer: Any) -> None:
    """In bfloat16 steps of 1e-12 are lost: the rounded factors are no nearer, and those it had stay."""
    model, start = low_rank().bfloat16(), low_rank().bfloat16()
    facts = heal(model, dense(), tokenizer, get_task("cola"), data, **FAST | {"rates": (1e-12,), "epochs": 1})
    assert not facts["healed"]
    assert model.dtype == torch.bfloat16
    assert same(model, start)
    facts = heal(model, dense(), tokenizer, get_task("cola"), data, **FAST)
    assert facts["healed"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_model_of_full_rank_has_nothing_to_gain(data: Path, tokenizer: Any) -> None:
    model = compress(dense(), CompressionConfig("svd", params=dense().num_parameters() - 1), progress=False)[0]
    before = distance(model, tokenizer, data)
    facts = heal(model, dense(), tokenizer, get_task("cola"), data, **FAST | {"epochs": 1})
    assert facts["divergence_after"] <= facts["divergence_before"]
    assert distance(model, tokenizer, data) <= 2 * before + 1e-6


def test_the_loss_of_the_teacher_itself_is_zero_and_grows_with_every_blocks_error(tokenizer: Any) -> None:
    model = dense()
    batch = dict(tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt"))
    told = Teacher(model, True, None).says(batch)
    assert float(told.hidden_errors(told, batch, [torch.eye(32)] * 2).sum() + told.divergence(told).sum()) == 0
    other = replace(told, hidden=tuple(state + 0.1 for state in told.hidden))
    metrics = [torch.eye(32), torch.tensor(3.0)]  # of 5 and 3 tokens
    expected = torch.tensor([5.0, 3.0]) * 32 * 0.01 * (1 + 3) / 2 / 2
    torch.testing.assert_close(told.hidden_errors(other, batch, metrics), expected, rtol=1e-4, atol=0)
    padded = copy.deepcopy(told)
    for state in padded.hidden:
        state[1, 3:] += 1  # padding of the second text
    assert float(told.hidden_errors(padded, batch, [torch.eye(32)] * 2)[1]) == 0


def test_a_decoder_behind_an_encoder_has_tokens_of_its_own() -> None:
    """Padded otherwise, though texts are as long: of the first pair 3 tokens are read, and 5 are written."""
    ids, labels = token_ids(0, 2), token_ids(1, 2)
    mask = torch.ones_like(ids)
    mask[0, 3:], labels[0, 5:] = 0, IGNORED
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    teacher = Teacher(tiny_t5(), True, None)
    told = teacher.says(batch)
    other = replace(told, hidden=tuple(state + 0.1 for state in told.hidden))
    expected = torch.tensor([(3 + 5) / 2, 7.0]) * 32 * 0.01 / 2
    found = told.hidden_errors(other, batch, [torch.eye(32)] * 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert [mask is not None and int(mask.sum()) for mask in told.masks(batch)] == [10, 10, 12, 12]


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_what_errors_of_hidden_states_cost_is_told_before_they_are_made(tokenizer: Any, kind: str) -> None:
    """Random errors behind the first block, in its output or in one direction, change predictions by eᵀ G e / 2."""
    torch.manual_seed(0)
    tagger = BertForTokenClassification(bert_config(num_labels=9, initializer_range=0.3)).eval()
    model: Any = dense() if kind == "classes" else tagger
    texts = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 1)) for n in range(64)]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    teacher = Teacher(model.requires_grad_(False), True, None)
    damped = hidden_metrics(teacher, [batch] * 100)[0]
    metric = damped - torch.eye(32) * damped.diagonal().mean() * DAMPING / (1 + DAMPING)
    assert not any(weight.requires_grad for weight in model.parameters())
    told, mask = teacher.says(batch), batch["attention_mask"][..., None]
    worst = torch.linalg.eigh(metric).eigenvectors[:, -1]
    for directions in (torch.eye(32), worst[None]):
        found, expected = [], []
        for _ in range(64):
            error = 0.02 * torch.randn(*mask.shape[:2], len(directions)) @ directions
            hook = model.bert.encoder.layer[0].register_forward_hook(lambda *given, error=error: given[2] + error)
            said = teacher.asked(batch)
            hook.remove()
            found.append(float(told.divergence(said).mean()))
            expected.append(float(((error @ metric) * error * mask).sum() / 2 / len(texts)))
        assert sum(found) == pytest.approx(sum(expected), rel=0.15)


def test_a_teacher_is_asked_once_of_every_batch_of_all_epochs_and_rates(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FAST | {"epochs": 3, "rates": (3e-3, 1e-3), "patience": 9, "samples": 44}
    asked: list[int] = []
    taught, teacher = low_rank(), dense()
    teacher.register_forward_hook(lambda *given: asked.append(1))
    expected = heal(taught, teacher, tokenizer, get_task("cola"), data, **options)
    assert len(asked) == 2 + 6 + 6  # of 16 held-out texts, and of 44 others, of which once with gradients
    monkeypatch.setattr("hf_lowrank.training.told.KEPT_BYTES", 0)
    again = low_rank()
    facts = heal(again, teacher, tokenizer, get_task("cola"), data, **options)
    assert len(asked) > 2 * (2 + 6 + 6)
    assert same(taught, again)
    assert {**facts, "seconds": 0} == {**expected, "seconds": 0}


def test_what_a_teacher_says_of_texts_that_do_not_come_again_is_not_kept(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Teacher] = []
    monkeypatch.setattr(healing, "Teacher", lambda *given: teachers.append(Teacher(*given)) or teachers[-1])
    for epochs, kept in ((1, 1), (2, 6)):
        options = FAST | {"epochs": epochs, "rates": (1e-3, 3e-3), "samples": 44}
        heal(low_rank(), dense(), tokenizer, get_task("cola"), data, **options)
        assert len(teachers.pop().kept) == kept


def test_parts_of_a_step_add_up_to_it(data: Path, tokenizer: Any) -> None:
    models = [low_rank(), low_rank()]
    for model, parts in zip(models, (1, 4), strict=True):
        heal(model, dense(), tokenizer, get_task("cola"), data, **FAST | {"accumulate": parts, "epochs": 1})
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["conll2003", "tinystories", "text", "texts", "summarization"])
def test_every_kind_of_model_is_healed_on_texts(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    torch.manual_seed(0)
    texts = [" ".join(WORDS[(n * 5 + k) % 40] for k in range(n % 7 + 2)) for n in range(24)]
    teacher = {
        "conll2003": lambda: BertForTokenClassification(bert_config(num_labels=9, initializer_range=0.3)),
        "tinystories": tiny_gpt2,
        "text": tiny_gpt2,
        "texts": tiny_gpt2,
        "summarization": tiny_t5,
    }[kind]().eval()
    teacher.config.architectures = [type(teacher).__name__]
    texts *= 4 if kind == "text" else 1  # for as many windows of 8 tokens as there are texts
    column = {"tokens": [text.split() for text in texts]} if kind == "conll2003" else {"text": texts}
    column |= {"summary": texts} if kind == "summarization" else {}
    Dataset.from_dict(column).to_parquet(tmp_path / "train.parquet")  # without labels
    task = texts_task(given_texts(texts), teacher.config) if kind == "texts" else get_task(kind, 8, data_dir=tmp_path)
    model = compress(copy.deepcopy(teacher), CompressionConfig("svd", 0.25), progress=False)[0]
    data = None if kind == "texts" else tmp_path
    facts = heal(model, teacher, tokenizer, task, data, **FAST | {"held_out": 8, "epochs": 6})
    assert facts["healed"]


@pytest.mark.slow
def test_an_interrupted_healing_goes_on_to_the_same_weights(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = FAST | {"rates": (3e-3, 1e-3), "patience": 9}
    whole = low_rank()
    expected = heal(whole, dense(), tokenizer, get_task("cola"), data, **options)

    class Killer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 16 and args.save_strategy != "no":
                raise KeyboardInterrupt

    begin = healing._Trainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(healing._Trainer, "__init__", lambda self, *a: (begin(self, *a), self.add_callback(Killer()))[0])
        with pytest.raises(KeyboardInterrupt):
            heal(low_rank(), dense(), tokenizer, get_task("cola"), data, checkpoints=tmp_path, **options)
    with pytest.raises(LowRankError, match="checkpoints of an interrupted run; resume it"):
        heal(low_rank(), dense(), tokenizer, get_task("cola"), data, checkpoints=tmp_path, **options)
    other = options | {"hidden": 2}
    with pytest.raises(LowRankError, match="checkpoints of a run with hidden 1, not 2"):
        heal(low_rank(), dense(), tokenizer, get_task("cola"), data, checkpoints=tmp_path, resume=True, **other)
    (tmp_path / "other").mkdir()
    Dataset.from_parquet(str(data / "train.parquet")).map(longer).to_parquet(tmp_path / "other" / "train.parquet")
    again: dict[str, Any] = options | {"checkpoints": tmp_path, "resume": True}
    with pytest.raises(LowRankError, match="checkpoints of a run with data '"):
        heal(low_rank(), dense(), tokenizer, get_task("cola"), tmp_path / "other", **again)
    torch.manual_seed(99)
    for _ in range(2):  # once more from the end, where nothing is left to do
        resumed = low_rank()
        facts = heal(resumed, dense(), tokenizer, get_task("cola"), data, checkpoints=tmp_path, resume=True, **options)
        assert same(whole, resumed)
        assert {**facts, "seconds": 0} == {**expected, "seconds": 0}


def longer(row: dict[str, Any]) -> dict[str, Any]:
    """A row of another text."""
    return row | {"sentence": f"{row['sentence']} w1"}


SHARED: dict[str, Any] = FAST | {"samples": 40, "rates": (3e-3, 1e-2)}  # whole batches alone: what is left is filled up


def _heal_and_save(data: Path, out: Path) -> None:
    model = low_rank()
    heal(model, dense(), tiny_tokenizer(), get_task("cola"), data, **SHARED)
    torch.save(model.state_dict(), out.with_name(f"{out.name}{torch.distributed.get_rank()}"))


@pytest.mark.slow
def test_two_processes_heal_as_one_does(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    alone = low_rank()
    assert heal(alone, dense(), tokenizer, get_task("cola"), data, **SHARED)["healed"]
    Job(tmp_path / "log", _heal_and_save, data, tmp_path / "rank", processes=2).done()
    zero, one = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert all(torch.equal(weight, one[name]) for name, weight in zero.items())
    together = low_rank()
    together.load_state_dict(zero)  # what has no effect, such as the biases of keys, follows rounding
    batch = dict(tokenizer([" ".join(WORDS[:n]) for n in range(2, 9)], padding=True, return_tensors="pt"))
    said, expected, start = (model(**batch).logits for model in (together, alone, low_rank()))
    assert (said - expected).norm() < 0.05 * (expected - start).norm()


@pytest.mark.slow
def test_bf16_changes_the_arithmetic_of_training_alone(data: Path, tokenizer: Any) -> None:
    exact, mixed = low_rank(), low_rank()
    for model, bf16 in ((exact, False), (mixed, True)):
        assert heal(model, dense(), tokenizer, get_task("cola"), data, bf16=bf16, **FAST)["healed"]
    assert not same(exact, mixed)
    assert mixed.dtype == torch.float32
    assert "forward" not in mixed.__dict__


def test_another_teacher_is_refused(data: Path, tokenizer: Any) -> None:
    torch.manual_seed(1)
    stranger = BertForSequenceClassification(bert_config(num_labels=2))
    wide = dense(intermediate_size=128)
    for teacher, message in (
        (stranger, "the teacher is another model: its .* is not the low-rank model's"),
        (wide, r"its bert.encoder.layer.0.intermediate.dense is \[128, 32\], the low-rank model's \[64, 32\]"),
        (low_rank(), "the teacher is a LowRankBert.*give the dense model that this one was made from"),
        (tiny_t5(), "the teacher is a T5.*and the model a low-rank BertForSequenceClassification"),
    ):
        with pytest.raises(LowRankError, match=message):
            heal(low_rank(), teacher, tokenizer, get_task("cola"), data, **FAST)
    with pytest.raises(LowRankError, match="is not a low-rank model: compress it first"):
        heal(dense(), dense(), tokenizer, get_task("cola"), data, **FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "must be at least 1, epochs above 0"),
        ({"epochs": 0}, "must be at least 1, epochs above 0"),
        ({"rates": ()}, "rates are learning rates above 0, at least one"),
        ({"rates": (1e-3, -1.0)}, "rates are learning rates above 0"),
        ({"batch_size": 8, "accumulate": 3}, "a batch of 8 rows cannot be shared by 1 processes, 3 parts each"),
    ],
)
def test_bad_settings_are_named(data: Path, tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        heal(low_rank(), dense(), tokenizer, get_task("cola"), data, **FAST | settings)


def test_one_text_is_too_few(tokenizer: Any) -> None:
    model = low_rank()
    model.config.architectures = ["BertForSequenceClassification"]
    with pytest.raises(LowRankError, match="healing takes two texts at least"):
        heal(model, dense(), tokenizer, texts_task(given_texts(["w1"]), model.config), **FAST)


def test_it_learns_from_and_is_judged_by_texts_that_the_statistics_of_its_seed_are_not_of(
    data: Path, tokenizer: Any
) -> None:
    task, rows = get_task("cola"), load_split(get_task("cola"), "train", data)
    measured = encode_chosen(rows, task, tokenizer, dense().config, 40, 0)["input_ids"]
    learnt, judged = healing._texts(tokenizer, task, data, dense(), HealConfig(held_out=16, samples=44))
    assert len(judged) == 16
    assert not any(ids in measured or ids in learnt["input_ids"] for ids in judged["input_ids"])
    fresh = healing._texts(tokenizer, task, data, dense(), HealConfig(held_out=16, samples=4))[0]
    assert not any(ids in measured for ids in fresh["input_ids"])


def test_batches_are_the_same_in_every_epoch_of_like_lengths_and_in_another_order() -> None:
    arguments = SimpleNamespace(train_batch_size=4, world_size=1, gradient_accumulation_steps=1, seed=0)
    lengths = [row * 7 % 13 for row in range(39)]
    epochs = []
    for epoch in (0, 1):
        trainer: Any = SimpleNamespace(args=arguments, state=SimpleNamespace(epoch=epoch))
        rows = list(SameBatches(trainer, lengths))
        epochs.append([tuple(rows[start : start + 4]) for start in range(0, 39, 4)])
    assert sorted(sum(epochs[0], ())) == list(range(39))
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert max(max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in epochs[0]) <= 2


def test_a_quarter_of_the_texts_is_read_between_two_bounds(
    data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bounds, expected in (((4, 30), 15), ((30, 40), 30), ((4, 10), 10), ((2048, 4096), 44)):
        monkeypatch.setattr(healing, "FEWEST", bounds[0])
        monkeypatch.setattr(healing, "MOST", bounds[1])
        assert len(healing._texts(tokenizer, get_task("cola"), data, dense(), HealConfig(held_out=16))[0]) == expected


def test_of_long_windows_fewer_are_read_that_hold_as_many_tokens(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(WORDS[(n * 5 + k) % 40] for k in range(99)) for n in range(200)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train.parquet")
    teacher = tiny_llama().eval()
    task = get_task("text", 256, data_dir=tmp_path)
    monkeypatch.setattr(healing, "FEWEST", 48)
    config = HealConfig(held_out=12, batch_size=8)
    learnt, judged = healing._texts(tokenizer, task, tmp_path, teacher, config)
    assert [len(learnt), len(judged), len(learnt["input_ids"][0])] == [24, 6, 256]
    assert len(healing._texts(tokenizer, task, tmp_path, teacher, replace(config, samples=9))[0]) == 9
    reference = Reference(teacher, tokenizer, task, [])
    begun = healing._Healing(teacher, teacher, {}, learnt, reference, dict, config, False)
    assert (begun.batch, begun.steps) == (4, 12)
    begun.config = replace(config, batch_size=10, accumulate=3)
    assert begun.batch == 6  # not 5, of which there are no thirds


def test_the_hidden_states_weigh_less_the_nearer_the_end_is(tokenizer: Any) -> None:
    batch = dict(tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt"))
    model, teacher = low_rank(), dense()
    reference = Reference(teacher, tokenizer, get_task("cola"), [])
    begun = healing._Healing(model, teacher, {}, Dataset.from_dict({}), reference, dict, HealConfig(hidden=2), False)
    begun.metrics = [torch.eye(32), torch.tensor(2.0)]
    first, half, last = (begun.losses(model, batch, left) for left in (1, 0.5, 0))
    torch.testing.assert_close(first - half, half - last)
    told = begun.told.says(batch)
    said = Told.of(model, model(**begun.told.inputs(batch)), batch, None)
    torch.testing.assert_close(last, told.divergence(said))
    torch.testing.assert_close(first - last, 2 * told.hidden_errors(said, batch, begun.metrics))
