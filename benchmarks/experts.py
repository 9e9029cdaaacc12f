"""A small Mixtral trained here → its scores when only its experts are factorized, and what that does to their speed."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, set_seed
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.harness import Options, Result, Row, alternate, milliseconds, ratio, repeats_for, steady_clock
from hf_lowrank import CompressionConfig, compress
from hf_lowrank.jobs.progress import bar
from hf_lowrank.nn.experts_lowrank import UnstackedExperts
from hf_lowrank.nn.layers_lowrank import LowRankLinear
from hf_lowrank.statistics import Statistics, compute_statistics

SEED = 0
# The language: sentences of one of several topics, each with a Markov chain of its own, known by its first word.
TOPICS, WORDS, SUCCESSORS, LENGTH = 16, 128, 16, 33
ASKED = 4  # topics of the task: the model was trained on all, as a pretrained one knows more than its task needs
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_local_experts": 8}
SHAPE |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
STEPS, BATCH, LEARNING_RATE = 1200, 32, 3e-3
STATISTICS_SAMPLES, TEST_SAMPLES = 512, 1024
EXPERTS = ("*.experts.*_proj.*",)
RUNS = (("svd", "uniform"), ("fwsvd", "uniform"), ("tfwsvd", "uniform"), ("kfac", "uniform"), ("kfac", "greedy"))
RANK_RATIOS = (0.5, 0.33, 0.2, 0.1)

# Speed: one block's experts at a size where arithmetic counts.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2}
TOKENS, SPEED_RATIOS = (16, 256, 2048), (0.33, 0.2)


def run(options: Options) -> Result:
    """The rise of the loss by method and ratio, and the time of experts in every form."""
    language = make_language()
    model = train(language)
    test = sentences(language, TEST_SAMPLES, seed=1, topics=ASKED)
    dense = loss_of(model, test)
    needs = tuple({need for method, _ in RUNS for need in CompressionConfig(method, allocation=_).needs})
    statistics = _statistics(model, sentences(language, STATISTICS_SAMPLES, seed=2, topics=ASKED), needs)
    rows, figures = [], {}
    for method, allocation in RUNS:
        row = {"method": f"{method} {allocation}"}
        for rank_ratio in RANK_RATIOS:
            config = CompressionConfig(method, rank_ratio, allocation, include=EXPERTS, align=1)
            small, report = compress(copy.deepcopy(model), config, statistics, progress=False)
            rise = loss_of(small, test) - dense
            ranks = [layer.rank for layer in report.layers if layer.rank is not None]
            row[f"{rank_ratio:.0%} of the ranks"] = f"{rise:+.3f}" + _range(ranks, allocation)
            figures[f"{method} {allocation} {rank_ratio}"] = {"rise": rise, "parameters": report.parameters_after}
        rows.append(row)
    speed, seconds = _speed(options.rounds)
    notes = [
        f"The rise of the cross-entropy in nats per word, on {TEST_SAMPLES} new sentences of {ASKED} of the {TOPICS} "
        f"topics that the model was trained on; statistics are of those {ASKED} too. Dense {dense:.3f}, by the "
        f"language itself {entropy(language):.3f}, without a model {np.log(WORDS):.3f}. Only the {len(report.layers)} "
        "projections of the experts are factorized, without fine-tuning; in brackets the range of their ranks.",
        "",
        Result("experts: the speed of one block's, over that of the stack run eagerly", speed).markdown(),
    ]
    return Result(
        f"experts: a Mixtral of {SHAPE['num_local_experts']} experts a block, {model.num_parameters():,} parameters",
        rows,
        notes,
        {"dense": dense, "models": figures, "seconds": seconds},
    )


def make_language() -> tuple[np.ndarray, np.ndarray]:
    """For every topic and word its possible successors [topics, words, successors], and their probabilities."""
    draw = np.random.default_rng(SEED)
    successors = draw.integers(TOPICS, WORDS, (TOPICS, WORDS, SUCCESSORS))
    frequency = 1 / np.arange(1, SUCCESSORS + 1)
    return successors, frequency / frequency.sum()


def entropy(language: tuple[np.ndarray, np.ndarray]) -> float:
    """Of a word given the one before it and the topic, in nats: no model does better."""
    return float(-(language[1] * np.log(language[1])).sum())


def sentences(language: tuple[np.ndarray, np.ndarray], count: int, seed: int, topics: int = TOPICS) -> Tensor:
    """Word numbers [count, length]; the first is the topic, one of the first `topics`."""
    successors, frequency = language
    draw = np.random.default_rng([SEED, seed])
    topic = draw.integers(0, topics, count)
    words = [topic]
    choices = draw.choice(SUCCESSORS, size=(LENGTH - 1, count), p=frequency)
    for choice in choices:
        words.append(successors[topic, words[-1], choice])
    return torch.tensor(np.stack(words, axis=1))


def train(language: tuple[np.ndarray, np.ndarray]) -> PreTrainedModel:
    """A Mixtral trained from random weights, by AdamW with a learning rate that falls to zero."""
    set_seed(SEED)
    config = MixtralConfig(**SHAPE, vocab_size=WORDS, max_position_embeddings=LENGTH, output_router_logits=True)
    model = MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    batches = sentences(language, STEPS * BATCH, seed=0).split(BATCH)
    with bar("training", STEPS, "steps") as shown:
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            shown.update()
    config.output_router_logits = False  # the loss of balance is for training alone
    return model.eval()


@torch.inference_mode()
def loss_of(model: Any, test: Tensor) -> float:
    """Cross-entropy in nats per word."""
    return float(np.mean([float(model(input_ids=part, labels=part).loss) for part in test.split(128)]))


def _statistics(model: PreTrainedModel, samples: Tensor, needs: tuple[str, ...]) -> Statistics:
    batches = [{"input_ids": part, "labels": part} for part in samples.split(BATCH)]
    return compute_statistics(model, batches, needs, include=EXPERTS, progress=False)


def _range(ranks: list[int], allocation: str) -> str:
    return f" ({min(ranks)}–{max(ranks)})" if allocation != "uniform" else ""


@torch.inference_mode()
def _speed(rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Every form of the same experts in turn, with random weights and routes."""
    set_seed(SEED)
    stacked = {form: MixtralExperts(MixtralConfig(**WIDE)).eval() for form in ("eager", "grouped_mm")}
    for form, experts in stacked.items():
        experts.config._experts_implementation = form
        for parameter in experts.parameters():
            parameter.normal_(std=0.02)
    modules: dict[str, nn.Module] = {**stacked, "layers of their own": UnstackedExperts(stacked["eager"])}
    modules |= {f"low rank, {share:.0%}": _low_rank(stacked["eager"], share) for share in SPEED_RATIOS}
    rows, figures = [], {}
    for tokens in TOKENS:
        weights, chosen = torch.rand(tokens, WIDE["num_local_experts"]).topk(WIDE["num_experts_per_tok"])
        inputs = (torch.randn(tokens, WIDE["hidden_size"]), chosen, weights)
        competitors = {name: _call(module, inputs) for name, module in modules.items()}
        seconds = alternate(competitors, rounds, repeats_for(competitors["eager"]), steady_clock())
        row = {"tokens": str(tokens), "eager, ms": milliseconds(seconds["eager"])}
        row |= {name: ratio(seconds["eager"], times).text() for name, times in seconds.items() if name != "eager"}
        rows.append(row)
        figures[str(tokens)] = seconds
    return rows, figures


def _low_rank(stacked: nn.Module, share: float) -> nn.Module:
    experts = UnstackedExperts(stacked)
    for layers in (experts.gate_up_proj, experts.down_proj):
        for number, linear in enumerate(layers):
            layers[number] = LowRankLinear.like(linear, round(share * min(linear.weight.shape)))
    return experts


def _call(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: module(*inputs)
