"""What a user asks for (bits, library, scheme) → whether it can be done: the quantizers, what each was seen to do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from hf_lowrank.errors import LowRankError

SCHEMES = {
    "weight-only": "weights are stored in few bits and widened to compute with",
    "dynamic": "the products are of 8-bit integers, activations being rounded as they come",
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Quantizer:
    """A library: the package that Python imports, what it does (bits, scheme), and the config that asks for it.

    `config` is None where the library packs a model that is loaded already, and not one at loading.
    """

    name: str
    package: str
    offers: tuple[tuple[int, str], ...]
    config: Callable[[int, str, list[str]], Any] | None = None


def _torchao(bits: int, scheme: str, left: list[str]) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if scheme == "weight-only" else Int8DynamicActivationInt8WeightConfig()
    return TorchAoConfig(kind, modules_to_not_convert=left)


def _bitsandbytes(bits: int, scheme: str, left: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)


QUANTIZERS = {
    known.name: known
    for known in (
        Quantizer("compressed-tensors", "compressed_tensors", ((8, "weight-only"), (4, "weight-only"), (8, "dynamic"))),
        Quantizer("torchao", "torchao", ((8, "weight-only"), (8, "dynamic")), _torchao),
        Quantizer("bitsandbytes", "bitsandbytes", ((8, "dynamic"),), _bitsandbytes),
    )
}
NOT_SAVED = {"quanto": "transformers cannot save the models it quantizes"}


@dataclass(frozen=True)
class Quantization:
    """How to quantize. The default library's format is read by transformers, vLLM and SGLang, and does all of it.

    Args:
        bits: of a weight, 8 or 4.
        library: a name in `QUANTIZERS`.
        scheme: a name in `SCHEMES`.
        embedding_bits: of embeddings, 8 or 4, or 0 for none; None for 8 where the library can.
        dtype: of what is not quantized, scales among it, a name in `DTYPES`; None for as it is stored.

    Raises:
        LowRankError: an unknown name, or what the library does not do; the message says what there is.
    """

    bits: int = 8
    library: str = "compressed-tensors"
    scheme: str = "weight-only"
    embedding_bits: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.library in NOT_SAVED:
            raise LowRankError(f"{self.library} is not offered, as {NOT_SAVED[self.library]}; {_offered()}")
        if self.library not in QUANTIZERS:
            raise LowRankError(f"unknown library {self.library!r}; {_offered()}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LowRankError(f"unknown dtype {self.dtype!r}; there are {', '.join(DTYPES)}")
        if (self.bits, self.scheme) not in self.quantizer.offers:
            raise LowRankError(f"{self.library} does not quantize to {self.bits} bits, {self.scheme}; {_offered()}")
        if self.embedding_bits not in ((None, 0, 4, 8) if self.quantizer.config is None else (None, 0)):
            raise LowRankError(
                f"{self.library} does not give embeddings {self.embedding_bits} bits: compressed-tensors gives 8 or 4, "
                "0 leaves them"
            )

    @property
    def quantizer(self) -> Quantizer:
        """The library."""
        return QUANTIZERS[self.library]

    @property
    def of_embeddings(self) -> int:
        """The bits of embeddings, 0 where they stay as they are."""
        possible = 8 if self.quantizer.config is None else 0
        return possible if self.embedding_bits is None else self.embedding_bits

    def check_here(self) -> None:
        """Raise where the library cannot be imported.

        Raises:
            LowRankError: the message says how to install it.
        """
        if find_spec(self.quantizer.package) is None:
            raise LowRankError(f'{self.library} is not installed: pip install "hf_lowrank[quantizers]"')


def described(quantization: Quantization, method: str | None = None) -> dict[str, Any]:
    """How a model was quantized, for its record: with what a method knows of it, or each weight to the nearest."""
    package = quantization.library
    return {
        "bits": quantization.bits,
        "library": package,
        "scheme": quantization.scheme,
        "embedding_bits": quantization.of_embeddings,
        "rounding": "nearest" if method is None else method,
        "version": version(package),
    }


def in_words(record: Mapping[str, Any]) -> str | None:
    """How the model of a record was quantized; None of one that was not.

    >>> how = {"bits": 8, "library": "compressed-tensors", "scheme": "weight-only", "version": "0.15.0"}
    >>> in_words({"quantization": how})
    '8 bits, weight-only, by compressed-tensors 0.15.0'
    >>> in_words({"quantization": how, "bits": {"layer.0": 4, "layer.1": 8}})
    '8 or 4 bits by layer, weight-only, by compressed-tensors 0.15.0'
    """
    how, chosen = record.get("quantization"), set(record.get("bits", {}).values())
    if not how:
        return None
    bits = f"{' or '.join(map(str, sorted(chosen, reverse=True)))} bits by layer" if chosen else f"{how['bits']} bits"
    return f"{bits}, {how['scheme']}, by {how['library']} {how['version']}"


def _offered() -> str:
    each = (f"{q.name}: {', '.join(f'{bits} bits {scheme}' for bits, scheme in q.offers)}" for q in QUANTIZERS.values())
    return f"there are {'; '.join(each)}"
