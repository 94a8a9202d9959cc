"""Compiles every kernel for GPUs that are not here, and refuses machine code that spills.

`python -m grpo_kernels.offline` prints one table and exits with 1 if a gate fails: on the configurations that a launch
can pick, no register is spilled, shared memory fits the chip, and kernels that multiply use its matrix instruction.
The assembler and disassembler are those of the Triton wheel; no GPU or CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from grpo_kernels.specimen import Specimen

MODULES = (
    "grpo_kernels.fused_head",
    "grpo_kernels.tile_kernels",
    "grpo_kernels.kept_kernels",
    "grpo_kernels.row_kernels",
    "grpo_kernels.policy_loss_kernel",
    "grpo_kernels.adamw_kernel",
)
REGISTERS_PER_SM = 65536
THREADS_PER_SM = 2048
# columns of tensor memory, in which sm_100 accumulates
TENSOR_COLUMNS_PER_SM = 512


@dataclass(frozen=True)
class Chip:
    """What a compute capability offers: shared bytes of one program and of one SM, and its matrix instruction."""

    shared_limit: int
    shared_per_sm: int
    mma: str


CHIPS = {
    80: Chip(shared_limit=163 << 10, shared_per_sm=164 << 10, mma=r"\bHMMA\b"),
    90: Chip(shared_limit=227 << 10, shared_per_sm=228 << 10, mma=r"\bHGMMA\b"),
    100: Chip(shared_limit=227 << 10, shared_per_sm=228 << 10, mma=r"\bUTC[A-Z]*MMA\b"),
}


@dataclass(frozen=True)
class Row:
    """What the compiler made of one specimen on one chip.

    Attributes:
        name: The specimen.
        arch: Compute capability, 10 * major + minor.
        warps: Warps of a program.
        registers: Registers of a thread.
        stack: Bytes of stack of a thread.
        spills: Loads from and stores to local memory in the machine code.
        shared: Bytes of shared memory of a program.
        programs: Programs that fit one SM at a time.
        mma: The matrix instructions of the machine code, or "".
        failures: The gates it misses.
    """

    name: str
    arch: int
    warps: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    programs: int = 0
    mma: str = ""
    failures: tuple[str, ...] = ()


def load(modules: Iterable[str]) -> list[Specimen]:
    """The specimens of all modules, in order; their names must be unique."""
    specimens = [specimen for module in modules for specimen in importlib.import_module(module).specimens()]
    names = [specimen.name for specimen in specimens]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"specimens must have unique names, got {sorted(repeated)} more than once")
    return specimens


def compile_one(specimen: Specimen, arch: int) -> Row:
    """Compile one specimen and judge its machine code; what does not compile is a row with that failure."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    names = list(specimen.signature)
    source = ASTSource(
        specimen.kernel,
        signature=dict(specimen.signature),
        constexprs=dict(specimen.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned},
    )
    # what a launch gets by default, said here because Triton 3.9 warns while it is left unsaid
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # a pass that fails surfaces as a RuntimeError without further type
    except (TritonError, RuntimeError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Row(specimen.name, arch, failures=(f"does not compile: {message}",))
    tensor_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return judge(
        specimen,
        arch,
        disassemble(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        tensor_columns=tensor_columns,
    )


def disassemble(cubin: bytes) -> str:
    """Resource usage and machine code of a cubin, as `cuobjdump` prints them."""
    import triton

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [str(binaries / "cuobjdump"), "-res-usage", "-sass", file.name]
        # -sass calls the nvdisasm of the path
        path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
        done = subprocess.run(dump, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    return done.stdout


def judge(specimen: Specimen, arch: int, text: str, *, shared: int, tensor_columns: int) -> Row:
    """The row of a specimen from its disassembly."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text[:1000]
    registers, stack = int(usage[1]), int(usage[2])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    found = sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTC[A-Z]*MMA)\b", text)))
    chip = CHIPS[arch]
    failures = []
    if specimen.chosen and (stack or spills):
        failures.append(f"spills: {stack} bytes of stack, {spills} local loads and stores")
    if shared > chip.shared_limit:
        failures.append(f"shared memory: {shared} bytes of {chip.shared_limit}")
    if specimen.uses_mma and not any(re.fullmatch(chip.mma, name) for name in found):
        failures.append(f"no matrix instruction: wanted {chip.mma}, found {found or 'none'}")
    threads = 32 * specimen.num_warps
    # registers are given out 8 to a thread, and 1 KiB of shared memory is reserved for each program
    limits = [
        REGISTERS_PER_SM // (-(-registers // 8) * 8 * threads),
        THREADS_PER_SM // threads,
        chip.shared_per_sm // (shared + 1024),
        TENSOR_COLUMNS_PER_SM // tensor_columns if tensor_columns else 32,
    ]
    return Row(
        name=specimen.name,
        arch=arch,
        warps=specimen.num_warps,
        registers=registers,
        stack=stack,
        spills=spills,
        shared=shared,
        programs=min(*limits, 32),
        mma="+".join(found),
        failures=tuple(failures),
    )


def _compile_named(modules: Sequence[str], name: str, arch: int) -> Row:
    # a kernel does not travel between processes; its name does
    (specimen,) = [specimen for specimen in load(modules) if specimen.name == name]
    return compile_one(specimen, arch)


def compile_all(modules: Sequence[str], pairs: Sequence[tuple[str, int]], *, jobs: int) -> list[Row]:
    """The rows of specimens, given by name, on chips, compiled by `jobs` processes."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile_named, modules, name, arch) for name, arch in pairs]
        return [future.result() for future in futures]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'kernel':{width}}  arch  warps  regs  stack  spills  shared KiB  programs/SM  mma"]
    for row in rows:
        lines.append(
            f"{row.name:{width}}  {row.arch:4}  {row.warps:5}  {row.registers:4}  {row.stack:5}  {row.spills:6}"
            f"  {row.shared / 1024:10.1f}  {row.programs:11}  {row.mma or '-'}{'  FAILS' if row.failures else ''}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and the failing rows, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m grpo_kernels.offline", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--only", default="", metavar="TEXT", help="compile the specimens whose name contains this")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="one configuration of each kernel and chip")
    extent.add_argument("--full", action="store_true", help="also configurations that no launch picks")
    parser.add_argument("--module", nargs="+", default=MODULES, metavar="NAME", help="modules with a specimens()")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, which replaces the compiler; unset it")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    specimens = [s for s in load(options.module) if options.only in s.name and (s.chosen or options.full)]
    pairs = [(s, arch) for s in specimens for arch in options.arch if s.archs is None or arch in s.archs]
    if options.quick:
        # a dict keeps the last of a key
        pairs = list({(s.kernel, arch): (s, arch) for s, arch in reversed(pairs)}.values())[::-1]
    if not pairs:
        parser.error(f"no specimen's name contains {options.only!r}")
    rows = compile_all(options.module, [(s.name, arch) for s, arch in pairs], jobs=options.jobs)
    sys.stdout.write(table(rows) + "\n")
    failing = [row for row in rows if row.failures]
    for row in failing:
        sys.stdout.write(f"FAILS {row.name}, sm_{row.arch}: {'; '.join(row.failures)}\n")
    sys.stdout.write(f"{len(rows)} compiled, {len(failing)} failing\n")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
