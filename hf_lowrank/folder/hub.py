"""A folder with a compressed model → a repository on the Hub, in one commit."""

import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import AutoConfig

from hf_lowrank.errors import LowRankError
from hf_lowrank.folder.hub_errors import hub_problem, one_line
from hf_lowrank.jobs.files import read_json, write_json
from hf_lowrank.nn.configuration_lowrank import SOURCE_FILES
from hf_lowrank.nn.publishing_lowrank import CARD, RECORD, card_for, commit_files

# Cards are imported where they are written: with them come the tasks, and with those a second of imports.

# What belongs to a model. Checkpoints of a training, logs and pickles that may lie in the folder stay where they are.
UPLOADED = re.compile(
    r"(?!\.)[^/]+\.(json|safetensors|txt|model|jinja|png|svg)|additional_chat_templates/[^/]+\.jinja|LICENSE|NOTICE|"
    r"\d+_\w+/[^/]+\.(json|safetensors)|"  # what follows the transformer in a folder of sentence-transformers
    + "|".join(map(re.escape, (CARD, *SOURCE_FILES)))
)
TRAINING = {"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved low-rank model to the Hub in one commit, under the name `repo_id`, and return its address.

    Weights, config, source files, tokenizer, record and card. The card is for `repo_id`, and otherwise as it is in the
    folder.

    Args:
        folder: as `compress` and `save_pretrained` write it.
        repo_id: such as "me/bert-stsb-lowrank"; the repository is made if need be.
        private: whether only you see it, if it is made now; None for the Hub's default.
        revision: the branch to commit to, made if need be; None for the main one.
        create_pr: open a pull request instead of committing.
        message: the commit's; None for one that names the folder.
        token: of the Hub; None for the stored one.

    Raises:
        LowRankError: no low-rank model, no token or one that may not write there, no network, or a failing server.
    """
    folder = Path(folder)
    paths = _files(folder)
    if token is None:
        refuse_without_token()
    with tempfile.TemporaryDirectory() as scratch:
        paths[CARD] = Path(scratch) / CARD
        paths[CARD].write_text(_card(folder, repo_id), encoding="utf-8")
        message = message or f"Upload {folder.resolve().name}"
        try:
            commit = commit_files(paths, repo_id, message, None, private, token, revision, create_pr)
        except Exception as error:
            problem = hub_problem(error)
            if problem is None and not isinstance(error, ValueError):  # which the client raises of bad metadata
                raise
            problem = problem or one_line(error)
            raise LowRankError(f"{repo_id}: {problem}; nothing was committed") from error
    return str(commit.pr_url or commit.commit_url)


def refuse_without_token() -> None:
    """Raise where nobody is logged in to the Hub.

    Raises:
        LowRankError: neither a stored token nor one in the environment.
    """
    if get_token() is None:
        raise LowRankError("there is no Hub token: log in with 'hf auth login', or set HF_TOKEN")


def _files(folder: Path) -> dict[str, Path]:
    """{name: file} of what is published of a folder.

    Raises:
        LowRankError: it is not that of a low-rank model.
    """
    if not (folder / "config.json").is_file():
        raise LowRankError(f"{folder} is not a model: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise LowRankError(f"{folder} cannot be read as a model: {one_line(error)}") from error
    if not getattr(config, "ranks", None):
        raise LowRankError(f"{folder} is an ordinary {config.model_type} model: push it with transformers' push_to_hub")
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    chosen = {name: path for name, path in names.items() if UPLOADED.fullmatch(name) and name not in TRAINING}
    for needed in SOURCE_FILES:
        if needed not in chosen:
            raise LowRankError(f"{folder} lacks {needed}, which others need to load the model: save it again")
    if not any(name.endswith(".safetensors") for name in chosen):
        raise LowRankError(f"{folder} holds no weights (*.safetensors)")
    return chosen


def _card(folder: Path, repo_id: str) -> str:
    """The folder's card for the name `repo_id`, or one rendered from its record."""
    from hf_lowrank.folder.card import render_card, rendered_as

    record, path = read_json(folder / RECORD) if (folder / RECORD).is_file() else None, folder / CARD
    if record is not None and (not path.is_file() or rendered_as(folder, record) is not None):
        return render_card(record, repo_id)
    if path.is_file():
        return card_for(path.read_text(encoding="utf-8"), repo_id)
    raise LowRankError(f"{folder} has neither a card (README.md) nor the record to write one from ({RECORD})")


def card_from_report(model: Any, folder: Path, repo_id: str) -> bool:
    """Write the card and the record of a model that was compressed in this process."""
    from hf_lowrank.folder.card import card_facts, weights_bytes, write_card
    from hf_lowrank.folder.earlier import of_original

    report = model.compression_report
    if report is None:
        return False
    tokenizer = (folder / "tokenizer_config.json").is_file()
    report, facts = of_original(report, card_facts(model), model.name_or_path)
    record = {"tokenizer": tokenizer, **facts, **report.to_dict(), "weights_bytes": weights_bytes(folder)}
    write_json(folder / RECORD, record)
    write_card(folder, record, repo_id)
    return True
