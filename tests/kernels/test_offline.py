"""The offline compiler in a process of its own: it needs Triton's compiler, and the tests run under its interpreter."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import grpo_kernels
from grpo_kernels import offline

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="needs the Triton wheel"
)

KERNELS = Path(grpo_kernels.__file__).parent.parent

BAD_SPECIMENS = """
    import dataclasses

    import triton
    import triton.language as tl
    from grpo_kernels import fused_head
    from grpo_kernels.specimen import specimen_of


    @triton.jit
    def _softmax_kernel(x_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs)
        e = tl.exp(x - tl.max(x, 0))
        tl.store(x_ptr + offs, e / tl.sum(e, 0))


    def specimens():
        def softmax(name, block):
            constexprs = {"BLOCK": block}
            return specimen_of(name, _softmax_kernel, pointers={"x_ptr": "fp32"}, constexprs=constexprs, num_warps=1)

        yield softmax("good", 512)
        # 1024 values a thread
        yield softmax("spilling", 32768)
        yield dataclasses.replace(softmax("spilling rival", 32768), chosen=False)
        yield dataclasses.replace(softmax("without products", 512), uses_mma=True)
        yield softmax("not a power of two", 500)
        fused = next(s for s in fused_head.specimens() if s.archs == (80,))
        # 24 KiB a stage
        yield dataclasses.replace(fused, name="greedy", num_stages=9)
"""


def run(*arguments, path=(), **environment):
    """Exit code and both outputs."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(map(str, (*path, KERNELS))), **environment}
    command = [sys.executable, "-m", "grpo_kernels.offline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    return done.returncode, done.stdout, done.stderr


def rows_of(output):
    """name -> the row's other cells, of one chip's table."""
    rows = [re.split(r"  +", line) for line in output.splitlines()[1:] if re.search(r"  \d+ +\d+ +\d+", line)]
    return {name: cells for name, *cells in rows}


def test_one_configuration_of_every_kernel_passes_on_every_chip():
    code, output, errors = run("--quick")
    assert code == 0, output + errors
    for arch, instruction in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")):
        (fused,) = [line for line in output.splitlines() if line.startswith("fused ") and f"sm_{arch}" in line]
        assert re.search(rf" {instruction}$", fused), fused
    assert len(output.splitlines()) >= 3 * len(offline.MODULES)


@pytest.mark.slow
def test_every_configuration_passes_on_every_chip():
    code, output, errors = run()
    assert code == 0, output + errors


def test_bad_machine_code_fails_by_name(tmp_path):
    (tmp_path / "bad_specimens.py").write_text(textwrap.dedent(BAD_SPECIMENS))
    code, output, errors = run("--module", "bad_specimens", "--arch", "80", "--full", path=[tmp_path])
    assert code == 1, output + errors
    failures = dict(re.findall(r"^FAILS (.*), sm_80: (.*)$", output, flags=re.MULTILINE))
    assert set(failures) == {"spilling", "without products", "not a power of two", "greedy"}, output
    assert re.fullmatch(r"spills: [1-9]\d* bytes of stack, [1-9]\d* local loads and stores", failures["spilling"])
    assert "no matrix instruction: wanted" in failures["without products"]
    assert "does not compile" in failures["not a power of two"]
    assert "shared memory: " in failures["greedy"]
    rows = rows_of(output)
    assert rows["good"][3:5] == ["0", "0"]
    assert int(rows["spilling rival"][4]) > 0
    assert output.endswith("6 compiled, 4 failing\n")


def test_the_interpreter_is_refused():
    code, _, errors = run(TRITON_INTERPRET="1")
    assert code == 2
    assert "TRITON_INTERPRET is set" in errors


def test_a_missing_triton_is_named(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit, match="2"):
        offline.main([])
    assert "triton is not installed" in capsys.readouterr().err


def test_no_such_kernel_is_named():
    code, _, errors = run("--only", "flash attention")
    assert code == 2
    assert "no specimen's name contains 'flash attention'" in errors
