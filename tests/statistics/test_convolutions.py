"""Convolutions as linear layers on patches: factors, exact statistics, saving and loading, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks import convolutions
from hf_lowrank import CompressionConfig, LowRankError, compress, compute_statistics
from hf_lowrank.compression.compress import check_possible
from hf_lowrank.compression.memory import estimate_memory
from hf_lowrank.folder.densify import densify
from hf_lowrank.folder.inspect import inspect
from hf_lowrank.folder.saving import save_compressed
from hf_lowrank.folder.verify import verify
from hf_lowrank.model.targets import factorizable_convolutions, find_targets
from hf_lowrank.nn.layers_lowrank import LowRankConv, as_stored, dense_weight
from hf_lowrank.statistics.patches import patches
from tests.helpers import truncated_svd

CONVOLUTIONS = ("convolution",)


SIZES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
SIZES |= {"num_labels": 3}
WIDER = SIZES | {"hidden_sizes": [8, 24]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_resnet() -> t.ResNetForImageClassification:
    torch.manual_seed(0)
    return t.ResNetForImageClassification(t.ResNetConfig(**SIZES)).eval()


def images(batch: int = 3, size: int = 16) -> dict[str, Any]:
    return {"pixel_values": random(batch, 3, size, size), "labels": torch.tensor([0, 2, 1])[:batch]}


def tiny_vit() -> t.ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3)).eval()


def tiny_wav2vec2() -> t.Wav2Vec2ForCTC:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    convs = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (5, 4), "num_feat_extract_layers": 2}
    config = t.Wav2Vec2Config(
        **sizes, **convs, vocab_size=16, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    return t.Wav2Vec2ForCTC(config).eval()


def tiny_whisper() -> t.WhisperForAudioClassification:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32, "num_labels": 3}
    return t.WhisperForAudioClassification(
        t.WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=10, pad_token_id=0)
    ).eval()


MODELS = {
    "ResNet": (tiny_resnet, t.AutoModelForImageClassification, CONVOLUTIONS, images()),
    "ViT": (tiny_vit, t.AutoModelForImageClassification, ("*patch_embeddings.projection", "layers.*"), images()),
    "Whisper": (
        tiny_whisper,
        t.AutoModelForAudioClassification,
        ("conv1", "conv2"),
        {"input_features": random(2, 8, 20), "labels": torch.tensor([0, 2])},
    ),
    "wav2vec 2.0": (
        tiny_wav2vec2,
        t.AutoModelForCTC,
        ("conv_layers.*.conv",),
        {"input_values": random(2, 400), "labels": torch.tensor([[3, 4], [5, 6]])},
    ),
}

GEOMETRIES = {
    "1d, strided": nn.Conv1d(4, 6, 5, stride=3, padding=2),
    "1d, dilated, without bias": nn.Conv1d(4, 6, 3, dilation=2, bias=False),
    "1d, same by an even kernel": nn.Conv1d(4, 6, 4, padding="same"),
    "2d": nn.Conv2d(4, 6, 3, padding=1),
    "2d, patches": nn.Conv2d(4, 6, 2, stride=2, padding="valid"),
    "2d, a stride above the kernel": nn.Conv2d(4, 6, 1, stride=2),
    "2d, nothing square": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 3)),
    "2d, reflected": nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "2d, circular, same": nn.Conv2d(4, 6, (3, 4), padding="same", padding_mode="circular"),
    "2d, replicated": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
    "3d": nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 1), padding=1),
}


@pytest.fixture(params=GEOMETRIES)
def conv(request: pytest.FixtureRequest) -> Any:
    return GEOMETRIES[request.param]


def input_of(conv: Any) -> Tensor:
    return random(2, 4, *(8, 9, 7)[: len(conv.kernel_size)])


# The layer


def test_the_factors_of_a_convolution_are_two_convolutions(conv: Any) -> None:
    x = input_of(conv)
    layer = LowRankConv.from_factors(conv, *truncated_svd(dense_weight(conv), 3))
    assert type(layer.down) is type(layer.up) is type(conv)
    expected = copy.deepcopy(conv)
    expected.weight.data = layer.weight + 0  # formed
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-4, atol=1e-5)
    assert layer.num_parameters() == 3 * (dense_weight(conv).shape[1] + 6)
    assert layer.weight.shape == conv.weight.shape
    assert (layer.weight.dtype, layer.stride, layer.padding) == (torch.float32, conv.stride, conv.padding)
    assert (layer.bias is None) == (conv.bias is None)


def test_at_full_rank_it_is_the_convolution(conv: Any) -> None:
    layer = LowRankConv.from_factors(conv, *truncated_svd(dense_weight(conv), min(dense_weight(conv).shape)))
    torch.testing.assert_close(layer(input_of(conv)), conv(input_of(conv)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(as_stored(conv, layer.product()), conv.weight.detach(), rtol=1e-4, atol=1e-5)


def test_channels_last_and_half_precision_change_nothing_but_rounding() -> None:
    conv = GEOMETRIES["2d"]
    layer = LowRankConv.from_factors(conv, *truncated_svd(dense_weight(conv), 3))
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = input_of(conv).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x), layer(input_of(conv)))
    torch.testing.assert_close(last.product(), layer.product())
    half = LowRankConv.from_factors(copy.deepcopy(conv).bfloat16(), *truncated_svd(dense_weight(conv), 3))
    assert half.weight.dtype == half.down.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)


def test_convolutions_that_cannot_be_factorized_are_refused() -> None:
    for wrong in (nn.Conv2d(4, 4, 3, groups=2), nn.LazyConv2d(4, 3)):
        with pytest.raises(ValueError, match="cannot be factorized: only plain convolutions without groups"):
            LowRankConv(wrong, 1)
    with pytest.raises(ValueError, match="ConvTranspose1d is not a linear layer"):
        LowRankConv.like(nn.ConvTranspose1d(4, 4, 3), 1)
    with pytest.raises(ValueError, match="rank 7 for a convolution of 36 inputs and 6 outputs"):
        LowRankConv.like(GEOMETRIES["2d"], 7)
    with pytest.raises(ValueError, match="a convolution of 36 inputs and 6 outputs takes"):
        LowRankConv.from_factors(GEOMETRIES["2d"], random(6, 3), random(36, 3))


# Statistics


def test_patches_give_the_gradient_of_the_weight(conv: Any) -> None:
    x, conv = input_of(conv), copy.deepcopy(conv)
    output = conv(x)
    g = random(*output.shape, seed=1)
    output.backward(g)
    for layout in (x, x.mT.contiguous().mT):  # the same values in another memory format
        tokens, gradients = patches(conv, layout, g)
        found = torch.einsum("bto,bti->oi", gradients, tokens)
        torch.testing.assert_close(as_stored(conv, found), conv.weight.grad, rtol=1e-4, atol=1e-4)
    outputs = tokens @ dense_weight(conv).T + (0 if conv.bias is None else conv.bias)
    torch.testing.assert_close(outputs, output.flatten(2).mT, rtol=1e-4, atol=1e-5)


def sample_gradients(model: Any, batch: dict[str, Any], names: list[str]) -> dict[str, list[Tensor]]:
    """The gradient of each sample's own loss by the weights [out, in · k], by autograd alone."""
    model = copy.deepcopy(model).eval()
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for n in range(len(batch["labels"])):
        model.zero_grad()
        model(**{key: value[n : n + 1] for key, value in batch.items()}).loss.backward()
        for name in names:
            module = model.get_submodule(name)
            found[name].append(module.weight.grad.reshape(dense_weight(module).shape).clone())
    return found


@pytest.mark.parametrize("family", MODELS)
def test_the_fisher_is_that_of_autograd(family: str) -> None:
    make, _, include, batch = MODELS[family]
    model = make()
    measured = compute_statistics(model, [batch], ["fisher", "fisher_rows"], include=include, progress=False)
    for name, gradients in sample_gradients(model, batch, list(measured.sums["fisher"])).items():
        fisher = sum(gradient.square() for gradient in gradients)
        for kind, expected in (("fisher", fisher), ("fisher_rows", fisher.sum(dim=0))):
            tolerance = {"rtol": 1e-3, "atol": 1e-5 * float(expected.max())}
            torch.testing.assert_close(measured.sums[kind][name], expected, **tolerance)


def called(model: Any, batch: dict[str, Any], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each convolution's input and the gradient of its output, over the sum of all samples' losses."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return keep

    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="sum").backward()
    return {name: (x, output.grad) for name, (x, output) in seen.items()}


def unfolded(conv: Any, x: Tensor) -> Tensor:
    """PyTorch's own patches of images [batch · positions, in · k]."""
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT.flatten(0, 1)


def test_moments_and_kronecker_factors_are_those_of_patches() -> None:
    model, batch = tiny_resnet(), images()
    kinds = ["activation_moment", "activation_magnitude", "activation_mean", "active_tokens", "gradient_moment"]
    measured = compute_statistics(
        model, [batch], [*kinds, "kronecker_in", "kronecker_out"], include=CONVOLUTIONS, progress=False
    )
    names = list(measured.sums["activation_moment"])
    gradients = sample_gradients(model, batch, names)
    assert len(names) == len(factorizable_convolutions(model)) == 8
    for name, (x, g) in called(model, batch, names).items():
        outputs = g.flatten(2).mT.flatten(0, 1)
        active = (outputs != 0).any(dim=1)  # rectifiers switch some positions off
        inputs = unfolded(model.get_submodule(name), x)[active]
        out, in_ = (measured.mean(kind, name) for kind in ("kronecker_out", "kronecker_in"))
        expected = {
            "activation_moment": inputs.T @ inputs,
            "activation_magnitude": inputs.abs().sum(dim=0),
            "activation_mean": inputs.sum(dim=0),
            "active_tokens": active.sum().float(),
            "gradient_moment": outputs.T @ outputs,
        }
        if in_.norm() >= out.norm():  # the newer one
            expected["kronecker_in"] = sum(each.T @ (out / out.norm()) @ each for each in gradients[name])
        else:
            expected["kronecker_out"] = sum(each @ (in_ / in_.norm()) @ each.T for each in gradients[name])
        for kind, total in expected.items():
            found = measured.sums[kind][name]
            torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-5 * float(total.max()))


class Small(t.PreTrainedModel):
    """Images → classes by two convolutions which read the same input, one of them called in several ways."""

    config_class = t.PreTrainedConfig

    def __init__(self, way: str) -> None:
        super().__init__(t.PreTrainedConfig(num_labels=3))
        self.way = way
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, stride=2)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        if self.way == "twice":
            h = self.conv(self.conv(pixel_values).relu()[..., ::2])
        elif self.way == "without a batch dimension":
            h = torch.stack([self.conv(image) for image in pixel_values])
        else:
            h = self.conv(pixel_values)
        logits = h.tanh().mean((2, 3)) + self.other(pixel_values).tanh().mean((2, 3))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return t.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("way", ["once", "twice", "without a batch dimension"])
def test_a_convolution_may_be_called_in_any_way(way: str) -> None:
    torch.manual_seed(0)
    model, batch = Small(way), images()
    kinds = ["fisher", "activation_moment"]
    found = compute_statistics(model, [batch], kinds, include=["conv", "other"], progress=False).sums
    for name, gradients in sample_gradients(model, batch, ["conv", "other"]).items():
        torch.testing.assert_close(found["fisher"][name], sum(g.square() for g in gradients), rtol=1e-3, atol=1e-6)
    inputs = unfolded(model.conv, batch["pixel_values"])  # of the same tensor, with another stride
    if way != "twice":
        torch.testing.assert_close(found["activation_moment"]["conv"], inputs.T @ inputs, rtol=1e-4, atol=1e-3)
    inputs = unfolded(model.other, batch["pixel_values"])
    torch.testing.assert_close(found["activation_moment"]["other"], inputs.T @ inputs, rtol=1e-4, atol=1e-3)


# Compression


def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_compressed_saved_and_loaded_and_made_dense_again(family: str, tmp_path: Path) -> None:
    make, auto_class, include, batch = MODELS[family]
    model = make()
    config = CompressionConfig("svd", 0.3, include=include, allocation="uniform")
    low_rank, report = compress(copy.deepcopy(model), config, progress=False)
    convs = {name: layer for name, layer in low_rank.factorized_layers().items() if isinstance(layer, LowRankConv)}
    assert convs
    assert low_rank.num_parameters() == report.parameters_after < report.parameters_before
    low_rank.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(low_rank)
    assert loaded.config.ranks == report.ranks
    assert torch.equal(outputs(loaded, batch), outputs(low_rank, batch))
    expected = outputs(low_rank, batch)
    for name, layer in inspect(str(tmp_path))["layers"].items():
        assert (layer["out"], layer["in"]) == dense_weight(model.get_submodule(name)).shape
    dense = densify(loaded)
    assert type(dense) is type(model)
    assert all(repr(dense.get_submodule(name)) == repr(model.get_submodule(name)) for name in convs)
    assert dense.num_parameters() == model.num_parameters()
    torch.testing.assert_close(outputs(dense, batch), expected, rtol=1e-3, atol=1e-4)


def test_a_base_class_may_write_to_the_bias_of_every_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rates = {"downsampling_ratios": [2, 2], "upsampling_ratios": [2, 2], "codebook_size": 16, "codebook_dim": 8}
    acoustic = t.DacConfig(encoder_hidden_size=8, decoder_hidden_size=32, hidden_size=16, n_codebooks=2, **rates)
    convs = {"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2}
    convs |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    configs = {"acoustic_model_config": acoustic, "semantic_model_config": t.HubertConfig(**sizes, **convs)}
    codec = t.XcodecModel(t.XcodecConfig(**configs, codebook_size=16, codebook_dim=32, target_bandwidths=[1.0]))
    config = CompressionConfig("svd", keep=0.5, include=("acoustic_encoder.*",))
    low_rank, report = compress(codec, config, progress=False)
    assert report.ranks
    low_rank.save_pretrained(tmp_path)
    loaded = t.AutoModel.from_pretrained(tmp_path)
    found, expected = loaded.state_dict(), low_rank.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert type(loaded)(loaded.config).state_dict().keys() == expected.keys()  # with random weights


def test_a_folder_is_verified_against_the_dense_model(tmp_path: Path) -> None:
    model = tiny_resnet()
    model.save_pretrained(tmp_path / "dense")
    low_rank, report = compress(model, CompressionConfig("svd", 0.3, include=CONVOLUTIONS), progress=False)
    save_compressed(low_rank, None, report, tmp_path / "small")
    outcomes = {check.name: check.status for check in verify(tmp_path / "small", tmp_path / "dense")}
    assert outcomes["layers' errors as recorded"] == outcomes["other weights unchanged"] == "PASS"
    assert "FAIL" not in outcomes.values()
    wrong = t.ResNetForImageClassification(t.ResNetConfig(**WIDER))
    wrong.save_pretrained(tmp_path / "wrong")
    outcomes = {check.name: check.status for check in verify(tmp_path / "small", tmp_path / "wrong")}
    assert outcomes["same architecture"] == "FAIL"


def test_svd_attains_the_optimum_of_the_matrix() -> None:
    model = tiny_resnet()
    weights = {name: dense_weight(conv).detach() for name, conv in factorizable_convolutions(model).items()}
    low_rank, report = compress(model, CompressionConfig("svd", 0.5, "uniform", include=CONVOLUTIONS), progress=False)
    assert report.ranks
    for name, rank in report.ranks.items():
        error = (weights[name] - low_rank.get_submodule(name).product()).square().sum()
        torch.testing.assert_close(error, torch.linalg.svdvals(weights[name])[rank:].square().sum())


@pytest.mark.parametrize("method", ["fwsvd", "tfwsvd", "kfac", "gfwsvd", "whiten-diag", "ekfac"])
def test_every_method_factorizes_convolutions(method: str) -> None:
    model, batch = tiny_resnet(), images()
    config = CompressionConfig(method, 0.5, include=CONVOLUTIONS)
    statistics = compute_statistics(model, [batch], config.needs, include=CONVOLUTIONS, progress=False)
    low_rank, report = compress(model, config, statistics, progress=False)
    assert low_rank.num_parameters() == report.parameters_after < report.parameters_before
    assert all(0 < layer.weighted_error < 1 for layer in report.layers if layer.rank)


def test_a_checkpoint_without_its_factors_is_refused(tmp_path: Path) -> None:
    low_rank, report = compress(tiny_resnet(), CompressionConfig("svd", 0.3, include=CONVOLUTIONS), progress=False)
    name = next(iter(report.ranks))
    del low_rank.config.ranks[name]
    low_rank.describe_layers = lambda: None
    low_rank.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not name {name}, which would get random weights"):
        t.AutoModelForImageClassification.from_pretrained(tmp_path)


def test_adapters_and_the_compiler_take_the_factors_for_convolutions() -> None:
    low_rank, report = compress(tiny_resnet(), CompressionConfig("svd", 0.3, include=CONVOLUTIONS), progress=False)
    expected = outputs(low_rank, images())
    compiled = torch.compile(copy.deepcopy(low_rank), backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, images()), expected)
    adapted = get_peft_model(low_rank, LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    changed = outputs(adapted, images())
    assert not torch.allclose(changed, expected)
    name = next(iter(report.ranks))
    with pytest.raises(ValueError, match="merge its adapters before its weight is read"):
        adapted.base_model.model.get_submodule(name).product()
    with pytest.raises(LowRankError, match="quantized or wrapped"):
        densify(adapted.base_model.model)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged, images()), changed, rtol=1e-3, atol=1e-5)


# Targets and refusals


def test_convolutions_are_targets_only_by_name_and_only_if_plain() -> None:
    model = tiny_vit()
    assert all(type(target.module) is nn.Linear for target in find_targets(model).values())
    assert list(find_targets(model, ["projection"])) == ["vit.embeddings.patch_embeddings.projection"]
    speech = tiny_wav2vec2()  # its positions are a grouped convolution with a weight norm
    assert [name.rpartition(".")[0][-1] for name in factorizable_convolutions(speech)] == ["0", "1"]
    resnet: Any = tiny_resnet()
    assert len(factorizable_convolutions(resnet)) == 8
    first, second = (layer.layer[0] for layer in resnet.resnet.encoder.stages[1].layers)
    parametrizations.weight_norm(first.convolution)
    nn.utils.weight_norm(second.convolution)
    resnet.resnet.embedder.embedder.convolution = nn.Conv2d(3, 8, 7, stride=2, padding=3, groups=1).requires_grad_()
    resnet.resnet.encoder.stages[0].layers[0].layer[0].convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    resnet.resnet.encoder.stages[0].layers[0].layer[1].convolution = nn.ConvTranspose2d(8, 8, 3, padding=1)
    assert len(factorizable_convolutions(resnet)) == 4
    resnet.called = [resnet.resnet.embedder.embedder.convolution]  # from a list, where a replacement would not be seen
    assert len(factorizable_convolutions(resnet)) == 3


def test_a_convolutional_network_says_what_include_would_do() -> None:
    expected = "no linear layer to factorize inside of a block: .* by name, from 1 linear layer, 8 convolutions"
    with pytest.raises(LowRankError, match=expected):
        find_targets(tiny_resnet())
    with pytest.raises(LowRankError, match="'conv1' matches none of the 1 linear layer, 8 convolutions"):
        find_targets(tiny_resnet(), ["conv1"])


def test_what_convolutions_cannot_have_is_refused() -> None:
    model = tiny_resnet()
    state = str(model)
    for budget in ({"flops": "1M"}, {"latency": 0.5}):
        config = CompressionConfig("svd", **budget, include=CONVOLUTIONS)
        with pytest.raises(LowRankError, match="depends on the size of its input, .* give keep, keep_model, params"):
            compress(model, config, progress=False)
        with pytest.raises(LowRankError, match="depends on the size of its input"):
            check_possible(model, config)
    check_possible(model, CompressionConfig("svd", keep=0.5, include=CONVOLUTIONS))
    with pytest.raises(LowRankError, match="interpolative form is for linear layers"):
        compress(model, CompressionConfig("svd", 0.3, form="interpolative", include=CONVOLUTIONS), progress=False)
    assert str(model) == state


def test_the_memory_of_patches_is_counted() -> None:
    model = tiny_resnet()
    pointwise = estimate_memory(model, ["fisher"], ["shortcut.convolution"], tokens=10_000)
    embedder = estimate_memory(model, ["fisher"], ["embedder.convolution"], tokens=10_000)
    # per position: what is read and given twice over, and the patches of 3 × 7 × 7 or 8 inputs
    assert embedder.workspace - pointwise.workspace == pytest.approx(
        10_000 * 4 * (2 * (3 + 8 - 8 - 16) + 3 * 49 - 8), rel=0.05
    )


# The benchmark


def test_the_benchmark_scores_compressed_digit_classifiers() -> None:
    training, test = convolutions.digits()
    assert [len(half["labels"]) for half in (training, test)] == [898, 899]
    few = {key: value[:128] for key, value in training.items()}
    model: Any = convolutions.train(few, epochs=8)
    assert convolutions.accuracy(convolutions.normalised(model, few), few) > 50
    norm, first = model.resnet.embedder.embedder.normalization, model.resnet.embedder.embedder.convolution
    with torch.no_grad():
        torch.testing.assert_close(norm.running_mean, first(few["pixel_values"]).mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
