"""Stacked experts: taken apart and put together, measured, factorized, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MuseSparkTextConfig,
    MuseSparkTextModel,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.compression.memory import statistics_bytes
from hf_lowrank.compression.profiling import profile_losses
from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.densify import densify
from hf_lowrank.folder.export import export_onnx
from hf_lowrank.folder.picture import ranks_figure
from hf_lowrank.folder.verify import FAIL, verify
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.model.targets import Target, find_targets, unstacked
from hf_lowrank.nn.editing_lowrank import replace_module, replaced
from hf_lowrank.nn.experts_lowrank import UnstackedExperts, is_stacked, projections, restack
from hf_lowrank.nn.layers_lowrank import LowRankLinear, dense_weight, with_weight
from hf_lowrank.nn.modeling_lowrank import LowRankMixin, to_low_rank_class
from hf_lowrank.statistics import Statistics, compute_statistics
from tests.helpers import VOCABULARY, modules_of, token_ids, truncated_svd
from tests.nn.test_remote_code import WITHOUT_LIBRARY, runs_to_its_end

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"vocab_size": VOCABULARY, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = ("fisher", "fisher_rows", "activation_moment", "gradient_moment", "active_tokens")
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def mixtral(layers: int = 2) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_hidden_layers=layers, intermediate_size=24, num_local_experts=4)
    return MixtralForCausalLM(config).eval()


def qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=24, num_experts=4)
    return Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> GptOssForCausalLM:
    """Weights stored transposed, with biases, gate and up interleaved; expert 3 is never chosen in the first block."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_hidden_layers=2, intermediate_size=24, num_local_experts=4))
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj_bias.normal_()
            layer.mlp.experts.down_proj_bias.normal_()
    return model.eval()


def nemotron() -> NemotronHForCausalLM:
    """Experts without a gate."""
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 16}
    groups = {"n_group": 1, "topk_group": 1, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1}
    config = NemotronHConfig(**SIZES | experts | groups, layers_block_type=["attention", "moe"])
    return NemotronHForCausalLM(config).eval()


def muse_spark() -> MuseSparkTextModel:
    """A norm after each expert."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 48, "moe_intermediate_size": 24, "moe_hidden_size": 32}
    config = MuseSparkTextConfig(**SIZES | sizes, num_local_experts=4, mlp_layer_types=["sparse", "sparse"])
    return MuseSparkTextModel(config).eval()


MODELS = [mixtral, qwen, gpt_oss, nemotron, muse_spark]
LANGUAGE_MODELS = [mixtral, qwen, gpt_oss, nemotron]


def stacks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_stacked(module)]


def expert_targets(model: PreTrainedModel) -> dict[str, Target]:
    return find_targets(model, include=["*.experts.*_proj.*"])


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids())[0]


def batches(size: int) -> list[dict[str, Tensor]]:
    ids = token_ids(batch=6)
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# -- taken apart and put together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_unstacked_experts_compute_what_the_stack_does(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    expected = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        expected[implementation] = output(model)
    before, experts = copied(model), stacks(model)
    targets = expert_targets(model)
    assert len(targets) == 8 * len(experts) > 0
    with unstacked(model, targets):
        assert not stacks(model)
        assert all(model.get_submodule(name) is layer for name, layer in modules_of(targets).items())
        found = output(model)
    assert torch.equal(found, expected["eager"])
    torch.testing.assert_close(found, expected["grouped_mm"])
    torch.testing.assert_close(found, expected["batched_mm"])
    assert stacks(model) == experts
    assert_unchanged(model, before)


@pytest.mark.parametrize("build", MODELS)
def test_restacked_experts_are_the_original_ones(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    for experts in stacks(model):
        again = restack(UnstackedExperts(experts))
        assert type(again) is type(experts)
        assert is_stacked(again)
        assert [name for name, _ in again.named_parameters()] == [name for name, _ in experts.named_parameters()]
        assert_unchanged(again, copied(experts))
        own = {name: value for name, value in vars(experts).items() if not name.startswith("_")}
        assert {name: vars(again)[name] for name in own} == own
        assert getattr(again, projections(again)[0]).data_ptr() != getattr(experts, projections(experts)[0]).data_ptr()


def test_layers_of_their_own_share_the_memory_of_the_stack() -> None:
    experts = stacks(mixtral())[0]
    layers = UnstackedExperts(experts)
    layers.down_proj[2].weight.data.zero_()
    assert not experts.down_proj[2].any()
    assert experts.down_proj[1].all()
    experts.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in UnstackedExperts(experts).parameters())
    on_meta = UnstackedExperts(copy.deepcopy(experts).to("meta"))
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


def test_numbers_beyond_the_last_expert_stand_for_none() -> None:
    experts = UnstackedExperts(stacks(mixtral())[0])
    states, weights = torch.randn(3, 32), torch.rand(3, 2)
    chosen = torch.tensor([[0, 4], [4, 4], [2, 5]])
    found = experts(states, chosen, weights)
    expected = experts(states, torch.tensor([[0, 0], [0, 0], [2, 2]]), weights * (chosen < 4))
    torch.testing.assert_close(found, expected)
    assert not found[1].any()


def test_half_precision_is_summed_as_by_transformers() -> None:
    model = mixtral().bfloat16()
    model.set_experts_implementation("batched_mm")
    experts = stacks(model)[0]
    states, chosen = torch.randn(64, 32, dtype=torch.bfloat16), torch.arange(4).expand(64, 4)
    arguments = states, chosen, torch.rand(64, 4)  # the routers' weights are in float32
    found, expected = UnstackedExperts(experts)(*arguments), experts(*arguments)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found != expected).float().mean() < 0.02


def test_other_experts_are_left_alone() -> None:
    config = Llama4TextConfig(hidden_size=32, intermediate_size=24, num_local_experts=4)
    assert not is_stacked(Llama4TextExperts(config))
    experts = stacks(mixtral())[0]
    assert is_stacked(experts)
    experts.scale = nn.Parameter(torch.ones(4))
    assert not is_stacked(experts)
    del experts.scale
    experts.down_proj = nn.Parameter(experts.down_proj.mT.contiguous())
    assert not is_stacked(experts)


# -- statistics --------------------------------------------------------------------------------------------------------


def naive(model: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Sums over single samples: the Fisher by the gradient of the stack, moments by the rows that each layer sees."""
    model.set_experts_implementation("eager")
    targets = expert_targets(model)
    sums: dict[str, dict[str, Tensor]] = {kind: dict.fromkeys(targets, torch.zeros(())) for kind in KINDS}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in targets}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            out.retain_grad()
            rows[name].append((args[0].detach(), out))

        return hook

    for batch in batches(1):
        model.zero_grad()
        model(**batch).loss.backward()
        for name in targets:
            stack, number = name.rpartition(".")[::2]
            experts = model.get_submodule(stack.rpartition(".")[0])
            gradient = model.get_parameter(stack).grad[int(number)]
            gradient = gradient.T if experts.is_transposed else gradient
            sums["fisher"][name] = sums["fisher"][name] + gradient.square()
            sums["fisher_rows"][name] = sums["fisher_rows"][name] + gradient.square().sum(dim=0)
        with unstacked(model, targets):
            handles = [layer.register_forward_hook(keep(name)) for name, layer in modules_of(targets).items()]
            model(**batch).loss.backward()
            for handle in handles:
                handle.remove()
    for name, pairs in rows.items():
        for x, out in pairs:
            active = (out.grad != 0).any(dim=1)
            for kind, value in (
                ("activation_moment", x[active].T @ x[active]),
                ("gradient_moment", out.grad.T @ out.grad),
                ("active_tokens", active.sum()),
            ):
                sums[kind][name] = sums[kind][name] + value
    return sums


def assert_measured(found: Statistics, expected: dict[str, dict[str, Tensor]]) -> None:
    for kind, sums in expected.items():
        for name, total in sums.items():
            one = found.sums[kind][name].to(total.dtype)
            torch.testing.assert_close(one, total.expand_as(one), rtol=2e-4, atol=1e-5 * float(total.abs().max()))


@pytest.mark.parametrize("build", LANGUAGE_MODELS)
def test_statistics_are_those_of_single_samples(build: Callable[[], PreTrainedModel]) -> None:
    model = build().train()
    before, modes = copied(model), [module.training for module in model.modules()]
    passes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = compute_statistics(model, batches(3), KINDS, include=["*.experts.*_proj.*"], progress=False)
    handle.remove()
    assert passes == [1, 1, 2, 3, 3]  # the first two samples alone and together, then whole batches
    assert_unchanged(model, before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_measured(found, naive(model.eval()))
    if build is gpt_oss:
        assert not found.reach(f"{GATE_UP}.3")
        assert found.reach(f"{GATE_UP}.2")


def test_experts_that_blocks_share_are_measured_over_all_their_uses() -> None:
    model = mixtral()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    targets = expert_targets(model)
    assert len(targets) == 8
    assert all(name.startswith("model.layers.0.") for name in targets)
    found = compute_statistics(model, batches(3), KINDS, include=["*.experts.*_proj.*"], progress=False)
    assert_measured(found, naive(model.eval()))
    low_rank, _ = compress(model, CompressionConfig("fwsvd", include=("*.experts.*_proj.*",)), found, progress=False)
    assert low_rank.model.layers[1].mlp.experts is low_rank.model.layers[0].mlp.experts


def test_the_model_is_put_back_after_an_error() -> None:
    model = mixtral()
    before, experts = copied(model), stacks(model)
    bad = batches(3)[0] | {"input_ids": torch.full((3, 7), VOCABULARY)}
    with pytest.raises(IndexError):
        compute_statistics(model, [bad], ["fisher"], progress=False)
    assert stacks(model) == experts
    assert_unchanged(model, before)


def test_the_estimate_of_memory_counts_the_sums_of_every_expert() -> None:
    model = mixtral()
    found = compute_statistics(model, batches(3), KINDS, include=["*.experts.*_proj.*"], progress=False)
    tensors = {id(total): total for sums in found.sums.values() for total in sums.values()}
    assert statistics_bytes(expert_targets(model), KINDS) == sum(total.nbytes for total in tensors.values())


# -- compression -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", LANGUAGE_MODELS)
def test_at_full_rank_the_model_is_the_dense_one(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = build()
    expected, original = output(model), copied(model)
    targets = expert_targets(model)
    low_rank: Any = to_low_rank_class(model)
    for name, linear in modules_of(targets).items():
        factors = truncated_svd(dense_weight(linear), min(dense_weight(linear).shape))
        replace_module(low_rank, name, LowRankLinear.from_factors(linear, *factors))
    assert low_rank.config.ranks.keys() == targets.keys()
    torch.testing.assert_close(output(low_rank), expected, rtol=1e-3, atol=1e-4)
    low_rank.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(low_rank))
    dense = densify(loaded)
    assert type(dense) is build().__class__
    assert len(stacks(dense)) == len(stacks(build()))
    after = dense.state_dict()
    assert list(after) == list(original)
    for name, weight in original.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), output(dense))


def test_every_expert_has_a_rank_of_its_own_and_one_that_is_not_reached_stays_dense(tmp_path: Path) -> None:
    model = gpt_oss()
    model.save_pretrained(tmp_path / "dense")
    config = CompressionConfig("kfac", keep=0.5, allocation="greedy", align=1)
    statistics = compute_statistics(model, batches(3), config.needs, progress=False)
    low_rank, report = compress(model, config, statistics, progress=False)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks[f"{GATE_UP}.3"] is None
    assert ranks[f"{DOWN}.3"] is None
    assert "no sample reached it" in {layer.note for layer in report.layers}
    assert len({ranks[f"{GATE_UP}.{n}"] for n in range(3)}) > 1
    dense = low_rank.get_submodule(f"{GATE_UP}.3")
    assert type(dense) is nn.Linear
    assert dense.weight.is_contiguous()
    assert dense.weight.untyped_storage().nbytes() == dense.weight.nbytes  # the stack has been freed
    low_rank.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    saved, read = low_rank.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    torch.testing.assert_close(output(loaded), output(low_rank))  # where they lie in memory decides the rounding
    checks = verify(tmp_path / "small", tmp_path / "dense")
    assert not [check for check in checks if check.status == FAIL], checks
    assert len(checks) > 5


def test_a_partly_compressed_model_keeps_its_other_stacks(tmp_path: Path) -> None:
    model = mixtral()
    expected = model.model.layers[1].mlp.experts.gate_up_proj.detach().clone()
    config = CompressionConfig("svd", rank_ratio=0.25, include=(f"{GATE_UP}.[02]", "q_proj"))
    low_rank, _ = compress(model, config, progress=False)
    assert len(low_rank.config.ranks) == 4
    low_rank.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert {f"{GATE_UP}.0.up.weight", f"{GATE_UP}.1.weight", f"{DOWN}.0.weight"} <= keys
    assert "model.layers.1.mlp.experts.gate_up_proj" in keys
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_stacked(loaded.model.layers[1].mlp.experts)
    assert torch.equal(loaded.model.layers[1].mlp.experts.gate_up_proj, expected)
    assert torch.equal(output(loaded), output(low_rank))
    plans = loaded._tp_plan | loaded._ep_plan
    assert "model.layers.*.self_attn.v_proj" in plans
    assert not [name for name in plans if "experts" in name]
    torch.manual_seed(1)
    fresh = type(loaded)(copy.deepcopy(loaded.config))  # random weights, in memory
    fresh.load_state_dict(loaded.state_dict())
    assert torch.equal(output(fresh.eval()), output(low_rank))

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{GATE_UP}.0.up.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj\.0 has rank 8 in config.json, but the checkpoint lacks"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_models_are_saved_whatever_shares_memory(tmp_path: Path) -> None:
    low_rank: Any = to_low_rank_class(gpt_oss())  # whose stacks are transposed
    linear = expert_targets(low_rank)[f"{DOWN}.2"].module
    factors = truncated_svd(dense_weight(linear), 4)
    replace_module(low_rank, f"{DOWN}.2", LowRankLinear.from_factors(linear, *factors))  # the others are still views
    fresh = type(low_rank)(copy.deepcopy(low_rank.config)).eval()
    assert fresh.get_submodule(f"{DOWN}.1").weight.is_contiguous()
    for model in (low_rank, fresh):
        model.save_pretrained(tmp_path)
        assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))


def test_factors_of_experts_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    low_rank, _ = compress(mixtral(), CompressionConfig("svd", include=("*.experts.*",)), progress=False)
    low_rank.save_pretrained(tmp_path)
    config = copy.deepcopy(low_rank.config)
    config.ranks = {name: rank for name, rank in config.ranks.items() if "layers.1" in name}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a factor .* does not name model\.layers\.0\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_that_all_stay_dense_are_the_stack_again() -> None:
    model = mixtral()
    before = copied(model)
    for name in (f"{GATE_UP}.0", f"{GATE_UP}.1"):
        linear = (
            expert_targets(model)[name].module
            if stacks(model)[0] is model.model.layers[0].mlp.experts
            else model.get_submodule(name)
        )
        replace_module(model, name, copy.deepcopy(linear))
    assert len(stacks(model)) == 1
    low_rank, _ = compress(model, CompressionConfig("svd", include=("q_proj",)), progress=False)
    assert len(stacks(low_rank)) == 2
    assert all(torch.equal(low_rank.state_dict()[name], before[name]) for name in before if "experts" in name)


def test_the_interpolative_form_and_a_work_folder_give_the_same_model_again(tmp_path: Path) -> None:
    config = CompressionConfig("fwsvd", rank_ratio=0.4, form="interpolative")
    statistics = compute_statistics(mixtral(), batches(3), config.needs, progress=False)
    once, report = compress(mixtral(), config, statistics, progress=False)
    assert sum(layer.form == "interpolative" for layer in once.factorized_layers().values()) == 24
    assert once.num_parameters() == report.parameters_after
    for resume in (False, True):  # the second time from what the first has left
        work = Work.open(tmp_path / "work", {"seed": 0}, resume=resume)
        again, _ = compress(mixtral(), config, statistics, progress=False, work=work)
        assert torch.equal(output(again), output(once))


def test_profiles_and_analyses_reach_the_stack_and_put_it_back() -> None:
    model = mixtral(layers=1)
    before, expected = copied(model), output(model)
    config = CompressionConfig("svd", include=(f"{DOWN}.*",), align=1)
    profile = profile_losses(model, config, None, batches(3), ratios=(0.1, 0.5), progress=False)
    assert all(any(profile[f"{DOWN}.{n}"].values()) for n in range(4))
    assert_unchanged(model, before)
    targets = expert_targets(model)
    changed = {f"{DOWN}.0": with_weight(targets[f"{DOWN}.0"].module, torch.zeros(32, 24))}
    with unstacked(model, targets), replaced(model, changed):
        assert not torch.allclose(output(model), expected)
    assert_unchanged(model, before)
    assert torch.equal(output(model), expected)


def test_a_picture_has_one_cell_for_the_experts_of_a_block() -> None:
    sizes = {"out": 10, "in": 20}
    layers = {f"layers.0.experts.down_proj.{n}": sizes | {"rank": rank} for n, rank in enumerate((2, 4, None))}
    (axes, _) = ranks_figure(layers).axes
    assert [text.get_text() for text in axes.texts] == ["2–dense · 53%"]


@pytest.mark.slow
def test_a_folder_loads_by_its_own_code(tmp_path: Path) -> None:
    model, _ = compress(gpt_oss(), CompressionConfig("svd", rank_ratio=0.3, exclude=(f"{DOWN}.1",)), progress=False)
    model.save_pretrained(tmp_path / "experts")
    torch.save({"ids": token_ids(), "logits": output(model)}, tmp_path / "expected.pt")
    script = """
model = AutoModelForCausalLM.from_pretrained("experts", trust_remote_code=True)
assert type(model.model.layers[0].mlp.experts).__module__.startswith("transformers_modules.")
assert torch.equal(model(ids).logits, expected["logits"])
for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
    assert torch.equal(other(ids).logits, expected["logits"])
print("done")
"""
    assert runs_to_its_end(WITHOUT_LIBRARY + script, tmp_path)


@pytest.mark.parametrize("budget", [{"flops": "1K"}, {"latency": 0.5}])
def test_arithmetic_and_time_are_no_budgets_for_experts(budget: dict[str, Any]) -> None:
    with pytest.raises(LowRankError, match=r"experts\.gate_up_proj\.0 sees only those routed to it"):
        compress(mixtral(), CompressionConfig("svd", **budget), progress=False)


def test_offloaded_stacks_are_refused_and_can_be_excluded() -> None:
    model = mixtral()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(LowRankError, match=r"experts model\.layers\.0\.mlp\.experts are offloaded"):
        find_targets(model)
    low_rank, _ = compress(model, CompressionConfig("svd", exclude=("*.experts.*",)), progress=False)
    assert isinstance(low_rank, LowRankMixin)
    assert len(low_rank.lowrank_ranks) == 8


def test_factorized_experts_are_not_exported(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    low_rank, _ = compress(mixtral(), CompressionConfig("svd"), progress=False)
    low_rank.save_pretrained(tmp_path)
    with pytest.raises(LowRankError, match="experts with layers of their own"):
        export_onnx(tmp_path, tmp_path / "model.onnx")
