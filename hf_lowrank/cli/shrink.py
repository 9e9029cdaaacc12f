"""hf-lowrank shrink: a compressed model cut further, in seconds, without data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lowrank.cli.app import command
from hf_lowrank.cli.budgets import BudgetOptions
from hf_lowrank.cli.console import console, print_json
from hf_lowrank.cli.options import JsonOption, ModelArgument, OverwriteOption, VerboseOption, refuse_taken


@dataclass(frozen=True, kw_only=True)
class ShrinkOptions:
    """The options of `hf-lowrank shrink`, in the order of its help."""

    output: Annotated[Path, typer.Option(help="Where the smaller model goes.")]
    budgets: BudgetOptions
    overwrite: OverwriteOption = False
    verbose: VerboseOption = False
    as_json: JsonOption = False


@command("shrink")
def shrink_command(context: typer.Context, model: ModelArgument, given: ShrinkOptions) -> None:
    """Cut a compressed model to a smaller size by what compress found each direction to be worth. It needs no data.

    Budgets count against the dense model. Layers that stayed dense stay so. Shrink before fine-tuning or healing:
    afterwards the worth of directions is no longer known.

    Example: hf-lowrank shrink ./bert-stsb-lowrank --keep 0.3 --output ./bert-stsb-smaller
    """
    refuse_taken(given.output, given.overwrite)

    from hf_lowrank.cli.work import claim
    from hf_lowrank.folder.directions import shrink_saved
    from hf_lowrank.folder.facts import public_name, versions
    from hf_lowrank.folder.loading import stored_dtype
    from hf_lowrank.folder.saving import save_compressed
    from hf_lowrank.folder.tokenizers import CONFIG, load_tokenizer, reads_images
    from hf_lowrank.jobs.distributed import refuse_several
    from hf_lowrank.model.locating import resolve

    refuse_several("shrink")
    claim(context, given.output, model)
    folder = resolve(model)
    smaller, report = shrink_saved(folder, **vars(given.budgets))
    tokenizer = load_tokenizer(folder) if (Path(folder) / CONFIG).is_file() or reads_images(str(folder)) else None
    facts: dict[str, Any] = {"base_model": public_name(model), "versions": versions()}
    save_compressed(smaller, tokenizer, report, given.output, given.overwrite, stored_dtype(model), **facts)
    if given.as_json:
        return print_json({**facts, "output": str(given.output), **report.to_dict()})
    console.print(report if given.verbose else report.summary(), highlight=False)
    console.print(f"saved to {given.output}", highlight=False)
