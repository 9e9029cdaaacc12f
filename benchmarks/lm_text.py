"""The Python source of installed packages → a tokenizer and token ids, kept in a cache folder."""

import hashlib
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_lowrank.errors import LowRankError
from hf_lowrank.jobs.files import read_json, write_json

END = "<|endoftext|>"

# Dependencies of this library, and theirs: they are there wherever it is installed.
TRAINING = (
    "torch", "transformers", "sympy", "pandas", "scipy", "sklearn", "numpy", "matplotlib", "mpl_toolkits", "fontTools",
    "pygments", "huggingface_hub", "datasets", "mpmath", "PIL", "torchgen", "aiohttp", "pyarrow",
)  # fmt: skip
HELD_OUT = ("networkx", "accelerate", "rich", "joblib", "fsspec", "jinja2", "typer")


@dataclass(frozen=True)
class Corpus:
    """Whose source is read, and how it becomes tokens.

    Args:
        training: packages to train, and to measure statistics, on.
        held_out: packages to score on.
        vocabulary: entries of the byte-level BPE.
        sample: characters of the training text that the BPE is learnt from.
        seed: of the order of the files.
    """

    training: tuple[str, ...] = TRAINING
    held_out: tuple[str, ...] = HELD_OUT
    vocabulary: int = 4096
    sample: int = 20_000_000
    seed: int = 0


class Windows(Dataset):
    """Non-overlapping windows of token ids, as rows that a causal language model is trained on."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        start = int(number) * self.length
        ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def prepare(folder: Path, corpus: Corpus) -> tuple[PreTrainedTokenizerBase, np.ndarray, np.ndarray]:
    """The tokenizer, and the token ids of the training and the held-out text: made once, then read from `folder`.

    Raises:
        LowRankError: a package is not installed, or the folder holds another corpus.
    """
    record, wanted = folder / "corpus.json", json.loads(json.dumps(asdict(corpus)))
    if record.is_file():
        if (before := read_json(record)["corpus"]) != wanted:
            raise LowRankError(f"{folder} holds another corpus ({before}); give another folder as --cache")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, corpus)
        write_json(record, {"corpus": wanted, "versions": _versions(corpus)})
    ids = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("training", "held_out"))
    return (AutoTokenizer.from_pretrained(folder / "tokenizer"), *ids)


def _write(folder: Path, corpus: Corpus) -> None:
    training = list(_texts(corpus.training, corpus.seed))
    tokenizer = _tokenizer(training, corpus)
    tokenizer.save_pretrained(folder / "tokenizer")
    np.save(folder / "training.npy", _encoded(tokenizer, training))
    np.save(folder / "held_out.npy", _encoded(tokenizer, list(_texts(corpus.held_out, corpus.seed))))


def _texts(packages: Sequence[str], seed: int) -> Iterator[str]:
    """The source files of packages without their tests, each text once, in an order of the seed's."""
    files = [(package, path) for package in packages for path in _source(package)]
    random.Random(seed).shuffle(files)
    seen = set()
    for _, path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest = hashlib.blake2b(text.encode("utf-8", errors="ignore")).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield text


def _source(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise LowRankError(
            f"the package {package!r}, whose source is part of the text, is not installed: pip install hf_lowrank"
        )
    root = Path(found.submodule_search_locations[0])
    return sorted(path for path in root.rglob("*.py") if "tests" not in path.relative_to(root).parts)


def _tokenizer(texts: Sequence[str], corpus: Corpus) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=corpus.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_up_to(texts, corpus.sample), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def _up_to(texts: Sequence[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)


def _encoded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> np.ndarray:
    """The ids of all texts, with the end of text after each."""
    backend, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    parts = []
    for start in range(0, len(texts), 100):
        for encoding in backend.encode_batch_fast(list(texts[start : start + 100])):
            parts.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(parts)


def _versions(corpus: Corpus) -> dict[str, str]:
    names = packages_distributions()
    return {package: version(names[package][0]) for package in (*corpus.training, *corpus.held_out)}
