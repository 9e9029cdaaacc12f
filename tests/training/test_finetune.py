"""Fine-tuning learns, repeats itself, goes on where it was, and keeps what it was given; so does its command."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import hf_lowrank.training.finetune as finetuning
from hf_lowrank import CompressionConfig, LowRankError, compress
from hf_lowrank.folder.loading import load_for_finetuning
from hf_lowrank.tasks import get_task
from hf_lowrank.training.distillation import Distillation
from hf_lowrank.training.finetune import finetune
from hf_lowrank.training.running import last_checkpoint
from tests.helpers import bert_config, tiny_gpt2
from tests.tiny_task import WORDS, run, tiny_tokenizer, write_cola, write_encoder

FAST = {"learning_rate": 3e-3, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cola(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "base")


def classifier(low_rank: bool = False, dropout: float = 0.1) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config(num_labels=2, hidden_dropout_prob=dropout)).eval()
    return compress(model, CompressionConfig("svd", 0.25), progress=False)[0] if low_rank else model


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(weight, theirs[name]) for name, weight in one.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("low_rank", [False, True])
def test_it_learns_and_repeats_itself(data: Path, tokenizer: Any, low_rank: bool) -> None:
    runs = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        model = classifier(low_rank)
        facts = finetune(model, tokenizer, get_task("cola"), data, epochs=8, seed=seed, **FAST)
        runs[name] = model, facts
    model, facts = runs["first"]
    assert facts["score"] > 80
    assert facts["history"][-1]["loss"] < 0.5 * facts["history"][0]["loss"]
    assert (facts["samples"], facts["steps"]) == (60, 8 * 8)
    assert not model.training
    assert same(model, runs["again"][0])
    assert not same(model, runs["other"][0])
    json.dumps(facts)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 3])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None
) -> None:
    """Killed in the second epoch, with dropout on; checkpoints after every epoch, or in the midst of one."""
    options: dict[str, Any] = FAST | {"epochs": 3, "score": False}
    whole = classifier(low_rank=True)
    finetune(whole, tokenizer, get_task("cola"), data, **options)

    class Killer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 14:
                raise KeyboardInterrupt

    follow = finetuning._Trainer.follow
    with monkeypatch.context() as patch:
        patch.setattr(finetuning._Trainer, "follow", lambda self, *a: (follow(self, *a), self.add_callback(Killer())))
        with pytest.raises(KeyboardInterrupt):
            finetune(
                classifier(low_rank=True), tokenizer, get_task("cola"), data,
                checkpoints=tmp_path, checkpoint_steps=steps, **options,
            )  # fmt: skip
    with pytest.raises(LowRankError, match="holds the checkpoints of an interrupted run; resume it"):
        finetune(classifier(low_rank=True), tokenizer, get_task("cola"), data, checkpoints=tmp_path, **options)
    with pytest.raises(LowRankError, match="checkpoints of a run with epochs 3, not 2"):
        finetune(
            classifier(low_rank=True), tokenizer, get_task("cola"), data,
            checkpoints=tmp_path, resume=True, **options | {"epochs": 2},
        )  # fmt: skip
    with pytest.raises(LowRankError, match="checkpoints of a run with model weights"):
        finetune(classifier(), tokenizer, get_task("cola"), data, checkpoints=tmp_path, resume=True, **options)
    torch.manual_seed(99)
    for epochs in ([1, 2, 3], [1, 2]):  # once more from the end, where nothing is left to do
        resumed = classifier(low_rank=True)
        facts = finetune(
            resumed, tokenizer, get_task("cola"), data,
            checkpoints=tmp_path, checkpoint_steps=steps, resume=True, **options,
        )  # fmt: skip
        assert facts["steps"] == 24
        assert [entry["epoch"] for entry in facts["history"]][: len(epochs)] == epochs
        assert same(whole, resumed)


@pytest.fixture(scope="module")
def taught(data: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a run that has left checkpoints."""
    checkpoints = tmp_path_factory.mktemp("taught")
    options = FAST | {"epochs": 1, "patience": 1, "score": False, "checkpoints": checkpoints}
    finetune(classifier(), tokenizer, get_task("cola"), data, distillation=Distillation(classifier()), **options)
    return options


@pytest.mark.parametrize("other", ["text", "order", "validation", "teacher"])
def test_a_run_does_not_go_on_with_other_data_or_another_teacher(
    data: Path, tokenizer: Any, taught: dict[str, Any], tmp_path: Path, other: str
) -> None:
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / ("validation.parquet" if other == "validation" else "train.parquet")
    rows = Dataset.from_parquet(str(path)).to_list()
    if other == "order":
        rows.reverse()
    elif other != "teacher":
        rows[3]["sentence"] = "w7 w7"
    Dataset.from_list(rows).to_parquet(path)
    distillation = Distillation(classifier(low_rank=other == "teacher"))
    differs = "teacher's weights" if other == "teacher" else "data"
    with pytest.raises(LowRankError, match=f"holds checkpoints of a run with {differs} '"):
        finetune(
            classifier(), tokenizer, get_task("cola"), tmp_path / "data",
            distillation=distillation, resume=True, **taught,
        )  # fmt: skip


@pytest.mark.slow
def test_bf16_changes_the_arithmetic_of_training_alone(data: Path, tokenizer: Any) -> None:
    exact, mixed, after = classifier(), classifier(), classifier()
    options = FAST | {"epochs": 1, "score": False}
    finetune(exact, tokenizer, get_task("cola"), data, **options)
    finetune(mixed, tokenizer, get_task("cola"), data, bf16=True, **options)
    finetune(after, tokenizer, get_task("cola"), data, **options)
    assert same(exact, after)
    assert not same(exact, mixed)
    assert mixed.dtype == torch.float32
    assert "forward" not in mixed.__dict__
    inputs = tokenizer("w1 w2", return_tensors="pt")
    fresh = classifier()
    fresh.load_state_dict(mixed.state_dict())
    assert torch.equal(mixed(**inputs).logits, fresh(**inputs).logits)


def test_half_precision_is_trained_in_full(data: Path, tokenizer: Any) -> None:
    model, start = classifier().bfloat16(), classifier().bfloat16()
    finetune(model, tokenizer, get_task("cola"), data, epochs=1, score=False, **FAST | {"learning_rate": 1e-5})
    assert model.dtype == torch.bfloat16
    assert not same(model, start)


def test_early_stopping_keeps_the_best_epoch(data: Path, tokenizer: Any) -> None:
    model = classifier()
    facts = finetune(
        model, tokenizer, get_task("cola"), data, epochs=30, patience=2, schedule="constant",
        **FAST | {"learning_rate": 1e-3},
    )  # fmt: skip
    scores = [entry["score"] for entry in facts["history"]]
    assert len(scores) < 30
    assert len(scores) == scores.index(max(scores)) + 1 + 2
    assert facts["score"] == pytest.approx(max(scores))


@pytest.mark.parametrize("task", ["cola", "conll2003", "tinystories"])
def test_every_kind_of_task_can_be_trained_with_a_teacher(
    tmp_path: Path, tokenizer: Any, folder: Path, task: str
) -> None:
    rows = {
        "cola": {"sentence": ["w1 w2", "w3", "w4 w5 w6"], "label": [0, 1, 1]},
        "conll2003": {"tokens": [["w1", "w2"], ["w3"], ["w4", "w1"]], "ner_tags": [[0, 1], [3], [5, 0]]},
        "tinystories": {"text": ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]},
    }[task]
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    the_task = get_task(task)
    if task == "tinystories":
        student, teacher = tiny_gpt2(), tiny_gpt2()
    else:
        student, teacher = (load_for_finetuning(str(folder), the_task, seed)[0] for seed in (0, 1))
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    facts = finetune(student, tokenizer, the_task, tmp_path, epochs=2, distillation=Distillation(teacher), **FAST)
    assert math.isfinite(facts["score"])
    assert facts["settings"]["distillation"] == {"temperature": 2.0, "logits": 0.5, "hidden": 1.0}
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())


@pytest.mark.slow
def test_a_student_comes_near_its_teacher_without_labels(data: Path, tokenizer: Any) -> None:
    teacher = classifier()
    finetune(teacher, tokenizer, get_task("cola"), data, epochs=8, score=False, **FAST)
    student = compress(classifier(), CompressionConfig("svd", 0.25), progress=False)[0]
    student.classifier.load_state_dict(teacher.classifier.state_dict())
    inputs = tokenizer(" ".join(WORDS[:20]), return_tensors="pt")

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (student, teacher))
        return float((ours - theirs).square().mean())

    before = distance()
    distillation = Distillation(teacher, logits=1.0)
    finetune(student, tokenizer, get_task("cola"), data, epochs=8, score=False, distillation=distillation, **FAST)
    assert distance() < 0.5 * before


def test_a_perfect_student_has_nothing_to_learn(tokenizer: Any) -> None:
    model = classifier()
    batch = tokenizer(["w1 w2", "w3"], padding=True, return_tensors="pt") | {"labels": torch.tensor([0, 1])}
    outputs = model(**batch, output_hidden_states=True)
    loss = Distillation(model, logits=1.0).loss(outputs.loss, outputs, dict(batch))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    half = Distillation(model, logits=0.5, hidden=0).loss(outputs.loss, outputs, dict(batch))
    assert float(half.detach()) == pytest.approx(0.5 * float(outputs.loss.detach()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs and learning rate must be above 0"),
        ({"learning_rate": -1}, "epochs and learning rate must be above 0"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; there are linear, constant"),
        ({"patience": 0}, "a number of epochs, at least 1; it is 0"),
        ({"learning_rate": 1e30}, "the training diverged.*lower the learning rate"),
    ],
)
def test_bad_settings_are_named(data: Path, tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        finetune(classifier(), tokenizer, get_task("cola"), data, **FAST | settings)


def test_a_teacher_that_does_not_fit_is_named() -> None:
    wide = BertForSequenceClassification(bert_config(num_labels=2, hidden_size=64))
    three = BertForSequenceClassification(bert_config(num_labels=3))
    with pytest.raises(LowRankError, match="of width 64 do not fit the model's 2 of 32"):
        Distillation(wide).check(classifier())
    Distillation(wide, hidden=0).check(classifier())
    with pytest.raises(LowRankError, match="the teacher has 3 labels .* the model 2"):
        Distillation(three).check(classifier())
    with pytest.raises(LowRankError, match="they are 0, 0.5 and 1.0"):
        Distillation(three, temperature=0)


def test_a_new_head_has_the_tasks_labels_and_is_drawn_by_the_seed(folder: Path) -> None:
    model, _, fresh = load_for_finetuning(str(folder), get_task("conll2003"))
    assert fresh == ["classifier.bias", "classifier.weight"]
    assert model.config.id2label[1] == "B-PER"
    heads = [load_for_finetuning(str(folder), get_task("stsb"), seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert heads[0].shape[0] == 1
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_first_layers_of_a_model(folder: Path) -> None:
    whole, short = (load_for_finetuning(str(folder), get_task("cola"), layers=n)[0] for n in (None, 1))
    assert short.config.num_hidden_layers == len(short.bert.encoder.layer) == 1
    assert torch.equal(short.bert.encoder.layer[0].output.dense.weight, whole.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(LowRankError, match="a dense model of 2 layers is cut to 1 to 2 of them, not to 3"):
        load_for_finetuning(str(folder), get_task("cola"), layers=3)


def test_more_than_a_head_is_not_made_anew(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LowRankError, match="has not all weights of a BertLMHeadModel: .*only a head"):
        load_for_finetuning(str(folder), get_task("tinystories"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LowRankError, match=r"bert\.encoder\.layer\.2"):
        load_for_finetuning(str(folder), get_task("cola"))


# --- the command ---


@pytest.mark.slow
def test_before_and_after_compression(folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    common = ("--task", "cola", "--data-dir", data)
    fast = ("--epochs", 4, "--learning-rate", 3e-3, "--batch-size", 8)
    dense, small, tuned = (tmp_path / name for name in ("dense", "small", "tuned"))
    code, printed, _ = run(monkeypatch, capfd, "finetune", folder, *common, *fast, "--output", dense)
    assert code == 0
    assert "new, drawn by seed 0: classifier.bias, classifier.weight" in printed
    assert run(monkeypatch, capfd, "compress", dense, *common, "--output", small, "--evaluate")[0] == 0
    code, printed, _ = run(
        monkeypatch, capfd, "finetune", small, *common, *fast, "--output", tuned, "--teacher", dense, "--json"
    )
    assert code == 0
    result = json.loads(printed)
    code, printed, _ = run(monkeypatch, capfd, "evaluate", tuned, *common, "--json")
    assert json.loads(printed)["score"] == result["score"]
    before, record = (json.loads((path / "compression.json").read_text()) for path in (small, tuned))
    noted = record.pop("scored_on")
    assert noted["dense"] == noted["compressed"] == noted["finetuned"] == json.loads(printed)["scored_on"]
    assert before.pop("scored_on") == {key: noted[key] for key in ("dense", "compressed")}
    assert before["labels"]["labels"] == {"unacceptable": "unacceptable", "acceptable": "acceptable"}
    assert record["score_finetuned"] == result["score"]
    assert record["finetuning"]["teacher"] == "dense"
    assert record["finetuning"]["settings"]["epochs"] == 4
    assert {key: record[key] for key in before if key != "fingerprint"} == {
        key: value for key, value in before.items() if key != "fingerprint"
    }
    assert not list(tmp_path.glob("*.checkpoints"))


@pytest.mark.slow
def test_scores_on_other_data_are_not_compared(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    fast = ("--task", "cola", "--epochs", 1, "--batch-size", 8)
    dense, small, other = (tmp_path / name for name in ("dense", "small", "other"))
    assert run(monkeypatch, capfd, "finetune", folder, *fast, "--data-dir", data, "--output", dense)[0] == 0
    words = ("compress", dense, "--task", "cola", "--data-dir", data, "--output", small, "--evaluate")
    assert run(monkeypatch, capfd, *words)[0] == 0
    shutil.copytree(data, other)
    shutil.copy(data / "train.parquet", other / "validation.parquet")
    for place, compared in ((data, True), (other, False)):
        output = tmp_path / f"tuned-{compared}"
        code, printed, _ = run(monkeypatch, capfd, "finetune", small, *fast, "--data-dir", place, "--output", output)
        assert code == 0
        assert (" → " in printed) == compared
        assert ("which are other data." in printed) != compared
        row = next(line for line in (output / "README.md").read_text().splitlines() if line.startswith("| Matthews"))
        assert row.count("|  ") == (0 if compared else 2)
    record = json.loads((small / "compression.json").read_text())
    del record["scored_on"]  # as older versions wrote it
    (small / "compression.json").write_text(json.dumps(record))
    words = ("finetune", small, *fast, "--data-dir", data, "--output", tmp_path / "old")
    code, printed, _ = run(monkeypatch, capfd, *words)
    assert code == 0
    assert "is not compared: not both were recorded with their validation data." in printed
    assert " → " not in printed


def test_the_stored_dtype_is_kept(folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    half = tmp_path / "half"
    BertModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(half)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (half / file).write_bytes((folder / file).read_bytes())
    words = ("--task", "cola", "--data-dir", data, "--epochs", 1, "--output", tmp_path / "out")
    assert run(monkeypatch, capfd, "finetune", half, *words)[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


@pytest.mark.slow
def test_an_interrupted_command_is_resumed(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    words = ("finetune", folder, "--task", "cola", "--data-dir", data, "--epochs", 2, "--output")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, capfd, *words, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("hf_lowrank.folder.saving.save_model", fails)
        assert run(monkeypatch, capfd, *words, tmp_path / "cut")[0] == 130
    code, _, err = run(monkeypatch, capfd, *words, tmp_path / "cut")
    assert code == 2
    assert "interrupted run; resume it" in err
    assert run(monkeypatch, capfd, *words, tmp_path / "cut", "--resume")[0] == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_every_command_takes_own_columns(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    columns = ("--text-column", "sentence", "--label-column", "label")
    common = ("--task", "custom", *columns, "--data-dir", data)
    dense, small, statistics = (tmp_path / name for name in ("dense", "small", "statistics"))
    words = ("--epochs", 4, "--learning-rate", 3e-3, "--batch-size", 8, "--output", dense)
    assert run(monkeypatch, capfd, "finetune", folder, *common, *words)[0] == 0
    assert run(monkeypatch, capfd, "statistics", dense, *common, "--output", statistics)[0] == 0
    words = ("--statistics", statistics, "--output", small, "--evaluate", "--json")
    code, printed, _ = run(monkeypatch, capfd, "compress", dense, *common, *words)
    assert code == 0
    compressed = json.loads(printed)
    code, printed, _ = run(monkeypatch, capfd, "evaluate", small, *common, "--json")
    assert json.loads(printed)["score"] == json.loads(printed)["accuracy"] == compressed["score_compressed"]
    assert run(monkeypatch, capfd, "evaluate", small, "--task", "custom", "--data-dir", data)[0] == 2


def test_a_run_that_failed_before_its_first_checkpoint_leaves_nothing_to_resume(tmp_path: Path) -> None:
    settings = {"seed": 0}
    assert last_checkpoint(tmp_path / "checkpoints", settings, resume=False) is None
    assert last_checkpoint(tmp_path / "checkpoints", {"seed": 1}, resume=False) is None  # not an interrupted run
    whole = tmp_path / "checkpoints" / "checkpoint-3"
    whole.mkdir()
    (whole / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LowRankError, match="holds the checkpoints of an interrupted run"):
        last_checkpoint(tmp_path / "checkpoints", {"seed": 1}, resume=False)
    assert last_checkpoint(tmp_path / "checkpoints", {"seed": 1}, resume=True) == str(whole)
