"""What needs no model starts at once: the CPU time of help, of names and of mistakes, beyond that of Python alone."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 1.0  # half of it on a quiet machine (`python -m benchmarks startup`); torch and transformers take 3 to 9


def cpu_seconds(*words: str) -> tuple[float, int, str]:
    """(user and system time, exit code, stdout and stderr) of Python with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken, done.returncode, done.stdout + done.stderr


HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("analyze model --task stsb --output out --method fsvd", "the methods are svd"),
        ("analyze model --task stsb --output out --rank-ratio 2", "must be in (0, 1]"),
        ("sweep model --task stsb --output out --method fsvd", "the methods are svd"),
        ("sweep model --task stsb --output out --allocation fair", "unknown allocation 'fair'"),
        ("sweep model --task stsb --output out --value 1.5", "must be in (0, 1]"),
        ("compress model --task stsb --output out --allocation fair", "unknown allocation 'fair'"),
        ("compress model --task stsb --output out --method tfwsvd --optimizer newton", "unknown optimizer 'newton'"),
        ("compress model --task stsb --output out --form thick", "unknown form 'thick'"),
        ("compress model --task stsb --output out --gauge sharp", "unknown gauge 'sharp'; there are flat, balanced"),
        ("compress model --task stsb --output full", "full exists and is not empty"),
        ("statistics model --task stsb --output full", "full exists and is not empty"),
        ("statistics model --task stsb --output out --kind foo", "unknown statistic 'foo'"),
        ("finetune model --task stsb --output full", "full exists and is not empty"),
        ("finetune model --task stsb --output out --schedule cosine", "unknown schedule 'cosine'"),
        ("finetune model --task stsb --output out --batch-size 0", "a batch at least 1 row"),
        ("densify model full", "full exists and is not empty"),
        ("export model full", "full exists"),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(words: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    code = (
        "import sys\nfrom hf_lowrank.cli import main\n"
        f"sys.argv = ['hf-lowrank', *{words.split()}]\n"
        "try: main()\n"
        f"finally: print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "\n"), done.stderr
    assert done.stderr.startswith("hf-lowrank: ")
    assert done.stderr.count("\n") == 1
    assert shown in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_units_keep_their_letters_in_the_help() -> None:
    text = cpu_seconds("-m", "hf_lowrank", "compress", "--help")[2]
    assert "66.5M" in text
    assert "28M" in text


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ("--help", 0, "densify"),
        ("--version", 0, "hf-lowrank 0."),
        ("methods", 0, "Hua et al."),
        ("compress --help", 0, "--rank-ratio"),
        ("compres", 2, "compress"),
        ("compress --rank-ration 0.3", 2, "--rank-ratio"),
        ("compress model --task stsb --output out --method fsvd", 2, "the methods are svd"),
        ("compress model --task glue --output out", 2, "the tasks are cola"),
        ("evaluate model --task glue", 2, "the tasks are cola"),
        ("compress model --task stsb --output out --rank-ratio 1.5", 2, "must be in (0, 1]"),
    ],
)
def test_it_starts_at_once(words: str, code: int, shown: str) -> None:
    bare = cpu_seconds("-c", "pass")[0]
    taken = [cpu_seconds("-m", "hf_lowrank", *words.split())]
    if taken[0][0] - bare > SECONDS:  # once more: the machine is shared
        taken.append(cpu_seconds("-m", "hf_lowrank", *words.split()))
    assert min(seconds for seconds, *_ in taken) - bare <= SECONDS
    assert taken[0][1] == code
    assert shown in taken[0][2]
