# SPDX-License-Identifier: Apache-2.0
"""What SLURM is told. tests/slurm asks a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import leyden
from leyden.errors import LeydenError, MisconfigurationException
from leyden.search import sbatch
from leyden.search.sbatch import Directive


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15:00", 900),
        ("0:30", 30),
        ("1:30:05", 5405),
        ("2-00:00:00", 172800),
        ("1-02:03:04", 93784),
        ("15", 900),
        ("1-2", 93600),
        ("1-2:30", 95400),
    ],
)
def test_a_walltime_is_read_as_slurm_reads_it(text: str, seconds: int) -> None:
    assert sbatch.walltime_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-1", "1h", "UNLIMITED", None])
def test_a_walltime_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"job_time=.*\[\[days-\]hours:\]minutes:seconds"):
        sbatch.walltime_seconds(text)


def test_a_script_is_shell_with_directives_first() -> None:
    text = sbatch.script(
        "two\nlines",
        [
            Directive("--time", "15:00", "how long"),
            Directive("exclusive", None, ""),
            Directive("output", "/a b/%%x", ""),
        ],
        {"A": "1"},
        ["cuda/12"],
        ["source env"],
        "python x.py",
    )
    lines = [line for line in text.splitlines() if line]
    assert lines == [
        "#!/bin/bash", "# two", "# lines", "# how long", "#SBATCH --time=15:00", "#SBATCH --exclusive",
        '#SBATCH --output="/a b/%%x"', "export A=1", "module load cuda/12", "source env", "srun python x.py",
    ]  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    "directive", [Directive("comment", 'a "b"', ""), Directive("a", "b\nc", ""), Directive("a", "b", "c\nd")]
)
def test_what_a_script_cannot_hold_is_refused(directive: Directive) -> None:
    with pytest.raises(MisconfigurationException, match="cannot hold"):
        sbatch.script("", [directive], {}, [], [], "x")


def test_a_percent_sign_in_a_path_is_no_placeholder() -> None:
    assert sbatch.log_name(Path("/a/50%/x")) == "/a/50%%/x"


def fake_sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "sbatch"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_no_sbatch_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MisconfigurationException, match="no `sbatch` on the path.*login node.*optimize_parallel_cpu"):
        sbatch.find_sbatch()


def test_the_number_of_a_job_is_returned_without_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, 'echo "12;$2"', monkeypatch)
    assert sbatch.submit(Path("x.sh"), {}) == "12"


def test_a_refusal_is_passed_on_in_slurms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, 'echo "invalid partition" >&2; exit 3', monkeypatch)
    with pytest.raises(LeydenError, match=r"refused x.sh \(exit code 3\): invalid partition"):
        sbatch.submit(Path("x.sh"), {})


def test_a_busy_controller_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    body = f'if [ -e {tmp_path}/x ]; then echo 7; else >{tmp_path}/x; echo "Socket timed out" >&2; exit 1; fi'
    fake_sbatch(tmp_path, body, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert sbatch.submit(Path("x.sh"), {"PATH": "/bin:/usr/bin"}) == "7"
    assert "trying again" in capsys.readouterr().err


def test_what_slurm_set_for_a_job_does_not_leak_into_the_next() -> None:
    inside = {
        "PATH": "p", "SLURM_CONF": "c", "SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "5", "SRUN_CPUS_PER_TASK": "2",
        "PMI_RANK": "0", "CUDA_VISIBLE_DEVICES": "3",
    }  # fmt: skip
    assert sbatch.outside_of_the_job(inside) == {"PATH": "p", "SLURM_CONF": "c", "CUDA_VISIBLE_DEVICES": "3"}
    assert sbatch.outside_of_the_job({**inside, "SLURM_JOB_GPUS": "3"}) == {"PATH": "p", "SLURM_CONF": "c"}


@pytest.mark.parametrize("way", [["script.py"], ["-m", "package.script"], ["-m", "package"]])
def test_the_program_that_a_job_runs_again(tmp_path: Path, way: list[str]) -> None:
    text = "import sys\nfrom leyden.search.sbatch import python_program\nprint(python_program())\n"
    (tmp_path / "package").mkdir()
    for name in ("script.py", "package/script.py", "package/__main__.py", "package/__init__.py"):
        (tmp_path / name).write_text(text if "__init__" not in name else "")
    done = subprocess.run([sys.executable, *way, "--a", "b c"], cwd=tmp_path, capture_output=True, text=True, env=env())
    expected = [str(tmp_path / way[0])] if len(way) == 1 else way
    assert done.stdout.strip() == repr([*expected, "--a", "b c"]), done.stderr


def test_an_interactive_session_cannot_be_run_again() -> None:
    code = "from leyden.search.sbatch import python_program; python_program()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env())
    assert "Put the search into a .py file" in done.stderr


def env() -> dict[str, str]:
    """This process's environment, with the folder of leyden on the path wherever a process runs."""
    return {**os.environ, "PYTHONPATH": str(Path(leyden.__file__).parent.parent)}
