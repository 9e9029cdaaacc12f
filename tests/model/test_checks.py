"""What enters as a model is a whole transformers model, or is refused in one line that says what to do."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.compression.profiling import profile_losses
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.model.targets import find_targets
from hf_lowrank.tasks import get_task
from hf_lowrank.training.finetune import finetune
from tests.helpers import bert_config, factorize, tiny_bert, token_ids
from tests.tiny_task import run

SVD = CompressionConfig("svd", 0.25)


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)


BATCH = {"input_ids": token_ids(), "labels": torch.tensor([0, 1, 1])}
MERGE = "an adapter is attached to the .*: merge it .*merge_and_unload.*save_pretrained"


def with_adapter(folder: Path) -> Any:
    """What `from_pretrained` of an adapter's folder gives: the base model with layers of peft in it."""
    tiny_bert().save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(base, lora()).save_pretrained(folder / "adapter")
    return AutoModelForSequenceClassification.from_pretrained(folder / "adapter")


ENTRIES = {
    "find_targets": find_targets,
    "compress": lambda model: compress(model, SVD),
    "compute_statistics": lambda model: compute_statistics(model, [BATCH], ("fisher_rows",)),
    "profile_losses": lambda model: profile_losses(model, SVD, None, [BATCH]),
}


@pytest.mark.parametrize("entry", [*ENTRIES, "finetune", "save"])
def test_a_model_with_an_adapter_is_refused_wherever_it_enters(entry: str, tmp_path: Path) -> None:
    model = with_adapter(tmp_path)
    report = compress(tiny_bert(), SVD, progress=False)[1]
    entries = ENTRIES | {
        "finetune": lambda model: finetune(model, None, get_task("cola"), tmp_path),  # type: ignore[arg-type]
        "save": lambda model: save_compressed(model, None, report, tmp_path / "saved"),
    }
    for adapted in (model, get_peft_model(tiny_bert(), lora()), get_peft_model(factorize(tiny_bert()), _of_factors())):
        before = {name: value.clone() for name, value in adapted.state_dict().items()}
        with pytest.raises(LowRankError, match=MERGE) as raised:
            entries[entry](adapted)
        assert "\n" not in str(raised.value)
        assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    assert not (tmp_path / "saved").exists()


def _of_factors() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)


def test_a_merged_model_is_taken(tmp_path: Path) -> None:
    merged = get_peft_model(tiny_bert(), lora()).merge_and_unload()
    low_rank, report = compress(merged, SVD, progress=False)
    assert len(report.ranks) == 12
    save_compressed(low_rank, None, report, tmp_path / "saved")
    assert len(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").config.ranks) == 12


@pytest.mark.parametrize("command", ["compress", "finetune", "inspect"])
def test_commands_refuse_the_folder_of_an_adapter(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_adapter(tmp_path)
    options = [] if command == "inspect" else ["--task", "cola", "--output", tmp_path / "output"]
    code, _, error = run(monkeypatch, capfd, command, tmp_path / "adapter", *options)
    assert code == 2
    assert "is an adapter, and its model is not in it: merge it" in error
    assert "Traceback" not in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), r"this is a torch\.nn\.modules\.container\.Sequential: pass the transformers"),
        ("bert-base-uncased", r"a transformers model is needed, and this is a builtins\.str"),
    ],
)
def test_what_is_no_transformers_model_is_refused(entry: str, given: Any, message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        ENTRIES[entry](given)


@pytest.mark.parametrize("entry", ["compress", "compute_statistics"])
def test_a_model_without_weights_is_refused(entry: str) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(bert_config())
    assert len(find_targets(model)) == 12  # which needs none
    with pytest.raises(LowRankError, match=r"query is on the meta device, without a weight: load the model"):
        ENTRIES[entry](model)


@pytest.mark.parametrize("entry", ENTRIES)
def test_quantized_models_are_refused(entry: str) -> None:
    class QuantizedLinear(nn.Linear):
        """Stands where a quantizer that is not installed puts its own."""

    QuantizedLinear.__module__ = "bitsandbytes.nn.modules"
    model = tiny_bert()
    model.bert.pooler.dense = QuantizedLinear(32, 32)
    with pytest.raises(LowRankError, match=r"quantized by bitsandbytes.*: take the model .*, and quantize last"):
        ENTRIES[entry](model)


def test_quantized_by_torchao_is_refused() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for model in (tiny_bert(), factorize(tiny_bert())):
        quantize_(model, Int8WeightOnlyConfig())
        with pytest.raises(LowRankError, match="quantized by torchao"):
            compress(model, SVD)


def test_quantized_by_quanto_is_refused() -> None:
    quanto: Any = pytest.importorskip("optimum.quanto")
    for model in (tiny_bert(), factorize(tiny_bert())):
        quanto.quantize(model, weights=quanto.qint8)
        with pytest.raises(LowRankError, match="quantized by optimum"):
            compress(model, SVD)


@pytest.mark.slow
def test_a_model_of_travelling_code_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    """Its layers are of classes of their own, so that the factors would be taken for dense layers."""
    factorize(tiny_bert()).save_pretrained(tmp_path)
    script = f"""
from transformers import AutoModelForSequenceClassification as Auto
model = Auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
from hf_lowrank import LowRankError
from hf_lowrank.model.targets import find_targets
try:
    find_targets(model)
except LowRankError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "import hf_lowrank first and load it again" in done.stdout
