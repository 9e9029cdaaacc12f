"""Random input: whatever is given, a result or a `LowRankError` of one line comes back, and nothing else."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_lowrank import METHODS, CompressionConfig, LowRankError
from hf_lowrank.allocation import ALLOCATIONS, BUDGETS
from hf_lowrank.compression.compress import compress
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.configuration_lowrank import validate_forms, validate_ranks
from hf_lowrank.studies.analysis import AnalysisConfig
from hf_lowrank.studies.experiment.recipe import KEYS, load_recipe, parse_recipe
from hf_lowrank.studies.sweep_settings import SweepConfig
from hf_lowrank.tasks import TASKS, encode, get_task, load_split
from hf_lowrank.training.settings import FinetuneConfig
from tests.helpers import bert_config, tiny_bert
from tests.tiny_task import tiny_tokenizer

disable_progress_bars()
few = settings(max_examples=150, derandomize=True, deadline=None, database=None)
fewer = settings(few, max_examples=30, suppress_health_check=[HealthCheck.too_slow])

numbers = st.one_of(
    st.integers(-3, 40), st.floats(), st.sampled_from([0, 1, 0.33, -0.0, 1e308, 2**40, 10**400, True, 0.5, 1e-9])
)
words = st.one_of(
    st.sampled_from(
        [*METHODS, *ALLOCATIONS, *BUDGETS, "66.5M", "7B", "nan", "inf", "-1K", "linear", "", "*", "[", "query"]
    ),
    st.text(max_size=6),
)
plain = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.one_of(plain, st.lists(plain, max_size=3), st.lists(words, max_size=3).map(tuple), st.just({}))


def survives(call: Callable[..., Any], *args: Any, errors: type[Exception] = LowRankError, **kwargs: Any) -> Any:
    """What a call returns; a `LowRankError` of one line is as good."""
    try:
        return call(*args, **kwargs)
    except errors as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said
    return None


def fields_of(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Some settings of a dataclass, with any values."""
    return st.dictionaries(st.sampled_from(sorted(kind.__dataclass_fields__)), values, max_size=4)


@pytest.mark.parametrize("kind", [CompressionConfig, SweepConfig, FinetuneConfig, AnalysisConfig])
def test_settings(kind: type) -> None:
    @few
    @given(fields_of(kind))
    @example({name: 10**400 for name, field in kind.__dataclass_fields__.items() if "float" in str(field.type)})
    def check(chosen: dict[str, Any]) -> None:
        survives(kind, **chosen)

    check()


@few
@given(
    ranks=st.one_of(values, st.dictionaries(words, plain, max_size=3)), forms=st.dictionaries(words, values, max_size=2)
)
def test_ranks_and_forms_of_a_config(ranks: Any, forms: Any) -> None:
    """These files travel with checkpoints: their errors are ValueErrors."""
    survives(validate_ranks, ranks, errors=ValueError)
    survives(validate_forms, forms, {"a": 1}, errors=ValueError)


patterns = st.lists(
    st.sampled_from(["query", "*", "[", "*.dense", "", "bert.*", "classifier", "w\u00f6rd", "word_*"]), max_size=2
)


@fewer
@given(
    method=st.sampled_from(["svd"]),
    budget=st.tuples(
        st.sampled_from([kind for kind in BUDGETS if kind != "latency"]), st.floats(1e-3, 1) | st.integers(1, 10**5)
    ),
    allocation=st.sampled_from(["uniform", "greedy", "type"]),
    include=patterns,
    exclude=patterns,
    align=st.integers(1, 40),
    floor=st.floats(0, 1),
)
def test_budgets_and_patterns(budget: Any, include: Any, exclude: Any, **chosen: Any) -> None:
    some = {"include": tuple(include) or None, "exclude": tuple(exclude) or None}
    config = survives(CompressionConfig, **{budget[0]: budget[1]}, **some, **chosen)
    if config is not None:
        survives(find_targets, model := tiny_bert(), **some)
        survives(compress, model, config, progress=False)


names = st.sampled_from([*TASKS, "custom", "STS-B", "", "x"]) | st.text(max_size=5)


@few
@given(name=names, length=st.none() | st.integers(-5, 40), text=st.lists(words, max_size=3), label=st.none() | words)
def test_tasks(name: str, length: int | None, text: list[str], label: str | None) -> None:
    survives(get_task, name, length, text_columns=text, label_column=label)


texts = st.sampled_from(["w1 w2", "", " ", "w3 " * 60, "\x00", "\u00e9", "[PAD]"])
word_lists = st.lists(texts, max_size=4)
label_values = st.one_of(
    st.lists(st.integers(-1, 4), min_size=3, max_size=3),
    st.lists(st.none() | st.floats(), min_size=3, max_size=3),
    st.lists(texts | st.none(), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(-1, 9), max_size=4), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
text_values = st.one_of(
    st.lists(texts, min_size=3, max_size=3),
    st.lists(st.none() | texts, min_size=3, max_size=3),
    st.lists(st.integers(), min_size=3, max_size=3).map(lambda numbers: [number % 100 for number in numbers]),
    st.lists(word_lists, min_size=3, max_size=3),
)


@fewer
@given(
    name=st.sampled_from(["cola", "stsb", "conll2003", "text", "tinystories"]),
    length=st.none() | st.integers(1, 40),
    first=text_values,
    second=text_values,
    labels=label_values,
    model_labels=st.integers(1, 10),
)
def test_texts_and_labels(
    name: str, length: int | None, first: Any, second: Any, labels: Any, model_labels: int
) -> None:
    task = get_task(name, length)
    columns = dict(zip(task.text, (first, second), strict=False)) | ({task.label: labels} if task.label else {})
    rows = Dataset.from_dict(columns)
    survives(encode, rows, task, tiny_tokenizer(), bert_config(num_labels=model_labels))


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of rows, whole or with some of its bytes cut, changed or in front."""
    suffix = draw(st.sampled_from(["csv", "json", "jsonl", "parquet", "txt"]))
    rows = Dataset.from_dict({"sentence": draw(text_values), "label": draw(label_values)})
    stream = io.BytesIO()
    if suffix == "parquet":
        rows.to_parquet(stream)
    elif suffix == "csv":
        rows.to_csv(stream)
    else:
        stream.write("\n".join(json.dumps(row) for row in rows).encode())
    content = stream.getvalue()
    cut = draw(st.integers(0, len(content)))
    return suffix, draw(st.sampled_from([content, content[:cut], draw(st.binary(max_size=8)) + content[cut:], b""]))


@fewer
@given(file=files(), name=st.sampled_from(["cola", "text", "custom"]))
def test_files(file: tuple[str, bytes], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"train.{file[0]}").write_bytes(file[1])
        chosen = {"text_columns": ["sentence"], "label_column": "label" if name != "text" else None}
        task = survives(get_task, name, data_dir=Path(folder), **chosen)
        if task is not None:
            survives(load_split, task, "train", Path(folder))


recipes = st.dictionaries(st.sampled_from(["title", "experiments", "other", *KEYS]), values, max_size=5)
good = {"path": 3, "models": ["a"], "tasks": ["cola"], "methods": ["svd"], "budgets": [{"rank_ratio": 0.5}]}


@few
@given(content=st.one_of(values, recipes, recipes.map(lambda some: good | some)))
@example(good | {"path": {}})
def test_recipes(content: Any) -> None:
    survives(parse_recipe, content, "random")


@fewer
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_recipe_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_bytes(content)
        survives(load_recipe, Path(folder) / "recipe.yaml")
