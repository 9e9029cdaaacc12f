"""Every kind of task through the commands: trained, compressed, scored again, and a card that says what it is."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_lowrank import LowRankError, Statistics, compute_statistics
from hf_lowrank.folder.loading import load_model
from hf_lowrank.model.targets import find_targets
from hf_lowrank.studies.bench.run import bench
from hf_lowrank.tasks import encode, get_task, load_split
from hf_lowrank.tasks.calibration import calibration_loader
from hf_lowrank.training.distillation import Distillation
from tests.jobs.test_distributed import assert_equal_up_to_order
from tests.launches import Job, hf_lowrank
from tests.tasks.test_kinds import MODELS, masking_tokenizer, written
from tests.tiny_task import run

CARDS = {
    "fill-mask": ("fill-mask", "perplexity"),
    "question-answering": ("question-answering", "f1"),
    "multi-label": ("text-classification", "f1"),
    "summarization": ("summarization", "rouge"),
    "image-classification": ("image-classification", "accuracy"),
}


def write_images(folder: Path, count: int = 6) -> Path:
    """Bright and dark images, a folder of them for each class."""
    for split in ("train", "validation"):
        for n in range(count):
            place = folder / split / ("bright" if n % 2 else "dark")
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 7), 200 * (n % 2) + n).save(place / f"{n}.png")
    return folder


def write_model(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    if name == "image-classification":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        ViTForImageClassification(
            ViTConfig(**sizes, image_size=8, patch_size=4, initializer_range=0.3)
        ).save_pretrained(folder)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        MODELS[name]().save_pretrained(folder)
        masking_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, name: str) -> Path:
    folder.mkdir()
    return write_images(folder) if name == "image-classification" else written(folder, name)


@pytest.mark.parametrize("name", CARDS)
def test_a_task_goes_from_training_to_the_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, data = write_model(tmp_path / "model", name), write_data(tmp_path / "data", name)
    given = ("--task", name, "--data-dir", data)
    trained, small = tmp_path / "trained", tmp_path / "small"
    code, _, err = run(monkeypatch, capfd, "finetune", model, *given, "--epochs", "1", "--output", trained)
    assert code == 0, err
    compressed = ("--rank-ratio", "0.5", "--evaluate", "--output", small, "--json")
    code, out, err = run(monkeypatch, capfd, "compress", trained, *given, *compressed)
    assert code == 0, err
    record = json.loads(out)
    code, out, err = run(monkeypatch, capfd, "evaluate", small, *given, "--against", trained, "--json")
    assert code == 0, err
    scored = json.loads(out)
    assert scored["score"] == pytest.approx(record["score_compressed"])
    assert scored["divergence"]["mean"] > 0
    card = ModelCard.load(small / "README.md")
    tag, metric = CARDS[name]
    assert card.data.pipeline_tag == tag
    assert card.data.eval_results[0].metric_type == metric
    assert card.data.eval_results[0].metric_value == pytest.approx(record["score_compressed"], abs=1e-3)
    reader = "AutoImageProcessor" if name == "image-classification" else "AutoTokenizer"
    assert f"{reader}.from_pretrained" in card.text


def test_images_are_read_by_the_model_s_own_processor(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data")
    task = get_task("image-classification", data_dir=data)
    assert task.label_names == ("bright", "dark")
    folder = write_model(tmp_path / "model", "image-classification")
    model, processor = load_model(str(folder), task)
    loader = calibration_loader(model, processor, task, data, batch_size=6)
    (batch,) = loader
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    assert batch["labels"].tolist() == [int(pixels.mean() < 0) for pixels in batch["pixel_values"]]
    (data / "train" / "dark" / "0.png").write_bytes(b"no image")
    with pytest.raises(LowRankError, match=r"0\.png of image-classification cannot be read as an image"):
        encode(load_split(task, "train", data), task, processor, model.config)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("question-answering", "multi-label", "is not trained for question-answering: qa_outputs"),
        ("summarization", "fill-mask", "transformers has no AutoModelForSeq2SeqLM of that kind"),
        ("multi-label", "classifier", "is trained for single_label_classification, which multi-label is not"),
    ],
)
def test_models_with_another_head_are_refused_in_a_line(
    name: str, other: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    model = write_model(tmp_path / "model", "multi-label" if other == "classifier" else other)
    if other == "classifier":
        config = json.loads((model / "config.json").read_text())
        config["problem_type"] = "single_label_classification"
        (model / "config.json").write_text(json.dumps(config))
    given = ("--task", name, "--data-dir", write_data(tmp_path / "data", name), "--output", tmp_path / "out")
    code, _, err = run(monkeypatch, capfd, "compress", model, *given)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("labels", ["data", "model"])
def test_images_are_read_in_half_precision_by_models_that_do_not_convert_them(labels: str) -> None:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}
    model = SwinForImageClassification(SwinConfig(**sizes)).eval()
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1])}
    whole, half = (
        compute_statistics(each, [batch], ["fisher_rows"], labels=labels, progress=False).mean("fisher_rows", name)
        for each in (model, copy.deepcopy(model).bfloat16())
        for name in list(find_targets(model))[-1:]
    )
    torch.testing.assert_close(half, whole, rtol=0.2, atol=0.1 * float(whole.max()))


def test_images_are_learnt_from_a_teacher_and_not_timed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "image-classification")
    model: Any = ViTForImageClassification.from_pretrained(folder).eval()
    distillation = Distillation(model)
    distillation.check(model)
    batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        outputs = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
        assert float(distillation.loss(torch.tensor(0.0), outputs, batch)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(LowRankError, match="reads other things than tokens, such as images; only models of tokens"):
        bench(folder, against=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["question-answering", "image-classification"])
def test_two_processes_measure_what_one_does(name: str, tmp_path: Path) -> None:
    """Windows of questions and images are shared, and signs are those of a sample, wherever it is."""
    model, data = write_model(tmp_path / "model", name), write_data(tmp_path / "data", name)
    words = ["statistics", model, "--task", name, "--data-dir", data, "--labels", "model", "--kind", "fisher"]
    words += ["--max-length", 16] if name == "question-answering" else []
    for processes in (1, 2):
        output = tmp_path / f"on-{processes}"
        Job(tmp_path / "job", hf_lowrank, *words, "--output", output, "--resume", processes=processes).done()
    one, two = (Statistics.load(tmp_path / f"on-{processes}") for processes in (1, 2))
    assert one.samples > (9 if name == "question-answering" else 5)
    assert_equal_up_to_order(two, one)
