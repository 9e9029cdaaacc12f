"""The command, as a user runs it: the whole way on a tiny model, and one line for every kind of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lowrank import Statistics
from hf_lowrank.cli.app import in_options
from tests.helpers import bert_config
from tests.tiny_task import WORDS, run, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(num_labels=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoLA-like rows as parquet files."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("validation", 10)):
        texts = [" ".join(WORDS[(n * 7 + k) % 40] for k in range(n % 9 + 1)) for n in range(count)]
        rows = Dataset.from_dict({"sentence": texts, "label": [n % 2 for n in range(count)]})
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("method", ["svd", "fwsvd", "tfwsvd"])
def test_compress_evaluate_inspect(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, method: str
) -> None:
    out, common = tmp_path / "out", ("--task", "cola", "--data-dir", data, "--json")
    code, printed, _ = run(
        monkeypatch, capfd, "compress", model, *common, "--method", method, "--rank-ratio", 0.25, "--output", out,
        "--evaluate", "--samples", 20,
    )  # fmt: skip
    assert code == 0
    compressed = json.loads(printed)
    code, printed, _ = run(monkeypatch, capfd, "evaluate", out, *common)
    assert code == 0
    evaluated = json.loads(printed)
    assert evaluated["score"] == compressed["score_compressed"]
    assert evaluated["parameters"] == compressed["parameters_after"] < compressed["parameters_before"]
    code, printed, _ = run(monkeypatch, capfd, "inspect", out, "--json")
    assert code == 0
    inspected = json.loads(printed)
    assert inspected["parameters"] == compressed["parameters_after"]
    assert inspected["parameters_dense"] == compressed["parameters_before"]
    assert inspected["record"]["score_compressed"] == compressed["score_compressed"]
    assert {layer["rank"] for layer in inspected["layers"].values()} == {8}
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert loaded.num_parameters() == compressed["parameters_after"]
    assert not list(tmp_path.glob(".*"))


def test_people_get_tables(model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = tmp_path / "out"
    words = ("compress", model, "--method", "svd", "--output", out)
    code, printed, _ = run(monkeypatch, capfd, *words)
    assert code == 0
    assert "12 layers factorized by svd" in printed
    assert "0.attention.self.query" not in printed
    assert "0.attention.self.query" in run(monkeypatch, capfd, *words, "--overwrite", "--verbose")[1]
    assert "matthews" in run(monkeypatch, capfd, "evaluate", out, "--task", "cola", "--data-dir", data)[1]
    inspected = run(monkeypatch, capfd, "inspect", out)[1].splitlines()
    assert inspected[0].startswith("LowRankBertForSequenceClassification, float32")
    rows = [line.split() for line in inspected if "attention.self.query" in line]
    assert [(row[0], row[5]) for row in rows] == [("0", "11"), ("1", "11")]
    assert "Hua et al." in run(monkeypatch, capfd, "methods")[1]


def test_saved_statistics_give_the_same_model(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    common = ("--task", "cola", "--data-dir", data)
    assert run(monkeypatch, capfd, "statistics", model, *common, "--output", tmp_path / "fisher")[0] == 0
    for name, more in (("direct", ()), ("saved", ("--statistics", tmp_path / "fisher"))):
        assert run(monkeypatch, capfd, "compress", model, *common, "--output", tmp_path / name, *more)[0] == 0
    direct, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "saved"))
    assert direct.keys() == saved.keys()
    assert all(torch.equal(direct[key], saved[key]) for key in direct)


def test_half_precision_is_stored_as_it_was(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    half = tmp_path / "half"
    AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float16).save_pretrained(half)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (half / file).write_bytes((model / file).read_bytes())
    words = ("--task", "cola", "--data-dir", data, "--output", tmp_path / "out")
    assert run(monkeypatch, capfd, "compress", half, *words)[0] == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model with a weight that is not a number."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--method": "fsvd"}, "unknown method 'fsvd'; the methods are svd, fwsvd, fwsvd2, tfwsvd, asvd, whiten"),
        ({"--task": "glue"}, "unknown task 'glue'; the tasks are cola"),
        ({"--rank-ratio": "1.5"}, "--rank-ratio must be in (0, 1]"),
        ({"--rank-ratio": "0"}, "--rank-ratio must be in (0, 1]"),
        ({"--include": "quary"}, "the pattern 'quary' matches none of the 14 linear layers"),
        ({"--task": "stsb"}, "stsb needs the column 'sentence1'"),
        ({"--task": "conll2003"}, "is a BertForSequenceClassification, which is not a model for conll2003"),
        ({"--task": "tinystories"}, "is not trained for tinystories: "),
        ({"MODEL": "EMPTY"}, "is not a model: the folder has no config.json"),
        ({"MODEL": "./nowhere"}, "there is no folder ./nowhere"),
        ({"MODEL": "nobody/nothing"}, "nobody/nothing cannot be loaded as a model for cola"),
        ({"MODEL": "BROKEN"}, "layer.1.output.dense: 1 of its 2048 weights are not finite"),
        ({"--data-dir": "EMPTY"}, "has no train.parquet"),
        ({"--statistics": "EMPTY"}, "there is no"),
        ({"--output": "FULL"}, "exists and is not empty; choose another folder or pass --overwrite"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, change: dict[str, str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"EMPTY": tmp_path / "empty", "FULL": tmp_path / "full", "BROKEN": broken(model, tmp_path)}
    options: dict[str, Any] = {"MODEL": model, "--task": "cola", "--data-dir": data, "--output": tmp_path / "out"}
    options |= {key: places.get(value, value) for key, value in change.items()}
    first = options.pop("MODEL")
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = run(
        monkeypatch, capfd, "compress", first, *(word for item in options.items() for word in item)
    )
    assert code == 2
    assert printed == ""
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("hf-lowrank: ")
    assert message in last
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_says_that_a_model_is_dense(model: Path, monkeypatch: Any, capfd: Any) -> None:
    code, _, err = run(monkeypatch, capfd, "inspect", model)
    assert code == 2
    assert "an ordinary bert model: none of its layers is factorized" in err


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_save_leaves_what_was_there(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "precious").write_text("kept")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lowrank.folder.saving.write_json", fails)
    words = ("compress", model, "--task", "cola", "--data-dir", data, "--method", "svd", "--output", out)
    assert run(monkeypatch, capfd, *words, "--overwrite")[0] == 130
    left = [path for path in tmp_path.rglob("*") if tmp_path / "out.work" not in (path, *path.parents)]  # to go on with
    assert [path.name for path in left] == (["out", "precious"] if existing else [])


def test_overwriting_replaces_the_folder(model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").touch()
    words = ("compress", model, "--task", "cola", "--data-dir", data, "--method", "svd", "--output", out)
    assert run(monkeypatch, capfd, *words, "--overwrite")[0] == 0
    assert not (out / "stale").exists()
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(
    model: Path, data: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    words = ["statistics", str(model), "--task", "cola", "--data-dir", str(data), "--samples", "23", "--output"]
    assert run(monkeypatch, capfd, *words, tmp_path / "one")[0] == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*launch, "-m", "hf_lowrank", *words, str(tmp_path / "two")], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("saved to") == 1
    one, two = (Statistics.load(tmp_path / name) for name in ("one", "two"))
    assert one.samples == two.samples == 23
    assert one.tokens == two.tokens
    kinds = {"activation_moment", "activation_mean", "gradient_moment", "active_tokens"}
    assert set(one.kinds) == set(two.kinds) == kinds
    for kind in one.kinds:
        for name, total in one.sums[kind].items():
            torch.testing.assert_close(two.sums[kind][name], total, rtol=1e-4, atol=1e-6 * float(total.abs().max()))


def test_help_teaches_and_the_module_runs() -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, "-m", "hf_lowrank", "compress", "--help"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0
    for word in ("--rank-ratio", "--data-dir", "Example:", "kfac"):
        assert word in result.stdout


def test_a_method_without_data_needs_no_task_and_no_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        (bare / file).write_bytes((model / file).read_bytes())
    for source in (model, bare):
        out = tmp_path / f"{source.name}-out"
        assert run(monkeypatch, capfd, "compress", source, "--method", "svd", "--output", out)[0] == 0
        loaded = AutoModelForSequenceClassification.from_pretrained(out)
        assert len(loaded.lowrank_ranks) == 12
        assert (out / "tokenizer.json").exists() == (source is model)
        assert "bare" in (out / "README.md").read_text() or source is model


@pytest.mark.parametrize("words", [("--method", "kfac"), ("--method", "svd", "--evaluate"), ("--allocation", "greedy")])
def test_what_reads_data_needs_a_task(
    model: Path, tmp_path: Path, monkeypatch: Any, capfd: Any, words: tuple[str, ...]
) -> None:
    code, _, err = run(monkeypatch, capfd, "compress", model, *words, "--output", tmp_path / "out")
    assert code == 2
    assert "compress needs a --task or --texts to measure on" in err


def test_inspect_shows_dense_layers_and_blocks(model: Path, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    out = tmp_path / "out"
    words = ("compress", model, "--method", "svd", "--include", "output.dense", "--output", out)
    assert run(monkeypatch, capfd, *words)[0] == 0
    printed = run(monkeypatch, capfd, "inspect", out)[1]
    assert "4 layers factorized, 8 dense" in printed
    rows = {tuple(line.split()[:2]): line for line in printed.splitlines()}
    assert "dense" in rows["1", "attention.self.key"]
    assert " 11 " in rows["1", "output.dense"]
    assert run(monkeypatch, capfd, "inspect", out, "--plot", tmp_path / "ranks.png")[0] == 0


def test_the_extra_is_shown_in_help(monkeypatch: Any, capfd: Any) -> None:
    assert "onnxruntime" in run(monkeypatch, capfd, "export", "--help")[1]


@pytest.mark.parametrize("command", ["compress", "analyze", "sweep"])
def test_every_command_with_methods_lists_them(command: str, monkeypatch: Any, capfd: Any) -> None:
    code, printed, _ = run(monkeypatch, capfd, command, "--method", "help")
    assert code == 0
    assert "Hua et al." in printed


@pytest.mark.parametrize(
    ("message", "words", "told"),
    [
        ("max_length must be at least 1", ["compress", "x"], "--max-length must be at least 1"),
        ("give one budget, not 2: keep, keep_model", ["compress"], "give one budget, not 2: keep, --keep-model"),
        ("name the right one in text_columns", ["compress"], "name the right one in --text-column"),
        ("/data/max_length/rows.csv is broken", ["compress"], "/data/max_length/rows.csv is broken"),
        ("max_length must be at least 1", ["methods"], "max_length must be at least 1"),
        ("max_length must be at least 1", [], "max_length must be at least 1"),
    ],
)
def test_messages_are_in_the_words_of_the_command(message: str, words: list[str], told: str) -> None:
    assert in_options(message, words) == told
