"""The command `python -m benchmarks`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets.utils.logging import disable_progress_bar

from benchmarks import (
    attention,
    billion,
    blockwise,
    calibration,
    compiled,
    convergence,
    convolutions,
    coverage,
    engines,
    experts,
    factorization,
    fisher,
    gauge,
    gpu,
    graphs,
    heal,
    house,
    labels,
    layer,
    lm,
    lm_bytes,
    lm_ranks,
    loading,
    memory,
    model_speed,
    mutation,
    profile_compress,
    quantized,
    reading,
    residual,
    scaling,
    sequential,
    shrink,
    startup,
    tasks,
    tokens,
    truncated_svd,
)
from benchmarks.harness import Options, Result, machine_facts
from hf_lowrank.errors import LowRankError
from hf_lowrank.tasks import TASKS

BENCHMARKS: dict[str, Callable[[Options], Result]] = {
    "fisher": fisher.run,
    "truncated_svd": truncated_svd.run,
    "layer": layer.run,
    "model_speed": model_speed.run,
    "compiled": compiled.run,
    "loading": loading.run,
    "startup": startup.run,
    "profile": profile_compress.run,
    "factorization": factorization.run,
    "memory": memory.run,
    "blockwise": blockwise.run,
    "billion": billion.run,
    "reading": reading.run,
    "scaling": scaling.run,
    "calibration": calibration.run,
    "attention": attention.run,
    "sequential": sequential.run,
    "bytes": quantized.run,
    "graphs": graphs.run,
    "residual": residual.run,
    "convergence": convergence.run,
    "coverage": coverage.run,
    "convolutions": convolutions.run,
    "engines": engines.run,
    "experts": experts.run,
    "gauge": gauge.run,
    "heal": heal.run,
    "shrink": shrink.run,
    "house": house.run,
    "labels": labels.run,
    "mutation": mutation.run,
    "lm": lm.run,
    "lm_bytes": lm_bytes.run,
    "lm_ranks": lm_ranks.run,
    "gpu": gpu.run,
    "tasks": tasks.run,
    "tokens": tokens.run,
}

NEED_MODEL = (
    "attention",
    "bytes",
    "calibration",
    "graphs",
    "engines",
    "heal",
    "labels",
    "profile",
    "residual",
    "sequential",
    "shrink",
)
# Too long, for few machines, or with packages of their own:
BY_NAME = ("billion", "blockwise", "engines", "mutation", "lm", "lm_bytes", "lm_ranks", "tokens", "gpu")

DESCRIPTION = """\
Measure what the library's speed and memory claims rest on. Each benchmark prints a Markdown table and writes a JSON.

  fisher         compute_fisher / an ordinary training pass, and / one sample at a time    about 8 minutes
  truncated_svd  the closed form's SVD against those of PyTorch                            under a minute
  layer          LowRankLinear against nn.Linear                                           under a minute
  model_speed    low-rank MiniLM and BERT-base shapes against the dense ones               about 3 minutes
  compiled       blocks of BERT-base by torch.compile and with packed weights              about 5 minutes
  loading        loading low-rank and dense BERT-base shapes, and their first outputs      under a minute
  startup        CPU time of --help, of names and of mistyped words                       under a minute
  profile        where the time of compress goes; needs --model                            about 2 minutes for MiniLM
  factorization  ranks and factors against decomposing every layer once, 50M parameters   about a minute
  memory         peak memory of compress, in a process of its own                          about 2 minutes
  blockwise      peak memory of compress by blocks, Llamas of 8 to 64 blocks of width 1,024 about 30 minutes
  billion        compress by blocks of a Llama of 1.1 billion weights under a limit of 3 GB about 40 minutes
  scaling        two processes against one                                                 about 2 minutes
  labels         labels of the data, drawn, and of the model, by three seeds; needs --model about 15 minutes for MiniLM
  calibration    scores over samples of statistics, seeds and damping; needs --model       about 15 minutes for MiniLM
  attention      q, k, v, o factorized together and apart; needs --model                   about 20 minutes for MiniLM
  sequential     factors behind the compressed prefix against one-shot ones; needs --model about 20 minutes for MiniLM
  bytes          score by bytes, low rank with int8 and int4, by --seed; needs --model     about 20 minutes for MiniLM
  graphs         the same models in ONNX Runtime, with their speed; needs --model          about 8 minutes for MiniLM
  residual       low rank as what rounding lost, at equal bytes; needs --model             about 6 minutes for MiniLM
  convergence    every optimizer of TFWSVD's objective, as a table and a plot              about 5 minutes
  coverage       which model types survive compression, saving and loading                 about 2 minutes, --all: 30
  convolutions   a small ResNet with its convolutions factorized, on scikit-learn's digits about 2 minutes
  engines        dense and low rank in PyTorch, ONNX Runtime, OpenVINO; needs --model      about 6 minutes for MiniLM
  experts        a small Mixtral with its experts factorized: scores, and speed            about 2 minutes
  gauge          what rounding to int8 and int4 costs, by gauge; needs --model             about 20 minutes for MiniLM
  heal           scores before and after healing, and its cost; needs --model              about 25 minutes for MiniLM
  shrink         compressed anew, and cut further without data; needs --model            about 4 minutes for MiniLM
  lm             a small Llama, trained here by lm --train, made smaller in every way       an hour each
  lm_bytes       the same model in 8 and 4 bits, dense and low rank, and within bytes   about 15 minutes
  lm_ranks       the same model by shares of its ranks, before and after healing        half an hour a seed
  gpu            statistics, factors, layers and decoding at Llama-3-8B's shapes, on one GPU  8 minutes at most
  house          the rooms of the library, and the arrows between them                     seconds
  tasks          a small model of every kind of task, a third of its ranks kept          about 2 minutes
  tokens         moments without first, outlying or large tokens; of lm's model or --model   minutes
  mutation       small faults put into three rooms, and the share that tests notice       an hour; needs [mutation]

Speeds are compared within one run, the competitors taking turns, as ratios: median (min–max) over the rounds.
Nothing is downloaded: models are randomly initialised and data made up, unless --model gives a real one.
"""

EXAMPLES = """\
examples:
  python -m benchmarks layer truncated_svd
  python -m benchmarks lm --train && python -m benchmarks lm
  python -m benchmarks convergence --model ./bert-stsb --task stsb --data-dir ./stsb
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; the exit code is 2 for bad input."""
    given = _parser().parse_args(arguments)
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        print(f"there is no benchmark {unknown[0]!r}, only {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if (given.model is None) != (given.task is None):
        print("--model and --task belong together: the task says which data the model's Fisher is of", file=sys.stderr)
        return 2
    for option, folder in (("--cache", given.cache), ("--output", given.output)):
        if folder is not None and folder.exists() and not folder.is_dir():
            print(f"{option} takes a folder, and {folder} is a file", file=sys.stderr)
            return 2
    disable_progress_bar()
    torch.set_num_threads(given.threads)
    options = Options(
        threads=given.threads,
        rounds=given.rounds,
        model=given.model,
        task=given.task,
        data_dir=given.data_dir,
        all_layers=given.all_layers,
        everything=given.all,
        sample=given.sample,
        seed=given.seed,
        output=given.output,
        train=given.train,
        cache=given.cache,
        tokens=given.tokens,
        json=given.json,
        methods=tuple(given.method) if given.method else None,
    )
    try:
        for name in given.names or _by_default(given.model is not None):
            _run(name, options, given.output)
    except LowRankError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _by_default(with_model: bool) -> list[str]:
    """What is run where nothing is named."""
    return [name for name in BENCHMARKS if name not in BY_NAME and (with_model or name not in NEED_MODEL)]


def _run(name: str, options: Options, folder: Path) -> None:
    facts = machine_facts()
    result = BENCHMARKS[name](options)
    print(result.markdown(), end="\n\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "title": result.title,
        "machine": facts,
        "rounds": options.rounds,
        "table": result.rows,
        "notes": result.notes,
        **result.figures,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, it is {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; default: all, without {', '.join(BY_NAME)} and, unless there is a --model, "
        f"{' and '.join(NEED_MODEL)}",
    )
    parser.add_argument("--threads", type=_positive, default=1, help="of PyTorch; 1 is the steadiest (default: 1)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns that each competitor takes (default: 5)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder for JSON (default: benchmarks/results)"
    )
    parser.add_argument("--all-layers", action="store_true", help="convergence: every layer of --model, not a few")
    parser.add_argument("--sample", type=_positive, default=200, help="mutation: mutants to try (default: 200)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="mutation: which mutants; bytes, graphs, lm_bytes, lm_ranks: which samples (default: 0)",
    )
    parser.add_argument("--all", action="store_true", help="coverage: every model type that transformers knows")
    parser.add_argument(
        "--model",
        help=f"{', '.join(NEED_MODEL)}, convergence, tokens: a real model, a folder or a name on the Hub",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="lm: train the model, or go on where that was interrupted: an hour on one core "
        "with bfloat16 instructions, several without",
    )
    parser.add_argument("--tokens", type=_positive, help="lm: tokens that it is trained on (default: 6 million)")
    parser.add_argument(
        "--cache",
        type=Path,
        help="lm, lm_*, tokens: lm's text and model (default: the Hub's cache); blockwise, billion: what is done",
    )
    parser.add_argument("--json", type=Path, help="gpu: the file that its figures are written into as they come")
    parser.add_argument(
        "--method",
        action="append",
        choices=lm.ORDER,
        metavar="NAME",
        help=f"lm, tokens: only this of {', '.join(lm.ORDER)}",
    )
    parser.add_argument("--task", choices=list(TASKS), help="what the model was fine-tuned on")
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the task's train and validation files (default: the Hub's)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
