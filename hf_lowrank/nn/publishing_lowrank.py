"""A low-rank model → one commit on the Hub, with what belongs beside it: tokenizer, record and card.

This file travels with saved checkpoints as remote code: see modeling_lowrank.py.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from transformers import AutoProcessor
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .auto_lowrank import auto_class_of

CARD, RECORD, PICTURE = "README.md", "compression.json", "ranks.png"
# What a repository may hold of an earlier model, and `from_pretrained` would prefer to the weights of this one.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

HUB_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

CardWriter = Callable[[Any, Path, str], bool]
_card_writers: list[CardWriter] = []
logger = logging.get_logger(__name__)


def on_push(writer: CardWriter) -> None:
    """Let `writer(model, folder, repo_id)` write the card of models that are pushed; it returns whether it did."""
    _card_writers.append(writer)


def commit_files(
    paths: Mapping[str, Path],
    repo_id: str,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload {name: file} to the Hub in one commit, which also removes the weights that they replace.

    The repository and the branch `revision` are made if need be. No file is visible before all of them are.
    """
    api = HfApi(library_name="transformers", library_version=transformers.__version__)
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    stored = api.list_repo_files(repo_id, revision=revision, token=token)
    if CARD in stored and CARD in paths and _MINIMAL in paths[CARD].read_text(encoding="utf-8"):
        paths = {name: path for name, path in paths.items() if name != CARD}
        logger.warning(f"The model card of {repo_id} is kept: look whether it is still true of the new weights.")
    replaced = [CommitOperationDelete(name) for name in stored if _WEIGHTS.fullmatch(name) and name not in paths]
    return api.create_commit(
        repo_id,
        [*replaced, *(CommitOperationAdd(name, path) for name, path in sorted(paths.items()))],
        commit_message=message,
        commit_description=description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def add_companions(model: Any, folder: Path, repo_id: str, tags: list[str] | None) -> None:
    """Put beside the model what lay beside it where it was loaded from, and a card."""
    origin = model.name_or_path

    def stored(name: str) -> str | None:
        return cached_file(origin, name, **_NO_ERRORS) if origin else None

    try:
        if not any(map(stored, _PREPROCESSING)):  # transformers would make up a tokenizer that knows no words
            raise OSError("there is none")
        # Explicitly no: by default transformers would ask whether to run code of the base model's repository.
        processor = AutoProcessor.from_pretrained(origin, config=model.config, trust_remote_code=False)
        processor.save_pretrained(folder)
    except (OSError, ValueError) as error:
        logger.warning(f"Push a tokenizer or processor too: of where the model was loaded, {origin!r}, {error}")

    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    if all((old := stored(path.name)) and filecmp.cmp(path, old, shallow=False) for path in weights):
        for name in (CARD, RECORD, PICTURE):
            if found := stored(name):
                shutil.copyfile(found, folder / name)
    card = folder / CARD
    if card.exists():
        card.write_text(card_for(card.read_text(encoding="utf-8"), repo_id), encoding="utf-8")
    elif not any(writer(model, folder, repo_id) for writer in _card_writers):
        minimal_card(model, repo_id).save(card)
    if tags:
        tagged = ModelCard.load(card)
        tagged.data.tags = list(dict.fromkeys([*(tagged.data.tags or []), *tags]))
        tagged.save(card)


_PREPROCESSING = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
_NO_ERRORS = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}


def card_for(card: str, name: str) -> str:
    """A card's text for another `name` of the model: in its first heading, in its code and in its scores."""
    old = card_name(card)
    if old is None:
        return card
    card = card.replace(f"# {old}\n", f"# {name}\n", 1).replace(f'"{old}"', f'"{name}"')
    return card.replace(f"- name: {old.rpartition('/')[2]}\n", f"- name: {name.rpartition('/')[2]}\n", 1)


def card_name(card: str) -> str | None:
    """The first heading of a card, which is the name of its model."""
    body = card.partition("\n---\n")[2] if card.startswith("---\n") else card  # metadata may hold comments
    heading = re.search(r"^# (.+)$", body, re.MULTILINE)
    return heading and heading[1].strip()


_MINIMAL = "This card was written when the model was pushed, without a record of how it was made."


def minimal_card(model: Any, repo_id: str) -> ModelCard:
    """What can be said of a model without the record of its compression: how to load it."""
    auto_class = auto_class_of(model)
    data = ModelCardData(library_name="transformers", tags=["low-rank", "custom_code"])
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {repo_id}

A {model.base_model_class.__name__} with {len(model.lowrank_ranks)} of its layers factorized to low rank.
{_MINIMAL}

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```

With the library hf_lowrank imported, `trust_remote_code` is not needed. Load it by the Auto classes:
{model.base_model_class.__name__} itself cannot read it, and would give random layers.
"""
    )
