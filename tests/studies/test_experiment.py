"""Recipes are checked, done step by step, gone on with, and written up; the ones of the papers are valid."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from hf_lowrank import LowRankError
from hf_lowrank.studies.experiment import load_recipe, plan_of, run_recipe, tables_of
from hf_lowrank.studies.experiment.recipe import Recipe, parse_recipe
from hf_lowrank.studies.experiment.run import steps_of
from hf_lowrank.studies.experiment.store import Store
from hf_lowrank.studies.experiment.tables import rows_of
from tests.tiny_task import run, write_cola, write_encoder

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
EIGHT = ["cola", "conll2003", "mnli", "mrpc", "qnli", "qqp", "sst2", "stsb"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    write_cola(folder / "cola")
    return {"data": folder, "model": write_encoder(folder / "tiny")}


def content(places: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """A recipe of two compressions, each fine-tuned again."""
    return {
        "title": "Tiny",
        "path": 3,
        "models": [str(places["model"])],
        "tasks": ["cola"],
        "methods": ["svd", "kfac"],
        "budgets": [{"rank_ratio": 0.25}],
        "finetune": {"epochs": 2, "learning_rate": "3e-3", "batch_size": 8},
        "finetune_after": {"epochs": 1},
        **changes,
    }


def records(output: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((output / "records").glob("*.json"))}


def scores(output: Path) -> dict[str, float]:
    return {name: record["score"] for name, record in records(output).items()}


def do(recipe: dict[str, Any], output: Path, places: dict[str, Path]) -> list[str]:
    said: list[str] = []
    run_recipe(parse_recipe(recipe, "tiny"), output, places["data"], say=said.append)
    return said


@pytest.mark.slow
def test_every_step_is_kept_and_skipped_the_next_time(places: dict[str, Path], tmp_path: Path) -> None:
    said = do(content(places), tmp_path, places)
    start = "tiny--cola--seed0"
    runs = [f"{start}--{method}--rank-ratio-0.25" for method in ("kfac", "svd")]
    assert sorted(records(tmp_path)) == sorted([start, *runs, *(f"{name}--finetuned" for name in runs)])
    assert any(line.startswith("statistics (") for line in said)
    kept = records(tmp_path)
    dense, tuned = kept[start], kept[f"{runs[0]}--finetuned"]
    assert dense["new_parameters"] == ["classifier.bias", "classifier.weight"]
    assert dense["finetuning"]["settings"]["learning_rate"] == 3e-3
    assert tuned["compression"]["score_dense"] == dense["score"]
    assert tuned["compression"]["score_compressed"] == kept[runs[0]]["score"]
    assert tuned["compression"]["score_finetuned"] == tuned["score"]
    assert tuned["compression"]["settings"]["method"] == "kfac"
    apart = tuned["compression"]["divergence"]
    assert [apart[kind]["mean"] for kind in ("compressed", "finetuned")] == [
        record["divergence"]["mean"] for record in (kept[runs[0]], tuned)
    ]
    assert "divergence" not in dense
    assert tuned["parameters"] == kept[runs[0]]["parameters"] < dense["parameters"]
    assert str(places["data"]) not in json.dumps(kept)
    assert do(content(places), tmp_path, places) == [f"{start} (1 of 1)"]
    assert records(tmp_path) == kept
    new = do(content(places, methods=["svd", "kfac", "whiten"], finetune_after=False), tmp_path, places)
    assert [line for line in new if line.startswith(start)][1:] == [new[-1]]
    assert f"{start}--whiten--rank-ratio-0.25: " in new[-1]


@pytest.mark.slow
def test_an_interrupted_recipe_ends_with_the_same_results(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    do(content(places), whole, places)
    add = Store.add

    def stops_before(count: int) -> None:
        left = [count]

        def limited(self: Store, *args: Any) -> Any:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return add(self, *args)

        monkeypatch.setattr(Store, "add", limited)

    for _ in range(5):
        stops_before(1)
        try:
            do(content(places), cut, places)
        except KeyboardInterrupt:
            continue
    monkeypatch.setattr(Store, "add", add)
    do(content(places), cut, places)
    assert scores(cut) == scores(whole)
    assert (cut / "tiny.md").read_text() == (whole / "tiny.md").read_text()
    assert not list((cut / "work" / "checkpoints").glob("*"))


def test_records_of_other_settings_are_named_before_any_work(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = content(places, methods=["svd"], finetune_after=False)
    do(recipe, tmp_path, places)
    before = records(tmp_path)
    other = recipe | {"finetune": {**recipe["finetune"], "epochs": 1}}
    with pytest.raises(LowRankError, match=r"seed0\.json was made with finetune\.epochs 2, and the recipe says 1"):
        do(other, tmp_path, places)
    assert records(tmp_path) == before


def test_scores_on_other_data_are_not_put_beside_those_of_today(places: dict[str, Path], tmp_path: Path) -> None:
    do(content(places, methods=["svd"], finetune_after=False), tmp_path / "out", places)
    kept = records(tmp_path / "out")
    whole = kept["tiny--cola--seed0--svd--rank-ratio-0.25"]
    assert whole["scored_on"] == whole["compression"]["scored_on"]["dense"] == kept["tiny--cola--seed0"]["scored_on"]
    other = tmp_path / "other" / "cola"
    shutil.copytree(places["data"] / "cola", other)
    rows = Dataset.from_parquet(str(other / "validation.parquet"))
    rows.select(range(10)).to_parquet(other / "validation.parquet")
    with pytest.raises(LowRankError, match=r"seed0 was scored on other validation data, .*delete .*records"):
        do(content(places, finetune_after=False), tmp_path / "out", {**places, "data": other.parent})
    assert records(tmp_path / "out") == kept


def test_a_step_that_fails_does_not_stop_the_others(places: dict[str, Path], tmp_path: Path) -> None:
    budgets = [{"rank_ratio": 0.25, "include": ["quary"]}, {"rank_ratio": 0.25}]
    recipe = content(places, methods=["svd"], budgets=budgets, finetune_after=False)
    with pytest.raises(LowRankError, match="1 steps failed and are tried again .*'quary' matches none"):
        do(recipe, tmp_path, places)
    assert set(records(tmp_path)) == {"tiny--cola--seed0", "tiny--cola--seed0--svd--rank-ratio-0.25"}


@pytest.mark.slow
def test_path_1_against_path_2_with_the_first_layers_and_a_teacher(places: dict[str, Path], tmp_path: Path) -> None:
    shared = content(places)
    parts = [
        {"path": 1, "models": [{"name": str(places["model"]), "layers": 1}]},
        {"path": 2, "methods": ["svd"], "finetune_after": {"epochs": 1, "distillation": {"logits": 0.3}}},
    ]
    recipe = {key: shared[key] for key in ("title", "tasks", "models", "finetune", "budgets")} | {"experiments": parts}
    do(recipe, tmp_path, places)
    parsed = parse_recipe(recipe, "tiny")
    rows = [(row.model, row.method, row.finetuned) for row in rows_of(parsed, Store(tmp_path))]
    assert rows == [
        ("tiny, first 1 layers", "dense", False),
        ("tiny", "dense", False),
        ("tiny", "svd", False),
        ("tiny", "svd", True),
    ]
    kept = records(tmp_path)
    assert kept["tiny-first-1-layers--cola--seed0"]["parameters"] < kept["tiny--cola--seed0"]["parameters"]
    trained = kept["tiny--cola--seed0--svd--rank-ratio-0.25--finetuned"]["compression"]["finetuning"]
    assert trained["settings"]["distillation"] == {"temperature": 2.0, "logits": 0.3, "hidden": 1.0}
    text = (tmp_path / "tiny.md").read_text()
    assert text.startswith("# Tiny\n\n## Table 1: ")
    assert "| tiny | svd | rank ratio 0.25 | " in text


def test_budgets_on_different_layers_have_their_own_statistics(places: dict[str, Path], tmp_path: Path) -> None:
    budgets = [{"rank_ratio": 0.25}, {"rank_ratio": 0.25, "include": ["word_embeddings", "query"]}]
    recipe = content(places, methods=["kfac"], budgets=budgets, finetune={"epochs": 1}, finetune_after=False)
    do(recipe, tmp_path, places)
    layers = [record["compression"]["layers"] for record in records(tmp_path).values() if "compression" in record]
    names = sorted({layer["name"].rpartition(".")[2] for layer in part} for part in layers)
    assert {"word_embeddings", "query"} in names
    assert len(list((tmp_path / "work/statistics").iterdir())) == 2


def test_methods_have_statistics_by_their_own_labels(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = content(places, methods=["fwsvd", "kfac"], finetune={"epochs": 1}, finetune_after=False)
    do(recipe, tmp_path, places)
    made = [record["compression"] for record in records(tmp_path).values() if "compression" in record]
    labels = {record["settings"]["method"]: record["statistics"]["labels"] for record in made}
    assert labels == {"fwsvd": "data", "kfac": "model"}
    assert len(list((tmp_path / "work/statistics").iterdir())) == 2


def test_a_model_that_is_fine_tuned_already_is_taken_as_it_is(places: dict[str, Path], tmp_path: Path) -> None:
    do(content(places, methods=["svd"], finetune_after=False), tmp_path / "first", places)
    tuned = tmp_path / "first" / "work" / "dense" / "tiny--cola--seed0"
    recipe = content(places, models=[{"name": str(tuned), "label": "tiny"}], methods=["svd"], finetune=False)
    do(recipe | {"finetune_after": False}, tmp_path / "second", places)
    assert scores(tmp_path / "first") == scores(tmp_path / "second")


# --- tables ---


def filled(recipe: Recipe, output: Path, score: Any) -> Store:
    """A store in which every step of a recipe has a record, its score given by the step's settings."""
    store = Store(output)
    for dense, runs in plan_of(recipe):
        for name, settings in steps_of(dense, runs):
            store.add(
                name, settings, {"score": score(settings), "metrics": {"degenerate": 0.0}, "parameters": 66_500_000}
            )
    return store


def test_tables_hold_means_deviations_and_averages(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = parse_recipe(content(places, tasks=["cola", "stsb"], seeds=[0, 1, 2], methods=["svd"]), "tiny")

    def score(settings: dict[str, Any]) -> float:
        return 80.0 + 2 * settings["seed"] + (5 if settings["task"]["name"] == "stsb" else 0)

    text = tables_of(recipe, filled(recipe, tmp_path, score))
    assert "| tiny | dense | – | 66.5M | – | 82.0 ± 2.0 | 87.0 ± 2.0 | 84.50 |" in text
    assert "| tiny | svd | rank ratio 0.25 | 66.5M | yes | 82.0 ± 2.0 | 87.0 ± 2.0 | 84.50 |" in text
    assert "Seeds 0, 1, 2, means ± standard deviations." in text
    next(tmp_path.glob("records/*stsb--seed1--svd--rank-ratio-0.25.json")).unlink()
    assert "| no | 82.0 ± 2.0 | 87.0 ± 2.8 | 84.50 |" in tables_of(recipe, Store(tmp_path))
    for path in tmp_path.glob("records/*stsb*--svd--rank-ratio-0.25.json"):
        path.unlink()
    assert "| no | 82.0 ± 2.0 | – | – |" in tables_of(recipe, Store(tmp_path))


def test_the_divergence_from_dense_stands_beside_the_score(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = parse_recipe(content(places, seeds=[0, 1], methods=["svd"], finetune_after=False), "tiny")
    store = filled(recipe, tmp_path, lambda settings: 80.0)
    for dense, (made,) in plan_of(recipe):
        known = store.get(made.name, made.settings) or {}
        store.add(made.name, made.settings, known | {"divergence": {"mean": 0.25 + dense.seed / 2}})
    text = tables_of(recipe, store)
    assert "| 80.0 ± 0.0 (0.5) |" in text
    assert "| tiny | dense | – | 66.5M | – | 80.0 ± 0.0 |" in text
    assert "In brackets how far predictions are from the dense model's" in text


def test_a_collapsed_model_is_marked(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = parse_recipe(content(places, methods=["svd"]), "tiny")
    store = filled(recipe, tmp_path, lambda settings: 0.0)
    ((dense, _),) = plan_of(recipe)
    store.add(dense.name, dense.settings, {"score": 0.0, "metrics": {"degenerate": 1.0}, "parameters": 12_194})
    text = tables_of(recipe, store)
    assert "| tiny | dense | – | 12.2k | – | 0.0 † |" in text
    assert "† With at least one seed every prediction is the same." in text


@pytest.mark.parametrize("tasks", [[task for task in EIGHT if task != "conll2003"], EIGHT])
def test_published_results_stand_where_the_setting_is_the_same(tmp_path: Path, tasks: list[str]) -> None:
    given = {"path": 2, "models": ["google-bert/bert-base-uncased"], "tasks": tasks, "methods": ["fwsvd"]}
    recipe = parse_recipe(given, "base")
    text = tables_of(recipe, filled(recipe, tmp_path, lambda settings: 70.0))
    published = [line for line in text.splitlines() if "*published: Adaptive Rank Selections (NAACL 2024)*" in line]
    assert all(line.startswith("| bert-base-uncased | ") for line in published)
    averages = [line.rpartition(" | ")[2].strip(" |") for line in published]
    assert averages == (["84.36", "41.90", "78.42", "57.03", "81.34", "69.49", "83.53"] if len(tasks) == 7 else [])


# --- recipes ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_come_with_the_library_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    plan = plan_of(recipe)
    assert len({name for dense, runs in plan for name, _ in steps_of(dense, runs)}) == sum(
        1 + 2 * len(runs) for _, runs in plan
    )
    if not path.stem.startswith("minilm-"):
        for experiment in recipe.experiments:
            assert [task.name for task in experiment.tasks] == EIGHT
            settings = {"epochs": 3, "learning_rate": 2e-5, "batch_size": 32}
            assert experiment.finetune == settings
            assert experiment.finetune_after == (None if experiment.path == 1 else settings)
            assert all(budget["rank_ratio"] == 0.33 for budget in experiment.budgets)


def test_the_papers_models_have_recipes() -> None:
    papers = {"bert-base", "distilbert", "minilmv2", "tinybert", "mobilebert", "albert-base", "albert-large"}
    assert papers <= {path.stem for path in RECIPES}
    tables = {path.stem: {each.table for each in load_recipe(path).experiments} for path in RECIPES}
    assert (tables["bert-base"], tables["distilbert"], tables["albert-large"]) == ({1}, {2}, {3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["svd"]}, "unknown key 'method' in a recipe; the keys are title, experiments, path"),
        ({"path": 4}, "path is 4; the paths are 1: a compact model"),
        ({"tasks": ["glue"]}, "unknown task 'glue'; the tasks are cola"),
        ({"methods": ["fsvd"]}, "unknown method 'fsvd'; the methods are svd"),
        ({"methods": []}, "methods is \\[\\]; it must be a list of at least one"),
        ({"budgets": [{"rank_ratio": 1.5}]}, "rank_ratio must be in"),
        ({"budgets": [{"rank": 8}]}, "unknown key 'rank' in a budget; the keys are rank_ratio"),
        ({"budgets": [{"rank_ratio": "much"}]}, "rank_ratio must be a number; it is 'much'"),
        ({"seeds": ["one"]}, "the seed 'one' is not a whole number"),
        ({"table": 4}, "table is 4"),
        ({"finetune": {"epoch": 3}}, "unknown key 'epoch' in finetune; the keys are epochs"),
        ({"finetune": {"epochs": -1}}, "epochs and learning rate must be above 0"),
        ({"finetune": {"learning_rate": "fast"}}, "finetune: learning_rate must be a number; it is 'fast'"),
        (
            {"finetune_after": {"distillation": {"weight": 1}}},
            "unknown key 'weight' in distillation; the keys are temp",
        ),
        ({"statistics": {"samples": 0}}, "they must be whole numbers, at least 1"),
        ({"models": [{"layers": 3}]}, "has no name"),
        ({"path": 1, "finetune": False}, "path 1 is fine-tuning"),
        ({"experiments": [{"path": 3}, {"paths": 2}]}, "unknown key 'paths' in experiment 2"),
        (
            {"experiments": [{}, {"finetune": {"epochs": 9}}]},
            "different things by tiny--cola--seed0: finetune.batch_size is 8 and None",
        ),
    ],
)
def test_bad_recipes_are_named(places: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content(places, **changes)))
    with pytest.raises(LowRankError, match=message):
        plan_of(load_recipe(path))


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    with pytest.raises(LowRankError, match="there is no recipe"):
        load_recipe(path)
    path.write_text("models: [a, b\ntasks:")
    with pytest.raises(LowRankError, match="is not a YAML file"):
        load_recipe(path)
    path.write_text("- path: 1")
    with pytest.raises(LowRankError, match="bad.yaml: a recipe is .* it must be a mapping"):
        load_recipe(path)


# --- the command ---


def test_the_command(places: dict[str, Path], tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    path, output = tmp_path / "tiny.yaml", tmp_path / "results"
    path.write_text(yaml.safe_dump(content(places, methods=["svd"], finetune_after=False)))
    words = ("experiment", path, "--output", output, "--data-dir", places["data"])
    code, printed, _ = run(monkeypatch, capfd, *words, "--dry-run")
    assert code == 0
    assert "2 steps, 0 done" in printed
    assert not output.exists()
    code, printed, err = run(monkeypatch, capfd, *words, "--keep-models")
    assert code == 0
    assert printed.strip() == (output / "tiny.md").read_text().strip()
    assert "tiny--cola--seed0 (1 of 1)" in err
    (saved,) = (output / "models").iterdir()
    code, printed, _ = run(
        monkeypatch, capfd, "evaluate", saved, "--task", "cola", "--data-dir", places["data"] / "cola", "--json"
    )
    assert json.loads(printed)["score"] == scores(output)[saved.name]
    code, printed, _ = run(monkeypatch, capfd, *words, "--dry-run", "--json")
    assert all(step["done"] for step in json.loads(printed).values())
    code, _, err = run(monkeypatch, capfd, *words[:-1], tmp_path / "nowhere", "--output", tmp_path / "other")
    assert code == 2
    assert "there is no folder" in err.strip().splitlines()[-1]
