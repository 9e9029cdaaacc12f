"""The records of a coverage sweep → `architectures.md`: what is factorized in each family, and how each type fared."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.progress import bar
from hf_lowrank.model.targets import find_targets
from hf_lowrank.nn.experts_lowrank import is_stacked, unstacked_names

PAGE = Path(__file__).with_name("architectures.md")
KINDS = ("linears of blocks", "embeddings", "convolutions", "3-D parameters", "other")
Record = dict[str, Any]

TEXT = """\
# Architectures

Written by `python -m benchmarks coverage --all`: transformers {version}, {classes} head classes of {types} model types.

## What is factorized, and what is not

By default every `nn.Linear` and `Conv1D` inside a block (an entry of an `nn.ModuleList`) is factorized. `--include`
chooses linears, embeddings and convolutions by name instead; `--exclude` takes some away.

| family | factorized by default | left dense, and why |
|---|---|---|
| encoders: BERT, RoBERTa, DistilBERT, ELECTRA, MobileBERT, DeBERTa | query, key, value, attention output, \
feed-forward, bottlenecks | embeddings (by `--include`), pooler and task heads: small, and a task depends on each row |
| ALBERT | the shared block, once: one Fisher information over all its uses, one pair of factors | the rest as above |
| decoders: Llama, Qwen, Gemma, Mistral, GPT-NeoX, Falcon | q, k, v (fewer rows where queries are grouped) or the \
fused qkv, o, gate, up, down | `lm_head`; where it is tied to the embedding, both go together by \
`--include embed_tokens` |
| GPT-2 | its `Conv1D` layers, whose weight is stored transposed | as above |
| encoder–decoders: T5, BART, Whisper | self- and cross-attention, feed-forward of both stacks | the shared embedding \
(by `--include shared`) |
| vision: ViT, CLIP | the linears of the blocks | patch embeddings, which are convolutions (by `--include \
patch_embeddings.projection`, `patch_embedding`); projections and heads lie outside |
| speech: wav2vec 2.0, HuBERT, Whisper | the linears of the blocks | the convolutions of the feature encoder (by \
`--include "conv_layers.*.conv"`, `conv1`); the one of positions is grouped and has a weight norm |
| multimodal: LLaVA and its kin | the blocks of every tower | the projector, unless it is a list of layers |
| mixtures of experts | attention, shared experts, experts that are linears of their own, and every projection of \
every expert of those that transformers stacks in 3-D parameters and decorates by `use_experts_implementation`, as \
layers such as `experts.gate_up_proj.3` | the experts of DBRX, JetMoE, Llama 4, LongCat-Flash and Step 3.7 and the \
shared ones of Inkling, which are not decorated; routers, which are classes of their own. An expert that no sample \
reached has no statistics: it stays dense, and the report says so |
| state space: Mamba, Jamba | in, x and out projections | `dt_proj`, where its weight is read instead of the layer \
called: no statistics, so it stays dense (`svd`, which needs none, does factorize it) |
| convolutional networks: ResNet, RegNet, DAC; ConvNeXt | nothing, they have no linear layer in a block; the pointwise \
linears | convolutions (by `--include convolution`, `conv1`, `downsampling_layer.1`); measure the running statistics \
of batch normalization again afterwards. Those of BiT are a class of their own |

Never factorized: a subclass of `nn.Linear` that modelling code made its own (inside `nn.MultiheadAttention`, routers),
since it may use its weight in its own way; a weight tied to something else than an embedding; convolutions that are
transposed, grouped (depthwise) or under a weight norm. A convolution is a linear layer on patches, of a weight
[out, in · k] for kernels of k elements: it becomes one to r channels, of the same kernel, and one of kernel size 1.

Modelling code that reads `layer.weight` of a factorized layer gets the product of the factors, formed when its values
are used. Contrastive losses (CLIP's own) compare the samples of a batch, so that a single sample's loss, which all
statistics are of, is constant: measure on another head, or use `svd`.

## What the sweep checked

A small random model of every class, by `svd` at a quarter of the ranks: compressed, saved, loaded by its Auto class.

{outcomes}

## By model type

Shares are of the parameters of the first class at transformers' default config. "ok" counts the classes that were
checked and came through. 3-D parameters are those of experts and of convolutions under weight normalisation.

{types_table}
{problems}"""


def write_page(records: Sequence[Record], meanings: Mapping[str, str]) -> None:
    """Write the page from the records of all head classes."""
    counts = Counter(record["status"] for record in records)
    outcomes = [[status, str(counts[status]), meaning] for status, meaning in meanings.items() if counts[status]]
    by_type: dict[str, list[Record]] = {}
    for record in records:
        by_type.setdefault(record["type"], []).append(record)
    rows = []
    with bar("parameters by kind", len(by_type), "types") as shown:
        for model_type, heads in by_type.items():
            rows.append([model_type, _outcome(heads), *_shares(heads)])
            shown.update()
    order = ("failed", "dense fails too", "not built")
    bad = sorted((r for r in records if r["status"] in order), key=lambda record: order.index(record["status"]))
    problems = [[r["type"], r["class"], r["status"], r["note"][:120].replace("|", "/")] for r in bad]
    page = TEXT.format(
        version=transformers.__version__,
        classes=len(records),
        types=len(by_type),
        outcomes=_table(["outcome", "classes", "meaning"], outcomes),
        types_table=_table(["model type", "ok", *KINDS], rows),
        problems="\n## Exceptions\n\n" + _table(["type", "class", "outcome", "why"], problems) if problems else "",
    )
    PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")


def _outcome(heads: Sequence[Record]) -> str:
    counts = Counter(head["status"] for head in heads)
    good = counts.pop("ok", 0) + counts.pop("ok, not run", 0)
    others = [f"{status}: {count}" for status, count in counts.items()]
    return ", ".join([f"{good} of {len(heads)}", *others]) if good else ", ".join(others)


def _shares(heads: Sequence[Record]) -> list[str]:
    """The share of each of `KINDS` in the first class at its default config; no memory is taken."""
    model_class = getattr(transformers, heads[0]["class"], None)
    try:
        with torch.device("meta"):
            counts = parameters_by_kind(model_class._from_config(model_class.config_class()))  # type: ignore[union-attr]
    except Exception:  # it cannot be built, as the outcome says
        return ["–"] * len(KINDS)
    total = sum(counts.values())
    return [f"{counts[kind] / total:.0%}" if counts[kind] else "" for kind in KINDS]


def parameters_by_kind(model: Any) -> dict[str, int]:
    """How many parameters of a model are of each of `KINDS`; shared ones are counted once."""
    try:
        targets = find_targets(model)
    except LowRankError:  # there are none
        targets = {}
    stacked = unstacked_names(model)
    targeted = {stacked.get(name, module) for name, module in targets.items()}
    counts, seen = dict.fromkeys(KINDS, 0), set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[_kind(module, parameter, module in targeted)] += parameter.numel()
    return counts


def _kind(module: nn.Module, parameter: nn.Parameter, targeted: bool) -> str:
    if targeted and parameter.ndim == (3 if is_stacked(module) else 2):
        return "linears of blocks"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    return "3-D parameters" if parameter.ndim == 3 and parameter.shape[0] > 1 and parameter.shape[1] > 1 else "other"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in [columns, *rows]]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines)
