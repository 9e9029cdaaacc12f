"""verify: a whole folder passes, and every kind of damage is found and named."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, PreTrainedModel

from hf_lowrank import CompressionConfig, LowRankError, cli, compress
from hf_lowrank.folder.fingerprint import file_digests, probe
from hf_lowrank.folder.saving import add_facts, read_record, save_compressed
from hf_lowrank.folder.verify import FAIL, INFO, PASS, SKIP, Check, verify
from tests.helpers import factorize, tiny_albert, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def save(model: PreTrainedModel, folder: Path, **facts: Any) -> None:
    """The dense model into `folder`/dense, compressed into `folder`/low."""
    model.save_pretrained(folder / "dense")
    model, report = compress(model, CompressionConfig("svd", 0.25), progress=False)
    save_compressed(model, None, report, folder / "low", **facts)


@pytest.fixture
def low(tmp_path: Path) -> Path:
    save(tiny_bert(), tmp_path)
    return tmp_path / "low"


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def edit_weights(low: Path, **changes: Any) -> None:
    """Rewrite tensors of the checkpoint, and its digest, so that only their values tell."""
    weights = load_file(low / "model.safetensors")
    save_file(weights | changes, low / "model.safetensors", metadata={"format": "pt"})
    record = read_record(low) or {}
    add_facts(low, fingerprint=record["fingerprint"] | {"files": file_digests(low)})


@pytest.mark.parametrize("make", [tiny_bert, tiny_albert, tiny_gpt2, tiny_llama, tiny_t5])
def test_what_was_saved_passes(make: Any, tmp_path: Path) -> None:
    save(make(), tmp_path)
    found = statuses(verify(tmp_path / "low", tmp_path / "dense"))
    judged = {name: status for name, status in found.items() if name != "outputs"}
    assert set(judged.values()) == {PASS}
    assert len(judged) == 7
    assert found["outputs"] == INFO


def test_half_precision_passes(tmp_path: Path) -> None:
    save(tiny_llama().to(torch.bfloat16), tmp_path)
    assert FAIL not in statuses(verify(tmp_path / "low", tmp_path / "dense")).values()


def test_a_changed_missing_or_added_file_fails(low: Path) -> None:
    (low / "modeling_lowrank.py").write_text("import os")
    (low / "configuration_lowrank.py").unlink()
    (low / "more.safetensors").write_bytes(b"")
    (checksums,) = (check for check in verify(low) if check.name == "checksums")
    assert checksums.status == FAIL
    for part in (
        "modeling_lowrank.py has changed",
        "configuration_lowrank.py is missing",
        "more.safetensors was added",
    ):
        assert part in checksums.detail


def test_card_and_facts_may_be_added_later(low: Path) -> None:
    (low / "README.md").write_text("# A card")
    add_facts(low, score_finetuned=1.0)
    assert statuses(verify(low))["checksums"] == PASS


def test_digests_of_files_outside_of_the_folder_are_not_taken(low: Path) -> None:
    for name in ("../secret", "/etc/passwd"):
        record = read_record(low) or {}
        add_facts(low, fingerprint=record["fingerprint"] | {"files": {name: "0" * 64}})
        (checksums,) = (check for check in verify(low) if check.name == "checksums")
        assert checksums == Check("checksums", FAIL, f"the record names {name!r}, which is outside of the folder")


def test_shapes_that_do_not_fit_the_config_fail(low: Path) -> None:
    edit_weights(low, **{"bert.encoder.layer.0.output.dense.down.weight": torch.zeros(3, 64)})
    (failed,) = (check for check in verify(low) if check.name == "config and shapes")
    assert failed.status == FAIL
    assert "bert.encoder.layer.0.output.dense has rank 8 in config.json" in failed.detail


def test_a_weight_that_is_not_finite_fails(low: Path) -> None:
    key = "bert.encoder.layer.0.output.dense.down.weight"
    weight = load_file(low / "model.safetensors")[key]
    weight[0, :2] = float("nan")
    edit_weights(low, **{key: weight})
    found = {check.name: check for check in verify(low)}
    assert found["finite"] == Check("finite", FAIL, f"{key}: 2 of its weights are not finite")
    assert found["outputs as recorded"].status == FAIL


def test_other_weights_of_the_same_shapes_fail(low: Path) -> None:
    key = "classifier.weight"
    edit_weights(low, **{key: load_file(low / "model.safetensors")[key] * 1.1})
    found = statuses(verify(low, low.parent / "dense"))
    assert [name for name, status in found.items() if status == FAIL] == [
        "outputs as recorded",
        "other weights unchanged",
    ]


def test_factors_that_are_not_those_of_the_record_fail(low: Path) -> None:
    key = "bert.encoder.layer.1.output.dense.up.weight"
    edit_weights(low, **{key: load_file(low / "model.safetensors")[key] * 0.5})
    found = {check.name: check for check in verify(low, low.parent / "dense")}
    assert found["layers' errors as recorded"].status == FAIL
    assert "bert.encoder.layer.1.output.dense: off by" in found["layers' errors as recorded"].detail


def test_a_fine_tuned_model_is_not_compared_weight_by_weight(tmp_path: Path) -> None:
    save(tiny_bert(), tmp_path, finetuning={"epochs": 1})
    found = statuses(verify(tmp_path / "low", tmp_path / "dense"))
    assert found["other weights unchanged"] == found["layers' errors as recorded"] == SKIP


def test_another_architecture_fails_or_is_refused(low: Path, tmp_path: Path) -> None:
    tiny_bert(intermediate_size=48).save_pretrained(tmp_path / "narrower")
    found = {check.name: check for check in verify(low, tmp_path / "narrower")}
    assert found["same architecture"].status == FAIL
    assert "is [48, 32] in the dense model, [64, 32] here" in found["same architecture"].detail
    with pytest.raises(LowRankError, match="there is no folder"):
        verify(tmp_path / "nowhere")


def test_a_model_saved_without_a_record_has_less_to_compare(tmp_path: Path) -> None:
    factorize(tiny_gpt2()).save_pretrained(tmp_path)
    found = statuses(verify(tmp_path))
    assert found == {"checksums": SKIP, "config and shapes": PASS, "finite": PASS, "outputs as recorded": SKIP}


def test_the_probe_is_small_fixed_and_leaves_the_mode_alone() -> None:
    model = tiny_llama().train()
    first, second = probe(model), probe(model)
    assert first == second
    assert model.training
    assert len(first["values"]) == 64
    assert first["shape"] == [1, 16, model.config.vocab_size]
    assert probe(tiny_llama(hidden_size=16)) != first


def test_a_model_of_other_inputs_is_skipped_with_the_reason(tmp_path: Path) -> None:
    class Deaf(GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("pixel_values are needed")

    assert probe(Deaf(tiny_gpt2().config)) == {"skipped": "ValueError: pixel_values are needed"}


def test_the_command_exits_with_1_on_failure(low: Path, monkeypatch: Any, capfd: Any) -> None:
    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", "verify", str(low), *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0), capfd.readouterr().out

    code, printed = run("--against", str(low.parent / "dense"))
    assert code == 0
    assert "is whole" in printed
    (low / "modeling_lowrank.py").write_text("import os")
    code, printed = run("--json")
    assert code == 1
    assert json.loads(printed)["passed"] is False
    assert "1 of 4 checks failed" in run()[1]
