"""The language model of `lm_train` compressed by every method → perplexity, next-token accuracy and KL to dense."""

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import Options, Result, Row
from benchmarks.lm_text import Windows, prepare
from benchmarks.lm_train import Recipe, cache_folder, train, trained
from hf_lowrank import METHODS, CompressionConfig, Statistics, compress, compute_statistics
from hf_lowrank.compression.narrow import LAYERS, NEEDS, narrow
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets
from hf_lowrank.statistics.names import passes

SHARES = (0.9, 0.8, 0.6, 0.4)  # of the parameters of the blocks that are kept
SEEDS = (0, 1, 2)
SAMPLES, TESTED, BATCH = 128, 64, 8  # windows for the statistics, windows that are scored, and windows at a time

NARROW = "narrow"  # no method: fewer inner channels of MLPs (MoDeGPT's way with them), the model a plain one

Figures = dict[str, float]


def run(options: Options) -> Result:
    """Train the model, if asked to; else a row for each method, over seeds, as far as they are in the cache or made."""
    folder, recipe = cache_folder(options.cache), Recipe()
    recipe = recipe if options.tokens is None else Recipe(tokens=options.tokens)
    if options.train:
        model = train(folder, recipe)
        return Result("lm: the trained model", [{"folder": str(model), "tokens": f"{trained(folder)[1]:,}"}])
    study = Study(folder, recipe)
    methods = [name for name in (*METHODS, NARROW) if options.methods is None or name in options.methods]
    with bar("lm", len(methods) * len(SHARES) * len(SEEDS), "models") as shown:
        for seed in SEEDS:
            for method in methods:
                for share in SHARES:
                    study.figures(method, share, seed)
                    shown.update()
    dense = study.dense_figures
    rows = [_row(study, name) for name in methods]
    return Result(
        f"lm: a Llama of {study.model.num_parameters():,} parameters after {study.tokens / 1e6:.1f}M tokens of Python; "
        f"dense perplexity {dense['perplexity']:.2f}, accuracy {dense['accuracy']:.2%}",
        rows,
        [
            "Nats added to the loss, and in brackets KL to dense, on packages held out, by the share of the blocks' "
            f"parameters kept: means ± standard deviations over calibration seeds {', '.join(map(str, SEEDS))} of "
            f"{SAMPLES} windows of {recipe.length} tokens of the training text. {TESTED} windows are scored.",
        ],
        {"dense": dense, "tokens": study.tokens, "all": list(study.known.values())},
    )


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

    def figures(self, method: str, share: float, seed: int) -> Figures:
        """What a model compressed so says of the held-out text."""
        key = (method, share, seed)
        if key not in self.known:
            started = time.process_time()
            small = self._narrow(share, seed) if method == NARROW else self._factorized(method, share, seed)
            seconds = time.process_time() - started
            figures, _ = self._compared(small, self.dense)
            gone = self.model.num_parameters() - small.num_parameters()
            self.known[key] = {"of": key, "kept": 1 - gone / self.targeted, "seconds": seconds, **figures}
            with (self.folder / "models.jsonl").open("a") as log:
                log.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]

    def _factorized(self, method: str, share: float, seed: int) -> PreTrainedModel:
        config = CompressionConfig(method, keep=share)
        rest: dict[str, Any] = {"progress": False, "batches": self.calibration(seed)}
        return compress(copy.deepcopy(self.model), config, self._statistics(config, seed), **rest)[0]

    def _narrow(self, share: float, seed: int) -> PreTrainedModel:
        """Narrower MLPs, and all else as it was, at the share of all parameters of the blocks."""
        width = self.model.config.intermediate_size
        inside = sum(target.module.weight.numel() for name, target in self.targets.items() if ".mlp." in name)
        kept = round(width * (1 - (1 - share) * self.targeted / inside))
        measured = compute_statistics(self.model, self.calibration(seed), NEEDS, include=LAYERS, progress=False)
        return narrow(copy.deepcopy(self.model), measured, max(1, kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        log = self.folder / "models.jsonl"
        return map(json.loads, log.read_text().splitlines() if log.is_file() else [])

    def _statistics(self, config: CompressionConfig, seed: int) -> Statistics | None:
        """What a method needs, measured and kept: in one pass for all with these labels that one pass is enough for."""
        if not config.needs:
            return None
        labels, several = METHODS[config.method].labels, len(passes(config.needs)) > 1
        place = self.folder / f"statistics-{config.method if several else labels}-{seed}"
        if not place.is_dir():
            alike = [CompressionConfig(name).needs for name, method in METHODS.items() if method.labels == labels]
            kinds = [config.needs] if several else [needs for needs in alike if len(passes(needs)) == 1]
            needs = list(dict.fromkeys(need for group in kinds for need in group))
            compute_statistics(self.model, self.calibration(seed), needs, labels=labels).save(place)
        return Statistics.load(place)

    def calibration(self, seed: int, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
        """Windows of the training text, in batches."""
        windows = Windows(self.training, self.length)
        chosen = np.random.default_rng(seed).choice(len(windows), min(samples, len(windows)), replace=False)
        ids = torch.stack([windows[number]["input_ids"] for number in chosen])
        return [{"input_ids": part, "labels": part} for part in ids.split(BATCH)]

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


def _row(study: Study, method: str) -> Row:
    row = {"method": method}
    for share in SHARES:
        found = [study.figures(method, share, seed) for seed in SEEDS]
        added = [figures["loss"] - study.dense_figures["loss"] for figures in found]
        far, right = fmean(each["divergence"] for each in found), fmean(each["accuracy"] for each in found)
        row[f"{share:.0%} kept"] = (
            f"{fmean(added):+.4f} ± {stdev(added) if len(added) > 1 else 0:.4f} ({far:.4f}), {right:.1%}"
        )
    return row
