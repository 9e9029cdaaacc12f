"""Texts without labels, in a file or as they are, and the model that is to read them → a task that needs no more."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, load_dataset
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks.data import FILE_FORMATS, reason
from hf_lowrank.tasks.task import Task, Texts

# kind of task → the names of its models' classes
CLASSES: dict[str, Any] = {
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token_classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "causal_lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "question_answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "embedding": modeling_auto.MODEL_MAPPING_NAMES,
}
WRITERS: Any = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
# that texts are cut at; 128 of others
LENGTHS = {"causal_lm": 512, "masked_lm": 512, "question_answering": 384, "seq2seq": 512}


def texts_task(texts: Texts, config: PreTrainedConfig) -> Task:
    """The task of reading texts, for the model with this config: as what it was saved as.

    An encoder-decoder reads the first text of a pair, and predicts the tokens of the second, one behind the other.

    Raises:
        LowRankError: it is a model of another kind, or of pairs where there are none.
    """
    kind, source = _kind(config, len(texts.columns) == 2), (texts.name, None)
    score, length = "perplexity" if kind in ("causal_lm", "masked_lm", "seq2seq") else "", LENGTHS.get(kind, 128)
    if kind == "seq2seq":
        return Task("texts", kind, texts.columns[:1], texts.columns[1], source, score, max_length=length, texts=texts)
    if kind == "question_answering" and len(texts.columns) != 2:
        raise LowRankError("a model that marks answers reads pairs of texts: a question, and what holds its answer")
    return Task("texts", kind, texts.columns, None, source, score, max_length=length, texts=texts)


def given_texts(texts: Sequence[Any]) -> Texts:
    """Texts, or pairs of texts, as they are.

    Raises:
        LowRankError: there are none, or something else among them.
    """
    rows = [tuple(text) if isinstance(text, list | tuple) else (text,) for text in texts]
    widths = {len(row) for row in rows}
    if widths not in ({1}, {2}) or not all(isinstance(text, str) for row in rows for text in row):
        raise LowRankError("texts are a list of texts, or of pairs of texts, at least one")
    return Texts("texts", _columns(widths.pop()), tuple(rows))


def read_texts(path: Path, columns: Sequence[str] = ()) -> Texts:
    """The texts of a file: a text a line of .txt, else a column of it (two for pairs).

    Args:
        columns: by default "text", or the only column of texts that there is.

    Raises:
        LowRankError: no such file, one that cannot be read, or columns that are not there or hold no texts.
    """
    suffix = path.suffix.removeprefix(".")
    if not path.is_file() or suffix not in FILE_FORMATS:
        raise LowRankError(f"{path} is no file of texts; texts are in a .{', .'.join(FILE_FORMATS)} file")
    try:
        rows: Any = load_dataset(FILE_FORMATS[suffix], data_files=[str(path)], split="train")
    except Exception as error:  # datasets raises its own, pyarrow's and pandas' errors
        raise LowRankError(f"the texts in {path} cannot be read: {reason(error)}") from error
    chosen = tuple(columns) or _only_texts(rows, path)
    if missing := [column for column in chosen if column not in rows.column_names]:
        raise LowRankError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(rows.column_names)}")
    if len(chosen) > 2:
        raise LowRankError(f"a text has one column, or two for pairs, not {len(chosen)}")
    found = [row for row in zip(*(rows[column] for column in chosen), strict=True) if any(row)]
    if not found or not all(isinstance(text, str) for row in found for text in row):
        raise LowRankError(f"{path} holds no texts in {', '.join(chosen)}, or something else besides")
    return Texts(path.name, chosen, tuple(found))


def _only_texts(rows: Dataset, path: Path) -> tuple[str]:
    texts = [name for name, kind in rows.features.items() if kind in (Value("string"), Value("large_string"))]
    if "text" not in texts and len(texts) != 1:
        raise LowRankError(
            f"which column of {path} holds the texts? Name it as text_column: {', '.join(rows.features)}"
        )
    return ("text",) if "text" in texts else (texts[0],)


def _columns(width: int) -> tuple[str, ...]:
    return ("text",) if width == 1 else ("text", "text_pair")


def _kind(config: PreTrainedConfig, pairs: bool) -> str:
    saved_as = ((config.architectures or [""])[0]).removeprefix("LowRank")
    writes = saved_as in WRITERS.values()
    if writes and pairs:
        return "seq2seq"
    for kind, names in CLASSES.items():
        if saved_as in {name for entry in names.values() for name in ([entry] if isinstance(entry, str) else entry)}:
            regression = config.problem_type == "regression" or config.num_labels == 1
            return "regression" if kind == "classification" and regression else kind
    if writes:
        raise LowRankError(f"a {saved_as} takes pairs of texts: what it reads, and what it is to write of it")
    raise LowRankError(
        f"a {saved_as or 'model without a class in config.json'} reads more than texts; give a task, or statistics "
        "measured on batches of your own"
    )
