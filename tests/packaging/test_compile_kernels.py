"""Kernels build ahead of time for GPUs that are not here, within shared memory, and on sm_90 without spills."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PACKAGES = ("top_k", "cce_minus")
ARCHITECTURES = {"sm_80", "sm_90", "gfx942"}


def run(project, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def compiled(project, *arguments):
    done = run(project, "scripts/compile_kernels.py", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_covering_subset_builds(project, package):
    results = compiled(project, "--package", package, "--quick")
    assert {result["arch"] for result in results} == ARCHITECTURES
    assert all(result["registers"] > 0 and result["error"] == "" for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_every_shipped_setting_builds(project, package):
    assert {result["arch"] for result in compiled(project, "--package", package)} == ARCHITECTURES


def test_the_deterministic_backward_issues_no_atomic(project):
    found = compiled(project, "--package", "cce_minus", "--only", "alias logq", "--arch", "sm_90")
    atomics = {result["case"]: result["atomics"] for result in found}
    assert len(atomics) >= 15
    for case, count in atomics.items():
        adds = "positives" in case or ("backward" in case and "tile_hidden" not in case)
        assert (count > 0) == (adds and "deterministic" not in case), case


def test_one_negative_builds(project):
    """Triton makes a constant of the integer 1."""
    found = compiled(project, "--package", "cce_minus", "--only", "one negative", "--arch", "sm_90")
    assert sum("forward" in result["case"] for result in found) == 3
    assert all(result["error"] == "" for result in found)


def test_the_top_k_needs_no_atomics(project):
    results = compiled(project, "--package", "top_k", "--only", "nothing seen", "--arch", "sm_90")
    assert [result["atomics"] for result in results] == [0, 0]


def test_a_violation_is_one_line_and_a_failure(project):
    code = """
import dataclasses, sys
sys.path.insert(0, "scripts")
import compile_kernels as script

launch = dict(script.cases("top_k", "sm_90"))["top_k: merge, bf16, k1024"]
print(*script.measure("bad", "sm_90", dataclasses.replace(launch, constants={})).violations(), sep="\\n")
print(*script.Resources("spilling", "sm_90", stack=8, spills=2, shared=2048).violations(), sep="\\n")
script.ARCHITECTURES["sm_90"] = script.ARCHITECTURES["sm_90"][0], 1
sys.argv = ["compile_kernels", "--package", "top_k", "--arch", "sm_90", "--only", "merge, bf16, k1024"]
script.main()
"""
    done = run(project, "-c", code)
    unbuilt, spilling, *table = done.stdout.splitlines()
    assert unbuilt.startswith("bad on sm_90: does not build: ")
    assert spilling == "spilling on sm_90: 8 bytes of stack, 2 spilled registers, none are allowed"
    assert len(table) == 3
    assert done.returncode == 1
    # 4 or 8 KiB, as the release of triton has it
    line = r"top_k: merge, bf16, k1024 on sm_90: [48]\.0 KiB of shared memory, 1 are there"
    assert re.fullmatch(line, done.stderr.splitlines()[-1])


def test_stack_without_spills_is_refused_of_the_pinned_release_alone(project):
    code = """
import sys
sys.path.insert(0, "scripts")
import compile_kernels as script

for script.NO_STACK in (True, False):
    print(len(list(script.Resources("stack", "sm_90", stack=8, shared=2048).violations())))
"""
    assert run(project, "-c", code).stdout.split() == ["1", "0"]


def test_no_case_of_a_name_ends_in_one_line(project):
    done = run(project, "scripts/compile_kernels.py", "--package", "top_k", "--only", "no such case")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("error: no kernel case contains 'no such case'")
