"""Folders of sentence-transformers: their embeddings are what is kept, and what follows the transformer goes along."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForSequenceClassification

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer  # noqa: E402

from hf_lowrank.errors import LowRankError  # noqa: E402
from hf_lowrank.folder import hub  # noqa: E402
from hf_lowrank.folder.saving import save_model  # noqa: E402
from hf_lowrank.folder.sentences import read_sentences  # noqa: E402
from hf_lowrank.pipeline import Pipeline  # noqa: E402
from hf_lowrank.tasks import get_task  # noqa: E402
from hf_lowrank.training.similarity import shared_neighbours  # noqa: E402
from tests.helpers import HIDDEN, tiny_bert  # noqa: E402
from tests.launches import QUIET  # noqa: E402
from tests.tiny_task import WORDS, run, tiny_tokenizer, write_cola, write_encoder  # noqa: E402

TEXTS = ["w1 w2 w3", "w4 w5", "w1 w7 w9 w11"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny encoder whose pooled states are widened and normalised."""
    body = Transformer(str(write_encoder(tmp_path / "body")))
    parts = [body, Pooling(HIDDEN, pooling_mode="mean"), Dense(HIDDEN, 24), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "sentences"))
    return tmp_path / "sentences"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """STS-like pairs."""
    (tmp_path / "pairs").mkdir()
    for split, count in (("train", 30), ("validation", 12)):
        texts = [
            [" ".join(WORDS[(n * k + j + k) % 40] for j in range(n % 5 + 1)) for n in range(count)] for k in (3, 7)
        ]
        rows = {"sentence1": texts[0], "sentence2": texts[1], "label": [float(n * 5 % 11) / 2 for n in range(count)]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "pairs" / f"{split}.parquet")
    return tmp_path / "pairs"


def encoded(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS)


def test_a_compressed_folder_is_one_of_sentence_transformers(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output, options = tmp_path / "small", ("--task", "stsb", "--data-dir", data)
    words = ("compress", folder, *options, "--rank-ratio", 0.4, "--evaluate", "--output", output)
    code, _, err = run(monkeypatch, capfd, *words)
    assert code == 0, err
    small = SentenceTransformer(str(output), device="cpu")
    assert [type(part).__name__ for part in small] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert small[0].auto_model.lowrank_ranks
    record = json.loads((output / "compression.json").read_text())
    assert record["statistics"]["labels"] == "model, sentence_embedding"
    assert 0 < record["neighbours"] <= 100
    pairs = Dataset.from_parquet(str(data / "validation.parquet"))
    for model, kind in ((small, "compressed"), (SentenceTransformer(str(folder), device="cpu"), "dense")):
        evaluator = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["label"])
        assert record[f"score_{kind}"] == pytest.approx(100 * evaluator(model)["spearman_cosine"], abs=1e-4)
    code, out, err = run(monkeypatch, capfd, "evaluate", output, *options, "--against", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["spearman"] == pytest.approx(record["score_compressed"])


@pytest.mark.slow
def test_healing_brings_the_embeddings_nearer(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline.load(str(folder), "stsb", data)
    teacher = copy.deepcopy(pipeline.model)
    pipeline.compress(method="svd", rank_ratio=0.25)
    before = pipeline.divergence(teacher)
    pipeline.save(tmp_path / "small")
    rows = ("--task", "stsb", "--data-dir", data)
    how = ("--rate", 3e-3, "--epochs", 8, "--batch-size", 8, "--held-out", 16, "--evaluate", "--json")
    words = ("heal", tmp_path / "small", "--teacher", folder, *rows, *how, "--output", tmp_path / "healed")
    code, out, err = run(monkeypatch, capfd, *words)
    assert code == 0, err
    told = json.loads(out)
    assert told["divergence"]["compressed"]["mean"] < before.mean
    healed = Pipeline.load(str(tmp_path / "healed"), "stsb", data)
    assert told["divergence"]["compressed"]["mean"] == pytest.approx(healed.divergence(teacher).mean, rel=1e-4)
    assert told["score_compressed"] == pytest.approx(healed.score()["spearman"])


def test_the_statistics_are_of_the_embedding(folder: Path, data: Path) -> None:
    """What only lengthens a vector that is normalised after it changes nothing, and the hidden states do not count."""
    pipeline = Pipeline.load(str(folder), "stsb", data)
    assert pipeline.sentences is not None
    layer = "encoder.layer.1.output.dense"
    before = pipeline.measure(["fisher_rows"], labels="model")
    assert before.labels == "model, sentence_embedding"
    dense: Any = pipeline.sentences.parts[1]
    dense.activation_function = torch.nn.Identity()
    dense.linear.bias.zero_()
    straight = pipeline.measure(["fisher_rows"], labels="model").mean("fisher_rows", layer)
    dense.linear.weight.mul_(7)
    torch.testing.assert_close(pipeline.measure(["fisher_rows"], labels="model").mean("fisher_rows", layer), straight)
    whole = Pipeline(pipeline.model, pipeline.tokenizer, pipeline.task, data).measure(["fisher_rows"], labels="model")
    assert whole.labels == "model"
    assert not torch.allclose(whole.mean("fisher_rows", layer), straight, rtol=0.1)


def test_texts_alone_are_enough(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "3_Normalize")  # all-MiniLM-L6-v2 has none
    pipeline = Pipeline.load(str(folder), texts=[f"{a} {b}" for a, b in itertools.pairwise(WORDS)])
    pipeline.compress(rank_ratio=0.4)
    pipeline.save(tmp_path / "small")
    assert encoded(tmp_path / "small").shape == (3, 24)
    similar = (encoded(tmp_path / "small") * encoded(folder)).sum(axis=1)
    assert (similar > 0.9).all()


def test_what_follows_the_transformer_stays_with_it_and_leaves_with_another_head(folder: Path, tmp_path: Path) -> None:
    body = AutoModel.from_pretrained(folder)
    save_model(body, tiny_tokenizer(), tmp_path / "again")
    np.testing.assert_allclose(encoded(tmp_path / "again"), encoded(folder), atol=1e-6)
    save_model(AutoModelForSequenceClassification.from_pretrained(folder), None, tmp_path / "classifier")
    assert not (tmp_path / "classifier" / "modules.json").exists()


def test_one_command_compresses_a_cross_encoder_by_pairs_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_bert(num_labels=1).save_pretrained(tmp_path / "body")
    tiny_tokenizer().save_pretrained(tmp_path / "body")
    CrossEncoder(str(tmp_path / "body"), device="cpu").save(str(tmp_path / "cross"))
    pairs = [{"query": f"w{n}", "passage": f"w{n + 1} w{n + 2}"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    texts = ("--texts", tmp_path / "pairs.jsonl", "--text-column", "query", "--text-column", "passage")
    words = ("compress", tmp_path / "cross", *texts, "--rank-ratio", 0.4, "--output", tmp_path / "small")
    code, _, err = run(monkeypatch, capfd, *words)
    assert code == 0, err
    cross = CrossEncoder(str(tmp_path / "small"), device="cpu")
    assert cross.model.lowrank_ranks
    asked = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])]
    inputs = tiny_tokenizer()([a for a, _ in asked], [b for _, b in asked], padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    with torch.inference_mode():
        logits = model(**inputs).logits[:, 0]
    np.testing.assert_allclose(cross.predict(asked), logits.sigmoid().numpy(), atol=1e-5)


@pytest.mark.slow
def test_without_the_library_it_loads_by_its_own_code(folder: Path, data: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(str(folder), "stsb", data)
    pipeline.compress(rank_ratio=0.4)
    pipeline.save(tmp_path / "small")
    np.save(tmp_path / "expected.npy", encoded(tmp_path / "small"))
    code = f"""
import sys
sys.modules["hf_lowrank"] = None
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("small", device="cpu", trust_remote_code=True)
np.testing.assert_allclose(model.encode({TEXTS!r}), np.load("expected.npy"), atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=os.environ | QUIET)


def edit(folder: Path, number: int, **changes: Any) -> None:
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    modules[number] |= changes
    path.write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"type": "mine.Pooling"}, "names mine.Pooling, which is not known what it does; known are Pooling"),
        (1, {"type": "sentence_transformers.models.LSTM"}, "LSTM, which is not known"),
        (0, {"type": "sentence_transformers.models.StaticEmbedding"}, "begins with a StaticEmbedding in the folder"),
        (0, {"path": "0_Transformer"}, "begins with a Transformer in 0_Transformer; only a Transformer in the folder"),
        (0, {"type": 3}, "is not a list of sentence-transformers' modules"),
    ],
)
def test_modules_that_are_not_known_are_refused(folder: Path, number: int, changes: Any, message: str) -> None:
    edit(folder, number, **changes)
    with pytest.raises(LowRankError, match=message):
        read_sentences(str(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LowRankError, match="2_Dense are pickled, and are never read"):
        read_sentences(str(folder))


def test_a_task_of_single_texts_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match="cola has no pairs of texts with a number"):
        Pipeline.load(str(folder), get_task("cola"), write_cola(tmp_path / "cola"))


def test_studies_of_losses_are_refused(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("sweep", "analyze"):
        words = (command, folder, "--task", "stsb", "--data-dir", data, "--output", tmp_path / command)
        code, _, err = run(monkeypatch, capfd, *words)
        assert code == 2
        assert "measures losses, and embeddings of sentence-transformers have none: compress the model to" in err


def test_a_push_takes_what_follows_the_transformer(folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(str(folder), texts=TEXTS)
    pipeline.compress(rank_ratio=0.4)
    pipeline.save(tmp_path / "small")
    published = hub._files(tmp_path / "small")
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= {*published}


def test_neighbours_that_two_models_share() -> None:
    dense = np.eye(4) + np.array([[0, 0.9, 0, 0], [0.9, 0, 0, 0], [0, 0, 0, 0.9], [0, 0, 0.9, 0]])
    swapped = dense[[0, 2, 1, 3]]
    assert shared_neighbours(dense, dense, 1) == 100
    assert shared_neighbours(dense, swapped, 1) == 0
    assert shared_neighbours(dense, swapped, 10) == 100  # all others
