"""A small model of every kind of task, trained on made-up data: its score when a third of its ranks are kept.

Figures are written as they come, one line for each task, so that a run that ended early goes on there.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from benchmarks.harness import Lines, Options, Result, Row
from hf_lowrank import Pipeline
from hf_lowrank.jobs.progress import bar

RATE = 2e-3
METHODS = ("svd", "fwsvd", "kfac")
RANK_RATIO, SEED = 0.33, 0
SPREAD = 0.1  # of untrained weights; the 0.02 of wide models is too little at this width
WORDS, TOPICS, TOPIC_WORDS = 200, 10, 20
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAINING, VALIDATION = 3000, 300

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How rows of a task are drawn, the model that learns them, and for how long."""

    draw: Callable[[np.random.Generator], Record]
    model: Callable[[], PreTrainedModel]
    epochs: int


def run(options: Options) -> Result:
    """The score of every task by every method, without fine-tuning."""
    options.output.mkdir(parents=True, exist_ok=True)
    lines = Lines(options.output / "tasks.jsonl")
    with tempfile.TemporaryDirectory() as scratch, bar("tasks", len(CASES) + 1, "models") as shown:
        for name in (*CASES, "image-classification"):
            if not lines.has(task=name):
                lines.add(task=name, **scores(name, Path(scratch) / name))
            shown.update()
    rows = [_row(found) for found in lines.rows()]
    return Result(
        f"scores at a rank ratio of {RANK_RATIO:.0%}, uniform svd and fwsvd, greedy and sequential kfac",
        rows,
        [
            "Small models (2 layers of width 64) trained for this on made-up data, images on scikit-learn's digits; "
            "one run, seed 0, no training after the compression. Of fill-mask less is better, of all others more."
        ],
        {"tasks": lines.rows()},
    )


def _row(found: Record) -> Row:
    """The figures of a task."""
    scored = {method: f"{found[method]:.1f}" for method in ("dense", *METHODS)}
    return {
        "task": found["task"],
        "score": found["metric"],
        **scored,
        "parameters of the blocks": f"{found['share']:.0%}",
    }


def scores(name: str, folder: Path) -> Record:
    """Train a model of a task in a folder, then compress it by every method."""
    folder.mkdir(parents=True)
    write_digits(folder / "data") if name == "image-classification" else write_rows(folder / "data", CASES[name])
    set_seed(SEED)
    model, reader, epochs = vision() if name == "image-classification" else language(CASES[name])
    for part in (model, reader):
        part.save_pretrained(folder / "random")
    trained = _trained(folder, name, epochs)
    found: Record = {"metric": trained.reading[1].score, "dense": trained.score()["score"]}
    for method in METHODS:
        candidate = trained.candidate()
        report = candidate.compress(method=method, rank_ratio=RANK_RATIO)
        found[method] = candidate.score()["score"]
        found["share"] = report.targeted_after / report.targeted_before
    return found


def _trained(folder: Path, name: str, epochs: int) -> Pipeline:
    pipeline = Pipeline.load(str(folder / "random"), name, folder / "data", progress=False)
    pipeline.finetune(epochs=epochs, learning_rate=RATE, seed=SEED, score=False)
    return pipeline


def write_rows(folder: Path, case: Case) -> None:
    """Write the training and the validation rows of a task."""
    folder.mkdir()
    for number, (split, count) in enumerate((("train", TRAINING), ("validation", VALIDATION))):
        generator = np.random.default_rng([SEED, number])
        rows = [case.draw(generator) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as a folder of images for every class, half of them to train on."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        place = folder / ("train" if number % 2 else "validation") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).save(place / f"{number}.png")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every word."""
    vocabulary = {word: n for n, word in enumerate((*SPECIAL, *(f"w{n}" for n in range(WORDS))))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=words, **dict(zip(names, SPECIAL, strict=True)))


def language(case: Case) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, int]:
    """The untrained model of a task of texts, its tokenizer, and the epochs of its training."""
    return case.model(), tokenizer(), case.epochs


def vision() -> tuple[PreTrainedModel, ViTImageProcessor, int]:
    """A ViT for images of 8 × 8 pixels in patches of 2 × 2."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_labels=10, initializer_range=SPREAD)
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 8, "width": 8}), 15


def _bert() -> BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"vocab_size": WORDS + len(SPECIAL), "max_position_embeddings": 64}
    return BertConfig(**sizes, initializer_range=SPREAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _classifier() -> PreTrainedModel:
    config = _bert()
    config.num_labels, config.problem_type = TOPICS, "multi_label_classification"
    return BertForSequenceClassification(config)


def _bart() -> PreTrainedModel:
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in SIDE.items()}
    config = BartConfig(
        vocab_size=WORDS + len(SPECIAL),
        d_model=64,
        max_position_embeddings=64,
        init_std=SPREAD,
        dropout=0.0,
        **sides,
        **tokens,
    )
    return BartForConditionalGeneration(config)


SIDE: dict[str, Any] = {"layers": 2, "ffn_dim": 256, "attention_heads": 4}


def _chain(generator: np.random.Generator) -> Record:
    """A text of one topic, whose words come in its order but for one in ten, which is any word."""
    topic = generator.integers(TOPICS)
    words = topic * TOPIC_WORDS + np.arange(12)
    odd = generator.random(12) < 0.1
    words[odd] = generator.integers(WORDS, size=odd.sum())
    return {"text": " ".join(f"w{word}" for word in words)}


def _fact(generator: np.random.Generator) -> Record:
    """A list of things of all kinds but the first; the question names the kind of the one that is the answer."""
    kinds = generator.permutation(np.arange(1, TOPICS))
    words = [f"w{kind * TOPIC_WORDS + generator.integers(TOPIC_WORDS)}" for kind in kinds]
    place = int(generator.integers(len(words)))
    answers = {"text": [words[place]], "answer_start": [len(" ".join([*words[:place], ""]))]}
    return {"question": f"w{kinds[place]}", "context": " ".join(words), "answers": answers}


def _mixture(generator: np.random.Generator) -> Record:
    """A text of one to three topics, which are its labels."""
    topics = generator.permutation(TOPICS)[: generator.integers(1, 4)]
    words = topics[generator.integers(len(topics), size=12)] * TOPIC_WORDS + generator.integers(TOPIC_WORDS, size=12)
    found = sorted({int(word) // TOPIC_WORDS for word in words})
    return {"text": " ".join(f"w{word}" for word in words), "labels": [f"topic {topic}" for topic in found]}


def _translation(generator: np.random.Generator) -> Record:
    """The other language has another word for each of forty."""
    words = generator.integers(40, size=generator.integers(3, 7))
    texts = [" ".join(f"w{word + shift}" for word in words) for shift in (0, 100)]
    return dict(zip(("source", "target"), texts, strict=True))


def _news(generator: np.random.Generator) -> Record:
    """A document of twelve words, of which three are of the first topic; these are its summary, in their order."""
    words = generator.integers(TOPIC_WORDS, WORDS, size=12)
    places = np.sort(generator.permutation(12)[:3])
    words[places] = generator.integers(TOPIC_WORDS, size=3)
    return {
        name: " ".join(f"w{word}" for word in told) for name, told in (("document", words), ("summary", words[places]))
    }


CASES = {
    "fill-mask": Case(_chain, lambda: BertForMaskedLM(_bert()), 5),
    "question-answering": Case(_fact, lambda: BertForQuestionAnswering(_bert()), 8),
    "multi-label": Case(_mixture, _classifier, 5),
    "summarization": Case(_news, _bart, 10),
    "translation": Case(_translation, _bart, 10),
}
