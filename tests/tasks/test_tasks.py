"""Tasks read local files, align labels, and score as the standard scripts do; bad data are named."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_lowrank.cli.options import DataOptions
from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import say_once
from hf_lowrank.tasks import TASKS, encode, get_task, label_ids_of, label_mapping, load_split
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.tasks.data import reason, training_rows
from hf_lowrank.tasks.encoding import encode_chosen
from hf_lowrank.training.evaluate import evaluate
from tests.helpers import bert_config

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ran",
    "far",
    "away",
    "new",
    "york",
    "##s",
    "##er",
    "john",
    "lives",
    "in",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def sequence_classifier(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(bert_config(**changes))


def write(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    for split, columns in splits.items():
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return folder


COLA = {"sentence": ["the cat sat", "a mat", "the cat ran far away", "sat the on"], "label": [1, 0, 1, 0]}


def test_scores_are_those_of_the_predictions(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = sequence_classifier(num_labels=2)
    result = evaluate(
        model, tokenizer, get_task("cola"), write(tmp_path, validation=COLA), batch_size=3, progress=False
    )
    right = 0
    for text, label in zip(COLA["sentence"], COLA["label"], strict=True):
        with torch.no_grad():
            right += int(model.eval()(**tokenizer(text, return_tensors="pt")).logits.argmax() == label)
    assert result["accuracy"] == pytest.approx(100 * right / 4)
    assert result["score"] == result["matthews"]
    assert result["degenerate"] in (0.0, 1.0)


def test_a_constant_prediction_is_flagged(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = write(tmp_path, validation={"sentence1": ["a", "cat"], "sentence2": ["the", "mat"], "label": [1.0, 2.0]})
    model = sequence_classifier(num_labels=1)
    torch.nn.init.zeros_(model.classifier.weight)
    result = evaluate(model, tokenizer, get_task("stsb"), data, progress=False)
    assert result["degenerate"] == 1.0
    assert result["score"] == 0.0


def test_labels_are_mapped_by_name_where_the_model_names_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = {0: "contradiction", 1: "entailment", 2: "neutral"}
    config = bert_config(id2label=names, label2id={name: n for n, name in names.items()})
    rows = Dataset.from_dict({"premise": ["a", "cat", "mat"], "hypothesis": ["a", "a", "a"], "label": [0, 1, 2]})
    assert encode(rows, get_task("mnli"), tokenizer, config)["labels"] == [1, 2, 0]
    assert encode(rows, get_task("mnli"), tokenizer, bert_config(num_labels=3))["labels"] == [0, 1, 2]
    with pytest.raises(LowRankError, match=r"the model has 2 labels .*mnli has 3 \(entailment, neutral"):
        encode(rows, get_task("mnli"), tokenizer, bert_config(num_labels=2))


def test_f1_counts_the_positive_class_of_the_data_whatever_the_model_calls_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    columns = {"sentence1": ["a", "cat", "mat"], "sentence2": ["a", "a", "a"], "label": [1, 1, 0]}
    data = write(tmp_path, validation=columns)
    names = {0: "equivalent", 1: "not_equivalent"}
    model = sequence_classifier(id2label=names, label2id={name: n for n, name in names.items()})
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, 0.0])  # always "equivalent"
    result = evaluate(model, tokenizer, get_task("mrpc"), data, progress=False)
    assert result["f1"] == pytest.approx(80.0)  # precision 2/3, recall 1
    assert result["accuracy"] == pytest.approx(200 / 3)


def test_a_word_is_labelled_at_its_first_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"tokens": [["john", "cats", "in", "new", "york"]], "ner_tags": [[1, 0, 0, 5, 6]]})
    encoded = encode(rows, get_task("conll2003"), tokenizer, bert_config(num_labels=9))
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0]) == [
        "[CLS]", "john", "cat", "##s", "in", "new", "york", "[SEP]",
    ]  # fmt: skip
    assert encoded["labels"][0] == [-100, 1, 0, -100, 0, 5, 6, -100]


def test_entities_are_scored_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = write(tmp_path, validation={"tokens": [["john", "in", "new", "york"]], "ner_tags": [[1, 0, 5, 6]]})
    torch.manual_seed(0)
    model = BertForTokenClassification(bert_config(num_labels=9))
    answers = {4 + WORDS.index(word): tag for word, tag in (("john", 1), ("in", 0), ("new", 5), ("york", 0))}

    def answer(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        output.logits = torch.eye(9)[
            torch.tensor([[answers.get(int(t), 0) for t in row] for row in kwargs["input_ids"]])
        ]
        return output

    model.register_forward_hook(answer, with_kwargs=True)
    assert evaluate(model, tokenizer, get_task("conll2003"), data, progress=False)["score"] == pytest.approx(50.0)


def test_perplexity_is_the_exponential_of_the_mean_loss_per_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = write(tmp_path, validation={"text": ["the cat sat", " ", "a mat and the cat"]})
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    losses, tokens = 0.0, 0
    for text in ("the cat sat", "a mat and the cat"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    result = evaluate(model, tokenizer, get_task("tinystories"), data, progress=False)
    assert result["tokens"] == tokens
    assert result["score"] == pytest.approx(np.exp(losses / tokens), rel=1e-4)


def language_model(positions: int = 8) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=positions)).eval()


def test_perplexity_of_wikitext2_is_the_fields(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """All rows of the test split joined by a blank line, full windows only, each predicting all its tokens but one."""
    texts = ["", " = the cat = \n", "", " sat on a mat and ran far away \n", " the mat ran "] * 3
    data, model = write(tmp_path, test={"text": texts}), language_model()
    ids = tokenizer("\n\n".join(texts), return_tensors="pt")["input_ids"]
    count = ids.numel() // 8
    assert count > 2
    assert ids.numel() % 8
    losses = []
    with torch.no_grad():
        for number in range(count):
            window = ids[:, 8 * number : 8 * number + 8]
            logits = model(window).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()) * 8)
        expected = float(torch.exp(torch.stack(losses).sum() / (count * 8)))
    result = evaluate(model, tokenizer, get_task("wikitext2"), data, progress=False)
    assert result["tokens"] == count * 7
    assert result["score"] == pytest.approx(expected, rel=1e-5)
    assert get_task("wikitext2").max_length == 2048


def test_a_sample_of_running_text_is_a_window(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(WORDS[(n + k) % len(WORDS)] for k in range(5)) for n in range(3000)]
    data = write(tmp_path, train={"text": texts})

    def ids(seed: int, samples: int = 6) -> list[list[int]]:
        loader = calibration_loader(language_model(), tokenizer, get_task("text"), data, samples, seed=seed)
        return [row for batch in loader for row in batch["input_ids"].tolist()]

    assert [len(row) for row in ids(0)] == [8] * 6
    assert ids(0) == ids(0) != ids(1)
    everything = tokenizer("".join(f"{text}\n" for text in texts))["input_ids"]
    assert all(str(row)[1:-1] in str(everything) for row in ids(0))  # of lines that follow each other
    assert len(ids(0, samples=10_000)) >= len(everything) // 8 - 3


def test_text_shorter_than_a_window_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = write(tmp_path, train={"text": ["the cat", "sat"]}, validation={"text": ["the cat"]})
    short = "the text of text is {} tokens long, less than a window of 8; give more text, or a smaller max_length"
    with pytest.raises(LowRankError, match=short.format(5)):
        calibration_loader(language_model(), tokenizer, get_task("text"), data)
    with pytest.raises(LowRankError, match=short.format(4)):
        evaluate(language_model(), tokenizer, get_task("text"), data, progress=False)


def test_calibration_rows_are_chosen_by_seed_longest_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = write(tmp_path, train={"sentence": [" ".join(WORDS[: n + 1]) for n in range(12)], "label": [0, 1] * 6})

    def lengths(seed: int, samples: int = 5) -> list[int]:
        loader = calibration_loader(
            sequence_classifier(num_labels=2), tokenizer, get_task("cola"), data, samples, batch_size=2, seed=seed
        )
        return [int(length) for batch in loader for length in batch["attention_mask"].sum(dim=1)]

    assert lengths(0) == lengths(0) == sorted(lengths(0), reverse=True)
    assert lengths(0) != lengths(1)
    assert len(lengths(0)) == 5
    assert len(lengths(0, samples=100)) == 12


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": ["a"]}, "cola needs the column 'label'.*its columns are sentence: name .* in label_column"),
        ({"text": ["a"], "label": [1]}, "cola needs the column 'sentence'.*are text, label: name .* in text_columns"),
        ({"sentence": ["a", "b"], "label": [-1, 1]}, r"1 labels of cola are not usable, such as -1.*0 to 1"),
        ({"sentence": ["a"], "label": ["good"]}, "such as 'good' in column 'label'"),
        ({"sentence": ["a", "b"], "label": [None, 1]}, "such as None"),
    ],
)
def test_bad_data_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, columns: dict[str, list[Any]], message: str
) -> None:
    data = write(tmp_path, validation=columns)
    with pytest.raises(LowRankError, match=message):
        evaluate(sequence_classifier(num_labels=2), tokenizer, get_task("cola"), data, progress=False)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"has no train\.parquet \(or \.csv"):
        load_split(get_task("cola"), "train", tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(LowRankError, match=f"the data of cola cannot be read from {tmp_path}"):
        load_split(get_task("cola"), "train", tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_file_formats_are_read(tmp_path: Path, suffix: str) -> None:
    rows = Dataset.from_dict(COLA)
    rows.to_csv(tmp_path / "train.csv") if suffix == "csv" else rows.to_json(tmp_path / "train.jsonl")
    assert load_split(get_task("cola"), "train", tmp_path)["sentence"][:] == COLA["sentence"]


def test_every_task_is_complete() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert (task.metrics is None) == task.lower_is_better
        assert (task.label is None) == (task.kind in ("causal_lm", "masked_lm"))
    with pytest.raises(
        LowRankError,
        match="unknown task 'glue'; the tasks are cola, sst2, .*, chat, .*, custom; anything else, such as sound, ",
    ):
        get_task("glue")


@pytest.mark.parametrize(
    ("written", "name"),
    [("STS-B", "stsb"), ("sts_b", "stsb"), ("SST-2", "sst2"), ("CoNLL-2003", "conll2003"), ("WikiText 2", "wikitext2")],
)
def test_a_task_is_known_in_any_case_and_spelling(written: str, name: str) -> None:
    assert get_task(written) == TASKS[name]


def test_the_nearest_task_is_named() -> None:
    with pytest.raises(LowRankError, match="unknown task 'STS'; .* did you mean 'stsb'?"):
        get_task("STS")


# --- bad data ---

STSB = {"sentence1": ["a", "b"], "sentence2": ["a", "b"], "label": [1.0, 2.0]}
WORDS_TAGS = {"tokens": [["a", "cat"], ["mat"]], "ner_tags": [[0, 1], [0]]}


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("cola", COLA | {"sentence": ["a", None, "b", None]}, "2 of 4 rows of the column 'sentence'.* None in row 1"),
        ("cola", COLA | {"sentence": [3, 4, 5, 6]}, "such as 3 in row 0; cola needs a text there"),
        ("cola", COLA | {"label": [0.0, 1.0, 1.0, 0.0]}, "such as 0.0 in column 'label'; they must be 0 to 1, whole"),
        ("cola", COLA | {"label": [0, 1, 2, 0]}, "1 labels of cola are not usable, such as 2"),
        ("stsb", STSB | {"label": [1.0, float("inf")]}, "such as inf in column 'label'; they must be numbers"),
        ("stsb", STSB | {"label": ["1", "2"]}, "such as '1' in column 'label'; they must be numbers"),
        ("conll2003", WORDS_TAGS | {"tokens": ["a cat", "mat"]}, "such as 'a cat' in row 0; .* a list of words"),
        ("conll2003", WORDS_TAGS | {"tokens": [["a", None], ["b"]]}, r"such as \['a', None\] in row 0"),
        ("conll2003", WORDS_TAGS | {"ner_tags": [0, 1]}, "such as 0 in row 0; conll2003 needs a list of labels"),
        (
            "conll2003",
            WORDS_TAGS | {"ner_tags": [[0], [1]]},
            "row 0 has 2 words in 'tokens' and 1 labels in 'ner_tags'",
        ),
        ("conll2003", WORDS_TAGS | {"ner_tags": [["O", "O"], ["O"]]}, "such as 'O' in column 'ner_tags'"),
        ("text", {"text": ["the cat", None]}, "such as None in row 1; text needs a text there"),
        ("text", {"text": ["", " "]}, "the texts of text are empty: there is nothing to predict"),
        ("cola", {"sentence": [], "label": []}, "validation.parquet: it has no rows"),
    ],
)
def test_rows_that_cannot_be_read_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, task: str, columns: dict[str, list[Any]], message: str
) -> None:
    the_task, data = get_task(task), write(tmp_path, validation=columns)
    config = bert_config(num_labels=max(1, len(the_task.label_names)))
    with pytest.raises(LowRankError, match=message):
        encode(load_split(the_task, "validation", data), the_task, tokenizer, config)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.csv", b"", "train.csv: No columns to parse from file"),
        ("train.csv", b"sentence,label\n", "train.csv: it has no rows"),
        (
            "train.csv",
            "sentence,label\ncaf\xe9,1\n".encode("latin-1"),
            "train.csv: it is not UTF-8; save it as UTF-8",
        ),
        ("train.csv", b"sentence,label\na,b,c,d\ne,f\n1,2,3,4,5,6\n", "train.csv: "),
        ("train.json", b'{"sentence": "a", ', "train.json: "),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence"\n', "train.jsonl: "),
        ("train.jsonl", b"", "train.jsonl"),
        ("train.parquet", b"PAR1nonsense", "train.parquet: "),
        ("train.parquet", b"", "train.parquet: "),
    ],
)
def test_broken_files_are_named_with_the_cause(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(LowRankError, match=message) as error_info:
        load_split(get_task("cola"), "train", tmp_path)
    assert "\n" not in str(error_info.value)
    assert "An error occurred while generating the dataset" not in str(error_info.value)


def test_a_folder_that_holds_no_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(LowRankError, match=r"nowhere does not exist; the data are a folder with train and validation"):
        get_task("cola", data_dir=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(LowRankError, match=r"file is a file; the data are a folder"):
        load_split(get_task("cola"), "train", tmp_path / "file")
    with pytest.raises(LowRankError, match=r"has no train.parquet \(.*\): it holds file$"):
        load_split(get_task("cola"), "train", tmp_path)


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("cola", 0, "cut at 1 token at least, not at max_length 0"),
        ("cola", -5, "cut at 1 token at least, not at max_length -5"),
        ("cola", 2, "max_length 2 is too short for cola: 3 tokens are the least"),
        ("stsb", 3, "max_length 3 is too short for stsb: 4 tokens are the least"),
        ("text", 1, "max_length 1 is too short for text: 2 tokens are the least"),
        ("cola", 33, "the model reads 32 tokens at most; max_length 33 is too long"),
    ],
)
def test_a_length_that_cannot_be_is_named(
    tokenizer: PreTrainedTokenizerFast, task: str, length: int, message: str
) -> None:
    rows = Dataset.from_dict({"text": ["a"], "sentence": ["a"], "sentence1": ["a"], "sentence2": ["a"], "label": [1]})
    with pytest.raises(LowRankError, match=message):
        encode(rows, get_task(task, length), tokenizer, bert_config(num_labels=1 if task == "stsb" else 2))


def test_the_tokenizers_own_limit_counts_too(tokenizer: PreTrainedTokenizerFast) -> None:
    limited = copy.deepcopy(tokenizer)
    limited.model_max_length = 16  # as of RoBERTa, two of whose positions are never used
    rows = Dataset.from_dict({"sentence": ["the cat " * 20], "label": [1]})
    assert len(encode(rows, get_task("cola"), limited, bert_config())["input_ids"][0]) == 16
    with pytest.raises(LowRankError, match="the model reads 16 tokens at most; max_length 20"):
        encode(rows, get_task("cola", 20), limited, bert_config())


def test_an_encoder_decoder_needs_end_tokens_to_read_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"sentence": ["a", "the cat"], "label": [0, 1]})
    config = T5Config(vocab_size=64, num_labels=2, eos_token_id=1)
    with pytest.raises(LowRankError, match=r"reads cola at the end token \(id 1\), which its tokenizer puts 0 times"):
        encode(rows, get_task("cola"), tokenizer, config)
    config.eos_token_id = 3  # [SEP]
    assert len(encode(rows, get_task("cola"), tokenizer, config)) == 2


@pytest.mark.parametrize("options", [{"seed": -1}, {"samples": 0}, {"batch_size": 0}])
def test_calibration_of_nothing_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, options: dict[str, int]
) -> None:
    with pytest.raises(LowRankError, match="a seed is|must be at least 1"):
        calibration_loader(sequence_classifier(), tokenizer, get_task("cola"), write(tmp_path, train=COLA), **options)


# --- names of labels ---


def named(*names: str) -> PreTrainedConfig:
    return bert_config(id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)})


def test_labels_matched_by_position_are_told_once(tokenizer: PreTrainedTokenizerFast, capfd: Any) -> None:
    say_once.cache_clear()
    rows = Dataset.from_dict({"sentence": ["a"], "label": [1]})
    for _ in range(2):
        encode(rows, get_task("cola"), tokenizer, named("bad", "good"))
    assert capfd.readouterr().err.count("unacceptable = bad, acceptable = good") == 1
    encode(rows, get_task("cola"), tokenizer, bert_config())
    assert (
        "matched by position, as the model has other names for them: unacceptable = LABEL_0" in capfd.readouterr().err
    )
    encode(rows, get_task("cola"), tokenizer, named("ACCEPTABLE", "unacceptable"))
    assert "position" not in capfd.readouterr().err


def test_a_record_says_which_label_is_which() -> None:
    cola = get_task("cola")
    assert label_mapping(cola, named("bad", "good")) == {
        "matched_by": "position", "labels": {"unacceptable": "bad", "acceptable": "good"},
    }  # fmt: skip
    assert label_mapping(cola, named("acceptable", "unacceptable")) == {
        "matched_by": "name", "labels": {"unacceptable": "unacceptable", "acceptable": "acceptable"},
    }  # fmt: skip
    assert label_mapping(get_task("stsb"), named("x")) is None


def test_names_that_contradict_the_position_are_refused() -> None:
    with pytest.raises(LowRankError, match="calls label 0 'entailment', which is label 1 of the model"):
        label_ids_of(get_task("mnli"), named("contradicted", "entailment", "neutral"))
    assert label_ids_of(get_task("mnli"), named("entailment", "none", "contradiction")) == [0, 1, 2]
    assert label_ids_of(get_task("mnli"), named("0", "1", "2")) == [0, 1, 2]
    with pytest.raises(LowRankError, match=r"the model has 3 labels \(a, b, c\), cola has 2"):
        label_ids_of(get_task("cola"), named("a", "b", "c"))


def test_names_that_differ_in_case_alone_are_told_apart() -> None:
    task = replace(get_task("cola"), label_names=("Polish", "polish"))
    assert label_ids_of(task, named("polish", "Polish")) == [1, 0]
    assert label_ids_of(task, named("x", "y")) == [0, 1]


# --- a person's own data ---


def own(folder: Path, file: str = "csv", **splits: dict[str, list[Any]]) -> Path:
    for split, columns in splits.items():
        rows = Dataset.from_dict(columns)
        rows.to_csv(folder / f"{split}.csv") if file == "csv" else rows.to_json(folder / f"{split}.jsonl")
    return folder


@pytest.mark.parametrize("file", ["csv", "jsonl"])
def test_labels_of_own_data_are_those_of_the_training_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, file: str
) -> None:
    train = {"review": ["the cat", "a mat", "new york"], "mood": ["sad", "glad", "odd"]}
    data = own(tmp_path, file, train=train, validation={"review": ["cat", "mat"], "mood": ["odd", "glad"]})
    task = get_task("custom", data_dir=data, text_columns=["review"], label_column="mood")
    assert (task.kind, task.label_names) == ("classification", ("glad", "odd", "sad"))
    assert encode(load_split(task, "train", data), task, tokenizer, bert_config(num_labels=3))["labels"] == [2, 0, 1]
    model = sequence_classifier(id2label=dict(enumerate(task.label_names[::-1])))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0])  # always "odd"
    result = evaluate(model, tokenizer, task, data, progress=False)
    assert result["score"] == result["accuracy"] == pytest.approx(50)
    assert result["macro_f1"] == pytest.approx(50 * 2 / 3)
    assert result["degenerate"] == 1.0


def test_numbers_are_classes_and_fractions_are_predicted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {
        "a": ["the cat", "a mat", "far"],
        "b": ["sat", "ran", "away"],
        "stars": [5, 1, 3],
        "worth": [0.5, 1.0, 2],
    }
    data = own(tmp_path, validation=columns)
    classes = get_task("custom", data_dir=data, text_columns=["a", "b"], label_column="stars")
    assert (classes.kind, classes.label_names, classes.label_values) == ("classification", ("1", "3", "5"), (1, 3, 5))
    numbers = get_task("custom", data_dir=data, text_columns=["a", "b"], label_column="worth", max_length=16)
    assert (numbers.kind, numbers.max_length) == ("regression", 16)
    rows = encode(load_split(numbers, "validation", data), numbers, tokenizer, bert_config(num_labels=1))
    assert sorted(rows["labels"]) == [0.5, 1.0, 2.0]
    assert tokenizer.convert_ids_to_tokens(rows["input_ids"][-1]).count("[SEP]") == 2
    result = evaluate(sequence_classifier(num_labels=1), tokenizer, numbers, data, progress=False)
    assert result["score"] == result["pearson_spearman"]


def test_a_label_that_training_never_had_is_named(tmp_path: Path) -> None:
    data = own(
        tmp_path, train={"x": ["a", "b"], "y": ["no", "yes"]}, validation={"x": ["a", "b"], "y": ["yes", "perhaps"]}
    )
    task = get_task("custom", data_dir=data, text_columns=["x"], label_column="y")
    with pytest.raises(LowRankError, match=r"1 labels of custom are not .* \(no, yes\), such as 'perhaps'"):
        load_split(task, "validation", data)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": ["a"], "y": [1]}, {}, "needs a folder of files .* one or two text_columns and a label_column"),
        ({"x": ["a"], "y": [1]}, {"text_columns": ["x"]}, "needs a folder of files"),
        ({"x": ["a"], "y": [1]}, {"text_columns": ["z"], "label_column": "y"}, "custom needs the column 'z'.* x, y"),
        ({"x": ["a"], "y": [1]}, {"text_columns": ["x"], "label_column": "y"}, "holds 1 different labels"),
        ({"x": ["a", "b"], "y": [[1], [2]]}, {"text_columns": ["x"], "label_column": "y"}, "a label is a name or a n"),
    ],
)
def test_own_data_that_are_no_task_are_named(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    data = own(tmp_path, "jsonl", train=columns)
    with pytest.raises(LowRankError, match=message):
        get_task("custom", data_dir=data, **options)


def test_other_columns_of_a_known_task(tmp_path: Path) -> None:
    own(tmp_path, validation={"left": ["a"], "right": ["cat"], "similarity": [2.5]})
    task = get_task("stsb", text_columns=["left", "right"], label_column="similarity")
    assert load_split(task, "validation", tmp_path)["similarity"][:] == [2.5]
    with pytest.raises(LowRankError, match=r"stsb reads 2 text columns \(sentence1, sentence2\), not 1"):
        get_task("stsb", text_columns=["left"])
    with pytest.raises(LowRankError, match="text has no labels"):
        get_task("text", label_column="y")


def test_any_text_has_a_perplexity(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "validation.txt").write_text("the cat sat\non a mat\n\nand ran far away\n")
    own(tmp_path / "rows", validation={"body": ["the cat sat", "on a mat", "and ran far away"]})
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    plain = evaluate(model, tokenizer, get_task("text", 6), tmp_path, progress=False)
    task = get_task("text", 6, text_columns=["body"])
    assert plain["tokens"] == 10  # 10 words and two special tokens in two windows, whose first ones are not predicted
    assert evaluate(model, tokenizer, task, tmp_path / "rows", progress=False) == plain
    with pytest.raises(LowRankError, match="text has no data set of its own; pass a folder as data_dir"):
        load_split(get_task("text"), "validation", None)


def test_a_stream_of_text_is_read_as_far_as_its_windows_take(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s a stream
    texts = [" ".join(WORDS[(n + k) % len(WORDS)] for k in range(5)) for n in range(5000)]
    write(tmp_path, train={"text": texts, "other": [None] * 5000})

    def ids(seed: int, count: int = 6, column: str = "text") -> list[list[int]]:
        rows = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train", streaming=True)
        task = get_task("text", text_columns=[column])
        config = GPT2Config(vocab_size=64, n_positions=8)
        return encode_chosen(rows, task, tokenizer, config, count, seed)["input_ids"][:]

    assert [len(row) for row in ids(0)] == [8] * 6
    assert ids(0) == ids(0) != ids(1)
    assert len(ids(0, 1000)) == 1000
    assert len(ids(0, 100_000)) > 3000  # all that there are
    with pytest.raises(LowRankError, match="1000 of 1000 rows of the column 'other' are not usable, such as None"):
        ids(0, column="other")


def test_running_text_of_a_data_set_is_streamed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "web").mkdir()
    own(tmp_path / "web", "jsonl", train={"body": ["the cat sat on a mat and ran far away"] * 50, "url": ["x"] * 50})
    task = get_task("text", dataset=str(tmp_path / "web"), text_columns=["body"])
    assert not isinstance(training_rows(task, None), Dataset)
    loader = calibration_loader(language_model(), tokenizer, task, samples=6)
    assert [row for batch in loader for row in batch["input_ids"].shape[:1]] == [6]
    assert next(iter(loader))["input_ids"].shape == (6, 8)
    with pytest.raises(LowRankError, match="has no column 'text'; name the one with the text in text_columns, of body"):
        training_rows(get_task("text", dataset=str(tmp_path / "web")), None)
    with pytest.raises(LowRankError, match="has the splits train; it takes dev$"):
        get_task("text", dataset=str(tmp_path / "web"), split="dev")
    with pytest.raises(LowRankError, match="split is one of a dataset on the Hub, and none is given"):
        get_task("text", split="dev")
    with pytest.raises(LowRankError, match="--config is one of a --dataset, and none is given"):
        DataOptions(config="en").of_task("text")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated.", "it is gated: ask for access"),
        (
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.",
            "there is no such data set on the Hub, or it",
        ),
        ("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)", "the Hub cannot be reached.* give a folder of"),
        (
            "Config name is missing.\nPlease pick one among the available configs: ['en']\nExample",
            r"configs: \['en'\]$",
        ),
    ],
)
def test_a_data_set_that_cannot_be_read_has_its_remedy(said: str, meant: str) -> None:
    assert re.search(meant, reason(ConnectionError(said)))
