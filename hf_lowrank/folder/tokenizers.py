"""A folder or a Hub name → its tokenizer, or image processor; never one that transformers made up for want of files."""

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.hub_errors import hub_problem, one_line

# Any of these is a whole tokenizer, whatever its class calls its files.
WHOLE = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")
CONFIG = "tokenizer_config.json"
_OPTIONAL = ("tokenizer_file", "tokenizer_config_file", "normalizer_file")


IMAGES = "preprocessor_config.json"  # what a model of images has instead


def reads_images(name: str) -> bool:
    """Whether an image processor, and no tokenizer, lies beside the model called `name`."""
    return bool(stored_file(name, IMAGES)) and not any(stored_file(name, file) for file in (*WHOLE, CONFIG))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model called `name`; of models of images the image processor.

    Raises:
        LowRankError: there is none, or it cannot be read. transformers would make up one that knows no words.
    """
    remedy = "save that of the model it was made from: AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
    if reads_images(name):
        return _image_processor(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ImportError, tokenizers its own
        reason = hub_problem(error) or one_line(error)
        raise LowRankError(f"{name} has no tokenizer that can be read ({reason}); {remedy}") from error
    if lacking := _lacking(name, type(tokenizer)):
        raise LowRankError(f"{name} has no tokenizer ({', '.join(lacking)} are not there); {remedy}")
    return tokenizer


def _image_processor(name: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError where Pillow is missing
        raise LowRankError(f"the image processor of {name} cannot be read: {one_line(error)}") from error


def stored_file(name: str, file: str) -> str | None:
    """Where a file of a folder, or a copy of one on the Hub, lies; None if it has none or cannot be asked."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    try:
        return cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
    except OSError:
        return None


def _lacking(name: str, kind: type) -> list[str]:
    """The files of a vocabulary that a tokenizer of this class needs and `name` has not; nothing if it needs none."""
    own: dict[str, str] = getattr(kind, "vocab_files_names", {})
    needed = [file for key, file in own.items() if key not in _OPTIONAL] or list(own.values())
    lacking = [file for file in needed if not stored_file(name, file)]
    return [] if not lacking or any(stored_file(name, file) for file in WHOLE) else ["tokenizer.json", *lacking]
