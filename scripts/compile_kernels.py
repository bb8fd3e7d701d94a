"""Compile every kernel ahead of time for GPUs that are not there, and say what each one uses.

    python scripts/compile_kernels.py
    python scripts/compile_kernels.py --package top_k --arch sm_90 --only merge --json

A launch planned on meta tensors is specialised as a real one would be, and built for each architecture. The exit status
is 1, with one line each on stderr, if a kernel does not build, wants more shared memory than a program may have, or
spills registers on sm_90. Results are kept in Triton's own cache, so a second run is fast.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Under the interpreter `triton.jit` gives Python functions, which no compiler takes.
os.environ.pop("TRITON_INTERPRET", None)
# The default, said aloud: Triton 3.9 warns once per process where nobody has chosen.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import Launch

# Packages of kernels, and the module of each whose `compile_cases(arch)` yields names and launches.
PACKAGES = {"top_k": "kernels.top_k.triton_top_k", "cce_minus": "kernels.cce_minus.compile_cases"}

# Target and the shared memory (LDS) in KiB that one program may have.
ARCHITECTURES = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
NO_SPILLS = ("sm_90",)
# Launch settings are chosen for this release. Others allocate registers otherwise: 3.6 takes up to 240 bytes of stack
# in some cases and spills nothing, which the table reports and no more.
NO_STACK = triton.__version__.startswith("3.9.")

# Constants of kernels that a table of launch settings chooses, or is keyed by.
_ROW = ("B", "C", "W", "DOT", "PRECISION")

_TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_ATOMICS = {"ptx": r"\s(?:atom|red)\.", "amdgcn": r"\b(?:global|flat|buffer|ds)_(?:pk_)?(?:atomic|cmpst|add)_"}
_ALIGNMENT = 16
_BUFFER_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Resources:
    """What one compiled case uses per thread (registers, stack bytes, spilled registers) and per program (bytes)."""

    case: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    atomics: int = 0
    error: str = ""

    def violations(self) -> Iterator[str]:
        """One line for each thing that must not be."""
        name = f"{self.case} on {self.arch}"
        limit = ARCHITECTURES[self.arch][1]
        if self.error:
            yield f"{name}: does not build: {self.error}"
        if self.shared > limit * 1024:
            yield f"{name}: {self.shared / 1024:.1f} KiB of shared memory, {limit} are there"
        if self.arch in NO_SPILLS and (self.spills or (self.stack and NO_STACK)):
            yield f"{name}: {self.stack} bytes of stack, {self.spills} spilled registers, none are allowed"


def specialised(launch: Launch, target: GPUTarget) -> ASTSource:
    """Source of a kernel specialised to the arguments of a launch, by the rules a real launch follows.

    An integer 1 and None become constants, integers and addresses divisible by 16 are marked as such, except where the
    kernel asks not to; tensors below 2 GiB are marked for the buffer instructions of AMD.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        given = launch.constants if parameter.is_constexpr else launch.arguments
        value = given.get(parameter.name, parameter.default)
        specialise = not parameter.do_not_specialize
        aligned = False
        if parameter.is_constexpr or value is None or (specialise and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place,] = value
            continue
        if isinstance(value, Tensor):
            kind = "*" + _TYPE_NAMES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % _ALIGNMENT == 0
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % _ALIGNMENT == 0
        else:
            kind = "fp32"
        signature[parameter.name] = parameter.annotation_type or kind
        marks: list[list[Any]] = []
        if aligned and specialise and not parameter.do_not_specialize_on_alignment:
            marks.append(["tt.divisibility", _ALIGNMENT])
        within_buffer = isinstance(value, Tensor) and value.untyped_storage().nbytes() <= _BUFFER_BYTES
        if within_buffer and target.backend == "hip" and specialise:
            marks.append(["tt.pointer_range", 32])
        if marks:
            attributes[place,] = marks
    return ASTSource(launch.kernel, signature, constants, attributes)


def measure(case: str, arch: str, launch: Launch) -> Resources:
    """Compile one launch and read its resources; an error becomes one line of the result."""
    target, _ = ARCHITECTURES[arch]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    try:
        compiled = triton.compile(specialised(launch, target), target=target, options=options)
        if target.backend == "cuda":
            used, language = _cubin_resources(compiled.asm["cubin"]), "ptx"
        else:
            used, language = _amdgcn_resources(compiled.asm["amdgcn"]), "amdgcn"
    except Exception as error:  # a compiler fails in many ways; each is a line of the report
        return Resources(case, arch, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    atomics = len(re.findall(_ATOMICS[language], compiled.asm[language]))
    return Resources(case, arch, *used, int(compiled.metadata.shared), atomics)


def _cubin_resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory of a cubin; spilled registers lie on the stack."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(_cuobjdump()), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]), int(found["LOCAL"])


def _cuobjdump() -> Path:
    spec = importlib.util.find_spec("triton.backends.nvidia")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("triton has no NVIDIA backend, whose cuobjdump reads registers and stack")
    return Path(spec.origin).parent / "bin" / "cuobjdump"


def _amdgcn_resources(assembly: str) -> tuple[int, int, int]:
    """Vector registers, scratch and spilled registers; scalar ones spill into lanes of a vector register."""

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else 0

    spills = number(r"\.vgpr_spill_count:\s*(\d+)") + number(r"\.sgpr_spill_count:\s*(\d+)")
    return number(r"\.vgpr_count:\s*(\d+)"), number(r"ScratchSize:\s*(\d+)"), spills


def cases(package: str, arch: str) -> list[tuple[str, Launch]]:
    """Every case of a package, none where it has no kernels yet."""
    name = PACKAGES[package]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return []
    return [(f"{package}: {case}", launch) for case, launch in module.compile_cases(arch)]


def covering(found: Iterable[tuple[str, Launch]], thorough: bool) -> list[tuple[str, Launch]]:
    """Few cases, chosen greedily, in which every shipped setting of each kernel occurs.

    Thorough, every constant and argument type of each kernel occurs as well.
    """
    left = {name: (launch, _features(launch, thorough)) for name, launch in found}
    missing = set().union(*(features for _, features in left.values()))
    chosen = []
    while missing:
        name = max(left, key=lambda name: len(left[name][1] & missing))
        launch, features = left.pop(name)
        missing -= features
        chosen.append((name, launch))
    return chosen


def _features(launch: Launch, thorough: bool) -> set[tuple[str, ...]]:
    kinds = {name: str(v.dtype if isinstance(v, Tensor) else type(v)) for name, v in launch.arguments.items()}
    settings = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    features = {(launch.kernel.__name__, name, str(v)) for name, v in (launch.constants | settings | kinds).items()}
    # a row of a table of launch settings: sizes of blocks and how operands are multiplied, whatever the problem's sizes
    shipped = {name: v for name, v in launch.constants.items() if name in _ROW} | settings
    row: set[tuple[str, ...]] = {(launch.kernel.__name__, str(sorted(shipped.items(), key=str)))}
    return row | features if thorough else row


@dataclass(frozen=True)
class Job:
    """One case to compile. Kernels do not travel between processes: a worker plans again and finds it by its number."""

    packages: tuple[str, ...]
    arch: str
    only: str
    quick: bool
    number: int = 0

    def run(self) -> Resources:
        """Compile the case."""
        name, launch = selected(replace(self, number=0))[self.number]
        return measure(name, self.arch, launch)


@functools.cache
def selected(job: Job) -> list[tuple[str, Launch]]:
    """The cases that a job chooses from, in an order that every process finds again."""
    found = [case for package in job.packages for case in cases(package, job.arch) if job.only in case[0]]
    return covering(found, thorough=job.arch in NO_SPILLS) if job.quick else found


def main() -> None:
    """Parse the command line, compile in parallel, print the table, and end with the violations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=tuple(PACKAGES), nargs="+", default=list(PACKAGES))
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a subset that shows every setting of a kernel once")
    parser.add_argument("--json", action="store_true", help="a JSON list in place of the table")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    jobs = []
    for arch in args.arch:
        job = Job(tuple(args.package), arch, args.only, args.quick)
        jobs += [replace(job, number=number) for number in range(len(selected(job)))]
    if not jobs:
        parser.error(f"no kernel case contains {args.only!r}")
    start, done = time.monotonic(), []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(job.run): job for job in jobs}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:  # LLVM ends the process where it meets what it cannot do
                job = futures[future]
                result = Resources(selected(replace(job, number=0))[job.number][0], job.arch, error="a compiler died")
            done.append(result)
            progress = f"{len(done):>{len(str(len(jobs)))}}/{len(jobs)}"
            print(f"{progress} {time.monotonic() - start:4.0f} s  {result.case} on {result.arch}", file=sys.stderr)
    done.sort(key=lambda result: (args.arch.index(result.arch), result.case))
    if args.json:
        print(json.dumps([asdict(result) for result in done], indent=1))
    else:
        print("| kernel case | architecture | registers | stack bytes | spills | shared KiB | atomics |")
        print("|---|---|---|---|---|---|---|")
        for r in done:
            shared = f"{r.shared / 1024:.1f}"
            print(f"| {r.case} | {r.arch} | {r.registers} | {r.stack} | {r.spills} | {shared} | {r.atomics} |")
    wrong = [line for result in done for line in result.violations()]
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
