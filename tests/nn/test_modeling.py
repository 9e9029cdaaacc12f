"""A low-rank model is a transformers model: it saves, loads, trains, generates and is adapted as its base is."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

import hf_lowrank.nn.configuration_lowrank as configuration
import hf_lowrank.nn.modeling_lowrank as modeling
from hf_lowrank.nn.auto_lowrank import auto_map_of
from hf_lowrank.nn.configuration_lowrank import LowRankConfig, config_class_for
from hf_lowrank.nn.editing_lowrank import replace_module
from hf_lowrank.nn.layers_lowrank import LowRankLinear, dense_weight
from hf_lowrank.nn.modeling_lowrank import to_low_rank_class
from tests.helpers import (
    HIDDEN,
    RANK,
    VOCABULARY,
    WIDE,
    block_linears,
    factorize,
    outputs,
    tiny_albert,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_ids,
    truncated_svd,
)

EVERY_MODEL = [
    pytest.param(tiny_bert, AutoModelForSequenceClassification, id="bert"),
    pytest.param(tiny_albert, AutoModelForSequenceClassification, id="albert"),
    pytest.param(tiny_gpt2, AutoModelForCausalLM, id="gpt2"),
    pytest.param(tiny_llama, AutoModelForCausalLM, id="llama"),
    pytest.param(tiny_t5, AutoModelForSeq2SeqLM, id="t5"),
]


@pytest.fixture
def model() -> Any:
    return factorize(tiny_bert())


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) and expected[key].dtype == found[key].dtype for key in expected)


# The layer


@pytest.mark.parametrize("linear", [nn.Linear(32, 48), nn.Linear(48, 32, bias=False), Conv1D(48, 32)], ids=repr)
def test_full_rank_factors_compute_what_the_linear_computes(linear: nn.Module) -> None:
    layer = LowRankLinear.from_factors(linear, *truncated_svd(dense_weight(linear), 32))
    input = torch.randn(5, dense_weight(linear).shape[1])
    torch.testing.assert_close(layer(input), linear(input))
    torch.testing.assert_close(dense_weight(layer), dense_weight(linear))


def test_a_layer_inherits_everything_but_the_weight() -> None:
    linear = nn.Linear(32, 48, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    up, down = truncated_svd(linear.weight, 4)
    layer = LowRankLinear.from_factors(linear, up, down)
    assert (layer.in_features, layer.out_features, layer.rank, layer.training) == (32, 48, 4, False)
    assert layer.up.weight.dtype == layer.down.weight.dtype == torch.bfloat16
    assert layer.up.weight.is_contiguous()
    assert layer.down.weight.is_contiguous()
    assert not layer.up.weight.requires_grad
    assert not layer.down.weight.requires_grad
    assert layer.bias.requires_grad
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    assert LowRankLinear.like(linear, 4).up.weight.dtype == torch.bfloat16
    assert LowRankLinear.like(nn.Linear(8, 8, bias=False, device="meta"), 2).bias is None


@pytest.mark.parametrize("rank", [-1, 0, 33, 10**12])
def test_ranks_that_do_not_fit_are_refused_before_anything_is_allocated(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} .* between 1 and 32"):
        LowRankLinear.like(nn.Linear(32, 48), rank)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[\[48, 4\], \[5, 32\]\].* takes \[\[48, 4\], \[4, 32\]\]"):
        LowRankLinear.from_factors(nn.Linear(32, 48), torch.zeros(48, 4), torch.zeros(5, 32))
    with pytest.raises(ValueError, match="LayerNorm is not a linear layer"):
        dense_weight(nn.LayerNorm(4))


def test_the_weight_is_multiplied_only_when_its_values_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LowRankLinear(32, 48, 4, dtype=torch.float64)
    products = []
    product = LowRankLinear.product
    monkeypatch.setattr(LowRankLinear, "product", lambda self: products.append(self) or product(self))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device.type, weight.shape, weight.size(0)) == (torch.float64, "cpu", (48, 32), 48)
    assert products == []
    torch.testing.assert_close(weight @ torch.eye(32, dtype=torch.float64), layer.up.weight @ layer.down.weight)
    assert products == [layer]


# Editing a model


def test_the_class_is_swapped_in_place_and_the_callers_config_left_alone() -> None:
    config = tiny_bert().config
    before = copy.deepcopy(config.to_dict())
    model = BertForSequenceClassification(config)
    assert to_low_rank_class(model) is model
    assert to_low_rank_class(model) is model
    assert type(model).__name__ == "LowRankBertForSequenceClassification"
    assert isinstance(model, BertForSequenceClassification)
    assert type(model.config).__name__ == "LowRankBertConfig"
    assert isinstance(model.config, BertConfig)
    assert model.bert.config is model.config
    assert model.bert.encoder.layer[0].attention.self.config is model.config
    assert type(config) is BertConfig
    assert config.to_dict() == before
    assert not hasattr(config, "ranks")
    assert model.config.ranks == model.lowrank_ranks == {}
    assert model.config.model_type == "bert"
    assert model.config.base_model_type == "bert"


def test_ranks_are_those_of_the_layers(model: Any) -> None:
    assert model.lowrank_ranks == model.config.ranks == dict.fromkeys(block_linears(tiny_bert()), RANK)
    dense = tiny_bert()
    saved = sum(i * o - RANK * (i + o) for i, o in [(HIDDEN, HIDDEN)] * 8 + [(HIDDEN, WIDE)] * 4)
    assert dense.num_parameters() - model.num_parameters() == saved


@pytest.mark.parametrize("foreign", [nn.Linear(2, 2), type("Mine", (BertForSequenceClassification,), {})], ids=repr)
def test_models_from_elsewhere_are_refused(foreign: Any) -> None:
    model = foreign if isinstance(foreign, nn.Module) else foreign(tiny_bert().config)
    with pytest.raises(ValueError, match=r"Only transformers models|is defined in .* and not in transformers"):
        to_low_rank_class(model)


def test_a_shared_module_is_replaced_everywhere_and_stays_shared(tmp_path: Path) -> None:
    model = factorize(tiny_albert())
    (group,) = model.albert.encoder.albert_layer_groups
    assert isinstance(group.albert_layers[0].ffn, LowRankLinear)
    two_names = nn.ModuleDict({"one": nn.Linear(8, 8)})
    two_names["other"] = two_names["one"]
    replace_module(two_names, "other", new := LowRankLinear(8, 8, 2))
    assert two_names["one"] is new
    assert two_names["other"] is new
    with pytest.raises(ValueError, match="no module called 'third'"):
        replace_module(two_names, "third", new)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = factorize(tiny_gpt2())
    with pytest.raises(ValueError, match=r"lm_head cannot be replaced: its weight is tied"):
        replace_module(model, "lm_head", LowRankLinear.like(model.lm_head, 4))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_model_built_from_a_config_is_initialized_like_its_base(model: Any) -> None:
    torch.manual_seed(0)
    built = AutoModelForSequenceClassification.from_config(model.config)
    assert built.lowrank_ranks == model.lowrank_ranks
    layer = built.bert.encoder.layer[0].intermediate.dense
    assert 0.015 < dense_weight(layer).std() < 0.025  # initializer_range is 0.02
    assert layer.bias.abs().max() == 0


def test_the_tensor_parallel_plan_shards_the_factors() -> None:
    some = ["model.layers.0.mlp.up_proj", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]
    config = factorize(tiny_llama(), names=some).config
    plan = AutoModelForCausalLM.from_config(config).tp_plan
    assert plan["model.layers.*.mlp.down_proj.down"] == "rowwise"
    assert plan["model.layers.*.mlp.down_proj.up"] == plan["model.layers.*.mlp.up_proj.down"] == "replicate"
    assert plan["model.layers.*.mlp.up_proj.up"] == plan["model.layers.*.mlp.up_proj"] == "colwise"  # layer 1 is dense


# Round trips


@pytest.mark.parametrize(("make", "auto_class"), EVERY_MODEL)
def test_a_round_trip_is_exact(make: Any, auto_class: Any, tmp_path: Path) -> None:
    model = factorize(make())
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert loaded.lowrank_ranks == model.lowrank_ranks
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_tensors(model, loaded)
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), expected)


def test_a_round_trip_is_exact_in_shards_in_bfloat16_on_a_device_map_and_from_a_subfolder(tmp_path: Path) -> None:
    model = factorize(tiny_bert().to(torch.bfloat16))
    model.save_pretrained(tmp_path / "sub", max_shard_size="10KB")
    assert len(list((tmp_path / "sub").glob("model-*.safetensors"))) > 2
    auto_class = AutoModelForSequenceClassification
    for loaded in (
        auto_class.from_pretrained(tmp_path / "sub"),
        auto_class.from_pretrained(tmp_path / "sub", device_map="cpu"),
        auto_class.from_pretrained(tmp_path, subfolder="sub"),
        auto_class.from_pretrained(tmp_path / "sub", config=AutoConfig.from_pretrained(tmp_path / "sub")),
    ):
        assert loaded.bert.encoder.layer[0].output.dense.up.weight.dtype == torch.bfloat16
        assert_same_tensors(model, loaded)


def test_layers_offloaded_to_disk_load_and_compute_the_same(model: Any, folder: Path, tmp_path: Path) -> None:
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.bert.encoder.layer[0].output.dense.up.weight.device.type == "meta"
    assert torch.equal(outputs(loaded), outputs(model))


def test_on_disk_the_model_is_low_rank_and_in_memory_its_base(model: Any, folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    assert (written["model_type"], written["base_model_type"]) == ("lowrank", "bert")
    assert written["lowrank_format_version"] == 1
    assert written["architectures"] == ["LowRankBertForSequenceClassification"]
    assert written["ranks"] == model.lowrank_ranks
    config = AutoConfig.from_pretrained(folder)
    assert type(config).__name__ == "LowRankBertConfig"
    assert config.model_type == "bert"
    assert not hasattr(config, "lowrank_format_version")
    assert config.ranks == model.lowrank_ranks
    assert AutoConfig.from_pretrained(folder, num_labels=5).num_labels == 5


def test_what_was_loaded_saves_the_same_files_again(folder: Path, tmp_path: Path) -> None:
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert to_low_rank_class(loaded) is loaded
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", *configuration.SOURCE_FILES):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_body_alone_can_be_saved(model: Any, tmp_path: Path) -> None:
    model.bert.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert len(body.lowrank_ranks) == 12
    assert torch.equal(outputs(body), outputs(model.bert))


def test_default_fields_of_the_base_config_survive(tmp_path: Path) -> None:
    config_class_for(type(tiny_t5().config))(d_model=HIDDEN).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.is_encoder_decoder
    assert config.ranks == {}
    assert config.d_model == HIDDEN


def test_a_push_uploads_the_source_files(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: set[str] = set()
    monkeypatch.setattr(modeling, "add_companions", lambda *args: None)
    monkeypatch.setattr(modeling, "commit_files", lambda paths, *args: uploaded.update(paths))
    model.save_pretrained(str(folder), push_to_hub=True, repo_id="me/model")  # over the files of an earlier save
    assert {"config.json", "model.safetensors", *configuration.SOURCE_FILES} <= uploaded


# Another head


def test_auto_model_takes_the_body_of_a_classifier(model: Any, folder: Path) -> None:
    body, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(body).__name__ == "LowRankBertModel"
    assert not info["missing_keys"]
    assert torch.equal(outputs(body), outputs(model.bert))


def test_a_classifier_takes_the_body_of_an_auto_model(model: Any, folder: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "body")
    other, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert_same_tensors(other.bert, model.bert)


@pytest.mark.parametrize("auto_class", [AutoModelForTokenClassification, AutoModelForMaskedLM])
def test_a_head_without_the_factorized_pooler_loads_as_its_base_does(auto_class: Any, tmp_path: Path) -> None:
    names = [*block_linears(tiny_bert()), "bert.pooler.dense"]
    factorize(tiny_bert(), names=names).save_pretrained(tmp_path / "lowrank")
    tiny_bert().save_pretrained(tmp_path / "dense")
    _, expected = auto_class.from_pretrained(tmp_path / "dense", output_loading_info=True)
    other, found = auto_class.from_pretrained(tmp_path / "lowrank", output_loading_info=True)
    assert found["missing_keys"] == expected["missing_keys"]
    assert len(other.lowrank_ranks) == 12


# Bad checkpoints


def test_missing_factors_are_an_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.down.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for auto_class in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(ValueError, match=r"layer\.1\.output\.dense has rank 8 .*lacks .*\[8, 64\].*download"):
            auto_class.from_pretrained(folder)


@pytest.mark.parametrize("ignore", [False, True])
def test_factors_of_another_rank_are_an_error(folder: Path, model: Any, ignore: bool) -> None:
    edit_config(folder, ranks=model.lowrank_ranks | {"bert.encoder.layer.1.output.dense": 4})
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense has rank 4 .*\[4, 64\], but it has \[8, 64\]"):
        AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_factors_that_the_config_does_not_name_are_an_error(folder: Path, model: Any) -> None:
    ranks = model.lowrank_ranks
    del ranks["bert.encoder.layer.1.output.dense"]
    edit_config(folder, ranks=ranks)
    for auto_class in (AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(ValueError, match=r"`ranks` in config\.json does not name .*layer\.1\.output\.dense"):
            auto_class.from_pretrained(folder)


def test_dense_weights_under_a_low_rank_config_are_an_error(folder: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has rank 8 in config\.json, but the checkpoint lacks"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_module_that_the_model_does_not_have_is_an_error(folder: Path, model: Any) -> None:
    edit_config(folder, ranks=model.lowrank_ranks | {"bert.encoder.layer.9.output.dense": 4})
    with pytest.raises(ValueError, match=r"names 'bert\.encoder\.layer\.9\.output\.dense', which LowRankBert"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_renamed_body_is_an_error_for_another_head_too(folder: Path, model: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {key.replace("bert.encoder.layer.1.", "bert.encoder.block.1."): value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    ranks = {name.replace("layer.1.", "block.1."): rank for name, rank in model.lowrank_ranks.items()}
    edit_config(folder, ranks=ranks)
    with pytest.raises(ValueError, match=r"names 'bert\.encoder\.block\.1\..* that names its modules otherwise"):
        AutoModel.from_pretrained(folder)


def test_a_rank_that_the_module_cannot_have_is_an_error(folder: Path, model: Any) -> None:
    edit_config(folder, ranks=model.lowrank_ranks | {"bert.encoder.layer.1.output.dense": 10**12})
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense: rank 1000000000000 .* between 1 and 32"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    edit_config(folder, ranks=model.lowrank_ranks | {"bert.embeddings.LayerNorm": 4})
    with pytest.raises(ValueError, match="embeddings.LayerNorm: LayerNorm is not a linear layer"):
        AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"a.b": 0}, "'a.b' the rank 0"),
        ({"a.b": -3}, "'a.b' the rank -3"),
        ({"a.b": 2.5}, r"'a.b' the rank 2\.5"),
        ({"a.b": "8"}, "'a.b' the rank '8'"),
        ({"a.b": True}, "'a.b' the rank True"),
        ({"": 8}, "the key ''"),
        (["a.b"], r"maps module names to ranks, but it is \['a\.b'\]"),
    ],
)
def test_bad_ranks_in_a_config_are_an_error(folder: Path, ranks: Any, message: str) -> None:
    edit_config(folder, ranks=ranks)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        LowRankConfig.from_json_file(folder / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowrank_format_version": 2}, "low-rank format 2, and this code reads up to 1: upgrade"),
        ({"lowrank_format_version": "new"}, "`lowrank_format_version` is 'new'"),
        ({"base_model_type": "no_such"}, "does not know 'no_such': upgrade transformers"),
        ({"base_model_type": None}, "does not know None"),
    ],
)
def test_a_config_that_this_code_cannot_read_is_an_error(folder: Path, changes: Any, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder)


def test_a_save_that_breaks_off_does_not_load_as_something_else(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "no_weights")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModel.from_pretrained(tmp_path / "no_weights")
    monkeypatch.setattr(configuration.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "no_code")
    assert list((tmp_path / "no_code").iterdir()) == []


# In use


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def test_pipelines_take_the_folder(model: Any, folder: Path, tokenizer: BertTokenizer) -> None:
    tokenizer.save_pretrained(folder)
    classify = pipeline("text-classification", model=str(folder))
    assert type(classify.model) is type(model)
    (found,) = classify("w1 w2 w3")
    expected = outputs(model, **tokenizer("w1 w2 w3", return_tensors="pt")).softmax(-1).max()
    assert found["score"] == pytest.approx(expected.item(), abs=1e-6)


def test_a_tokenizer_without_a_class_is_found_by_the_base_architecture(folder: Path, tokenizer: BertTokenizer) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tokenizer_class"}))
    found = AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(tokenizer)
    assert found("w1")["input_ids"] == tokenizer("w1")["input_ids"]


def train(model: Any, directory: Path, max_steps: int, **arguments: Any) -> Trainer:
    rows = [{"input_ids": token_ids(i, 1)[0], "labels": i % 2} for i in range(16)]
    resume = arguments.pop("resume_from_checkpoint", None)
    settings = TrainingArguments(
        str(directory),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_trainer_trains_resumes_and_its_checkpoints_load(tmp_path: Path) -> None:
    whole = train(factorize(tiny_bert()), tmp_path / "whole", 4).model
    start = factorize(tiny_bert())
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), start.parameters(), strict=True))
    train(start, tmp_path / "halves", 2)
    checkpoint = tmp_path / "halves" / "checkpoint-2"
    resumed = train(factorize(tiny_bert()), tmp_path / "halves", 4, resume_from_checkpoint=str(checkpoint)).model
    assert_same_tensors(whole, resumed)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "halves" / "checkpoint-4")
    assert_same_tensors(whole, loaded)


def test_gradient_checkpointing_gives_the_same_gradients(model: Any) -> None:
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    for one in (model.train(), checkpointed.train()):
        torch.manual_seed(0)  # dropout
        one(input_ids=token_ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    for one, other in zip(model.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert model.bert.encoder.layer[0].output.dense.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_t5])
def test_generation_with_a_cache_equals_generation_without(make: Any) -> None:
    model = factorize(make())
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(token_ids(), use_cache=True, **settings)
    assert torch.equal(cached, model.generate(token_ids(), use_cache=False, **settings))
    assert cached.shape[1] >= 8


def test_copies_and_pickles_are_models_of_their_own(model: Any) -> None:
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert type(other.config) is type(model.config)
        assert torch.equal(outputs(other), expected)
        other.bert.encoder.layer[0].output.dense.up.weight.data.zero_()
        assert torch.equal(outputs(model), expected)


@pytest.mark.slow
def test_compiled_and_exported_models_compute_the_same(model: Any) -> None:
    ids, expected = token_ids(), outputs(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits
        exported = torch.export.export(model, (ids,)).module()(ids).logits
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)


@pytest.mark.parametrize("targets", [["up", "down"], "all-linear"])
def test_adapters_train_and_merge_into_the_factors(model: Any, targets: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS"))
    layer = adapted.base_model.model.bert.encoder.layer[0].output.dense
    assert isinstance(layer, LowRankLinear)
    assert isinstance(layer.up, peft.tuners.lora.Linear)
    nn.init.normal_(layer.up.lora_B["default"].weight)
    expected = outputs(adapted)
    up, down = (factor.weight + factor.get_delta_weight("default") for factor in (layer.up, layer.down))
    torch.testing.assert_close(dense_weight(layer), up @ down)
    merged = adapted.merge_and_unload()
    assert type(merged.bert.encoder.layer[0].output.dense.up) is nn.Linear
    torch.testing.assert_close(outputs(merged), expected)
    merged.save_pretrained(tmp_path)
    assert_same_tensors(AutoModelForSequenceClassification.from_pretrained(tmp_path), merged)


def test_adapters_refuse_a_factorized_layer_by_its_old_name(model: Any) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="LowRankLinear"):  # and do not take it for a linear that merging would miss
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))


def test_the_adapters_of_transformers_load_back(model: Any, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(loaded), outputs(model))


def test_modelling_code_that_reads_the_dtype_of_a_linear_works_in_half_precision(tmp_path: Path) -> None:
    model = factorize(tiny_t5())  # T5 keeps `wo` in float32 and casts its input to `wo.weight.dtype`
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    feed_forward = loaded.encoder.block[0].layer[1].DenseReluDense
    assert (feed_forward.wi.weight.dtype, feed_forward.wo.weight.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(outputs(loaded).float(), outputs(model), atol=2e-2, rtol=2e-2)


def test_transformers_gets_the_answers_of_the_base_class(model: Any) -> None:
    base = BertForSequenceClassification
    assert model._get_name() == base.__name__  # Trainer's label smoothing decides by it whether labels are shifted
    assert not type(model).is_custom_code()
    assert type(model)._can_set_attn_implementation() == base._can_set_attn_implementation()
    assert not type(model).can_generate()
    assert type(factorize(tiny_gpt2())).can_generate()
    assert model.loss_type == tiny_bert().loss_type


def test_every_auto_class_knows_every_head_by_a_name_that_can_be_looked_up(model: Any) -> None:
    found = 0
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or BertConfig not in mapping:
            continue
        low_rank = mapping[type(model.config)]
        assert low_rank.base_model_class is mapping[BertConfig]
        assert getattr(modeling, low_rank.__name__) is low_rank
        found += 1
    assert found == len(auto_map_of(type(model), model.config)) - 1 > 5
    assert configuration.LowRankBertConfig is type(model.config)
    with pytest.raises(AttributeError, match="LowRankNoSuchModel"):
        _ = modeling.LowRankNoSuchModel
