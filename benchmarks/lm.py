"""The language model of `lm_train` made smaller in every way → perplexity, next-token accuracy and KL to dense."""

import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.basis_sharing import basis_sharing
from benchmarks.harness import Lines, Options, Result, Row
from benchmarks.lm_text import Windows, prepare
from benchmarks.lm_train import Recipe, cache_folder, train, trained
from benchmarks.modegpt import modegpt
from benchmarks.searched_ranks import profile
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.allocation import Profile
from hf_lowrank.compression.narrow import narrow
from hf_lowrank.jobs.checkpoint import Work
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.batches import Marked, Marks
from hf_lowrank.statistics.names import passes

SHARES = (0.9, 0.8, 0.6, 0.4)  # of the parameters of the blocks that are kept
FIRST = (0.8, 0.6, 0.4)  # which of these are measured before the others
SEEDS = (0, 1, 2)
SAMPLES, TESTED, BATCH = 128, 64, 8  # windows for the statistics, windows that are scored, and windows at a time

Figures = dict[str, float]

# What is no method with its defaults: the settings that a method has instead, or whose way it is, in a file of its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "kfac-one-shot": {"method": "kfac", "sequential": False},
    "whiten-greedy": {"method": "whiten", "allocation": "greedy"},
    "whiten-sequential": {"method": "whiten", "sequential": True},
    "whiten-sequential-greedy": {"method": "whiten", "allocation": "greedy", "sequential": True},
    "kfac-searched": {"method": "kfac", "allocation": "knapsack"},
}
NARROW, MODEGPT, SHARING = "narrow", "modegpt", "basis-sharing"
RIVALS = (NARROW, MODEGPT, SHARING)

# In this order: those that decide, then those that take minutes a model or their statistics, and are of one seed.
ORDER = (
    *("kfac", "whiten", "svd", "asvd", "tfwsvd", "fwsvd", "fwsvd2", "whiten-diag", "kfac-one-shot", "whiten-greedy"),
    *("modegpt", "basis-sharing", "narrow"),
    *("whiten-sequential-greedy", "whiten-sequential", "kfac-searched", "gfwsvd", "ekfac"),
)
LATE = ORDER[ORDER.index("whiten-sequential-greedy") :]
ONE_SEED = ("svd", *LATE)


def run(options: Options) -> Result:
    """Train the model, if asked to; else a row for each way, over seeds, as far as they are in the cache or made."""
    folder, recipe = cache_folder(options.cache), Recipe()
    recipe = recipe if options.tokens is None else Recipe(tokens=options.tokens)
    if options.train:
        model = train(folder, recipe)
        return Result("lm: the trained model", [{"folder": str(model), "tokens": f"{trained(folder)[1]:,}"}])
    study = Study(folder, recipe)
    ways = [way for way in ORDER if options.methods is None or way in options.methods]
    wanted = _in_order(ways)
    with bar("lm", len(wanted), "models") as shown:
        for which in wanted:
            study.figures(*which)
            shown.update()
    dense = study.dense_figures
    return Result(
        f"lm: a Llama of {study.model.num_parameters():,} parameters after {study.tokens / 1e6:.1f}M tokens of Python; "
        f"dense perplexity {dense['perplexity']:.2f}, accuracy {dense['accuracy']:.2%}",
        [_row(study, way) for way in ways],
        [
            "Thousandths of a nat added to the loss, KL to dense in the same unit, and perplexity, on packages held "
            f"out, by the share of the blocks' parameters kept: means over calibration seeds "
            f"{', '.join(map(str, SEEDS))} of {SAMPLES} windows of {recipe.length} tokens of the training text, ± "
            f"standard deviations; without ±: one seed. {TESTED} windows are scored.",
            *_levels(study, ways),
        ],
        {"dense": dense, "tokens": study.tokens, "all": list(study.known.values())},
    )


def _in_order(ways: Sequence[str]) -> list[tuple[str, float, int]]:
    """What is measured, each way at each share with each seed, what decides first."""
    every = [(way, share, seed) for seed in SEEDS for way in ways for share in SHARES]
    wanted = [(way, share, seed) for way, share, seed in every if seed in seeds_of(way)]
    return sorted(wanted, key=lambda which: (which[0] in LATE, which[1] not in FIRST))


def seeds_of(way: str) -> tuple[int, ...]:
    """The calibration seeds that a way is measured with."""
    return SEEDS[:1] if way in ONE_SEED else SEEDS


class Study:
    """The trained model and its windows; what was measured of it once is read again from the cache."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        place, self.tokens = trained(folder)
        self.tokenizer, self.training, held_out = prepare(folder / "text", recipe.corpus)
        self.length = recipe.length
        self.model = AutoModelForCausalLM.from_pretrained(place).eval()
        self.targets = find_targets(self.model)
        self.targeted = sum(target.module.weight.numel() for target in self.targets.values())
        self.folder = folder / f"measured-{self.tokens}"
        self.folder.mkdir(exist_ok=True)
        windows = Windows(held_out, recipe.length)
        self.test = [windows[n]["input_ids"] for n in np.linspace(0, len(windows) - 1, min(TESTED, len(windows)))]
        self.known = {tuple(line["of"]): line for line in self._lines()}
        self.dense_figures, self.dense = self._compared(self.model, None)

    def figures(self, way: str, share: float, seed: int) -> Figures:
        """What a model made smaller so says of the held-out text."""
        key = (way, share, seed)
        if key not in self.known:
            started = time.process_time()
            small, kept = self._smaller(way, share, seed)
            seconds = time.process_time() - started
            figures, _ = self._compared(small, self.dense)
            self.known[key] = {"of": key, "kept": kept / self.targeted, "seconds": seconds, **figures}
            with (self.folder / "models.jsonl").open("a") as log:
                log.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]

    def _smaller(self, way: str, share: float, seed: int) -> tuple[PreTrainedModel, int]:
        """The model, and how many parameters it has where it had those of its targeted layers."""
        if way == MODEGPT:
            return modegpt(copy.deepcopy(self.model), self._moments(seed), share)
        if way == SHARING:
            return basis_sharing(copy.deepcopy(self.model), self._moments(seed), share)
        settings = VARIANTS.get(way, {"method": way})
        small = self._narrow(share, seed) if way == NARROW else self._factorized(settings, share, seed)
        return small, self.targeted - (self.model.num_parameters() - small.num_parameters())

    def _factorized(self, settings: dict[str, Any], share: float, seed: int) -> PreTrainedModel:
        config = CompressionConfig(**settings, keep=share)
        statistics = self._statistics(config, seed)
        found = self._profile(config, statistics, seed) if config.allocation == "knapsack" else None
        rest: dict[str, Any] = {"progress": False, "profile": found, "batches": self.marks(seed)}
        return compress(copy.deepcopy(self.model), config, statistics, **rest)[0]

    def _narrow(self, share: float, seed: int) -> PreTrainedModel:
        """Narrower MLPs, and all else as it was, at the share of all parameters of the blocks."""
        width = self.model.config.intermediate_size
        inside = sum(target.module.weight.numel() for name, target in self.targets.items() if ".mlp." in name)
        kept = int(width * (1 - (1 - share) * self.targeted / inside))
        return narrow(copy.deepcopy(self.model), self._moments(seed), max(1, kept))

    def _moments(self, seed: int) -> Statistics:
        """The second moments of all inputs, as `whiten` needs them."""
        statistics = self._statistics(CompressionConfig("whiten"), seed)
        assert statistics is not None
        return statistics

    def _profile(self, config: CompressionConfig, statistics: Statistics | None, seed: int) -> Profile:
        """What layers lose on the first windows that statistics are of."""
        assert statistics is not None
        lines = Lines(self.folder / f"profile-{config.method}-{seed}.jsonl")
        return profile(self.model, config, statistics, self.calibration(seed, SAMPLES)[0]["input_ids"], lines)

    def _lines(self) -> Iterator[dict[str, Any]]:
        log = self.folder / "models.jsonl"
        return map(json.loads, log.read_text().splitlines() if log.is_file() else [])

    def _statistics(self, config: CompressionConfig, seed: int) -> Statistics | None:
        """What a method needs, measured and kept: in one pass for all with these labels that one pass is enough for.

        A pass that was interrupted goes on.
        """
        if not config.needs:
            return None
        labels, several = METHODS[config.method].labels, len(passes(config.needs)) > 1
        place = self.folder / f"statistics-{config.method if several else labels}-{seed}"
        if not place.is_dir():
            alike = [method.needs_for(True) for method in METHODS.values() if method.labels == labels]
            kinds = [config.needs] if several else [needs for needs in alike if len(passes(needs)) == 1]
            needs = list(dict.fromkeys(need for group in kinds for need in group))
            work = Work.open(place.with_name(f"{place.name}.work"), {"needs": needs}, resume=True, minutes=1)
            compute_statistics(self.model, self.calibration(seed), needs, labels=labels, work=work).save(place)
            work.remove()
        return Statistics.load(place)

    def calibration(self, seed: int, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        """Windows of the training text, in batches."""
        windows = Windows(self.training, self.length)
        chosen = np.random.default_rng(seed).choice(len(windows), min(samples, len(windows)), replace=False)
        ids = torch.stack([windows[number]["input_ids"] for number in chosen])
        return [{"input_ids": part, "labels": part} for part in ids.split(BATCH)]

    def marks(self, seed: int) -> Marks:
        """The same, with the tokens that count: of a window all but the last, which predicts nothing."""
        marks = Marks()
        for batch in self.calibration(seed):
            active = torch.ones(batch["input_ids"].shape, dtype=torch.bool)
            active[:, -1] = False
            marks.append(Marked(batch, dict.fromkeys(self.targets, active)))
        return marks

    @torch.inference_mode()
    def _compared(self, model: PreTrainedModel, dense: list[Tensor] | None) -> tuple[Figures, list[Tensor]]:
        """Loss, accuracy and divergence from the dense model's log-probabilities, and the model's own."""
        loss = right = far = 0.0
        kept = []
        for number, ids in enumerate(torch.stack(self.test).split(BATCH)):
            said = model(input_ids=ids).logits[:, :-1].float().log_softmax(dim=-1)
            loss -= float(said.gather(2, ids[:, 1:, None]).double().sum())
            right += float((said.argmax(dim=-1) == ids[:, 1:]).sum())
            if dense is None:
                kept.append(said)
            else:
                far += float((dense[number].exp() * (dense[number] - said)).sum(dim=-1).double().sum())
        count = len(self.test) * (self.length - 1)
        figures = {"loss": loss / count, "accuracy": right / count, "divergence": far / count}
        return {**figures, "perplexity": float(np.exp(figures["loss"]))}, kept


def _row(study: Study, way: str) -> Row:
    row = {"way": way}
    for share in SHARES:
        added, far = (_over_seeds(study, way, share, kind) for kind in ("added", "divergence"))
        spread = f" ± {stdev(added):.2f}" if len(added) > 1 else ""
        perplexity = fmean(_over_seeds(study, way, share, "perplexity")) / 1000
        row[f"{share:.0%} kept"] = f"{fmean(added):+.2f}{spread}, KL {fmean(far):.3f}, {perplexity:.2f}"
    return row


def _over_seeds(study: Study, way: str, share: float, kind: str) -> list[float]:
    """A figure of a way with each of its seeds, in thousandths."""
    found = [study.figures(way, share, seed) for seed in seeds_of(way)]
    if kind == "added":
        return [1000 * (figures["loss"] - study.dense_figures["loss"]) for figures in found]
    return [1000 * figures[kind] for figures in found]


def _levels(study: Study, ways: Sequence[str]) -> list[str]:
    """What the default adds to the loss, and its KL, as shares of what whitening adds."""
    default, whitening = ORDER[:2]
    if not {default, whitening} <= set(ways):
        return []
    parts = []
    for share in SHARES:
        added, far = (
            fmean(_over_seeds(study, default, share, kind)) / fmean(_over_seeds(study, whitening, share, kind))
            for kind in ("added", "divergence")
        )
        parts.append(f"{share:.0%}: {added:.2f} (KL {far:.2f})")
    return [f"Of what `{whitening}` adds, `{default}` adds, {'; '.join(parts)}."]
