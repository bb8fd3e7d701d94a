"""Guards of the house: who imports whom, what the wheel holds, which commands the README promises."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import yaml

PACKAGES = ("lightning_modules", "datamodules", "kernels")
MAY_NOT_IMPORT = {
    "kernels": {"lightning_modules", "datamodules"},
    "datamodules": {"lightning_modules", "kernels"},
    "lightning_modules": {"datamodules"},
}
# Plain mathematics: usable without Lightning.
FREE_OF_LIGHTNING = ("lightning_modules/networks", "lightning_modules/losses", "lightning_modules/metrics")
FREE_OF_LIGHTNING += ("lightning_modules/portfolio", "lightning_modules/topology", "lightning_modules/attacks")
FREE_OF_LIGHTNING += ("lightning_modules/context",)
FREE_OF_LIGHTNING += ("lightning_modules/ranking.py", "lightning_modules/baselines.py")


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(file)}


def python_files(project: Path, place: str) -> list[Path]:
    path = project / place
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    assert files, f"nothing at {place}"
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_downwards(project, package):
    for file in python_files(project, package):
        wrong = roots(file) & (MAY_NOT_IMPORT[package] | {"scripts", "tests"})
        assert not wrong, f"{file.relative_to(project)} imports {wrong}"


def test_kernels_import_torch_triton_and_the_standard_library_only(project):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "kernels"}
    for file in python_files(project, "kernels"):
        assert roots(file) <= allowed, f"{file.relative_to(project)} imports {roots(file) - allowed}"


@pytest.mark.parametrize("place", FREE_OF_LIGHTNING)
def test_mathematics_is_free_of_lightning(project, place):
    for file in python_files(project, place):
        wrong = roots(file) & {"lightning", "pytorch_lightning"}
        assert not wrong, f"{file.relative_to(project)} imports {wrong}"


def test_the_import_guard_sees_every_form_of_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import datamodules.splits as s\ndef f():\n    from kernels import cce_minus\n")
    assert roots(file) == {"datamodules", "kernels"}


def test_no_test_imports_another_and_nobody_imports_scripts(project):
    for file in python_files(project, "tests") + python_files(project, "scripts"):
        assert not roots(file) & {"tests", "scripts", "conftest"}, file


def test_top_level_holds_what_it_should(project):
    tracked = subprocess.run(["git", "ls-files"], cwd=project, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in tracked.splitlines() if "/" in line}
    assert {name for name in folders if not name.startswith(".")} == {*PACKAGES, "configs", "tests", "scripts"}


def test_our_kernels_is_the_one_that_is_imported(project):
    """Another distribution called `kernels` exists: this environment must not hold it."""
    spec = importlib.util.find_spec("kernels")
    assert Path(spec.origin).resolve() == project / "kernels" / "__init__.py"


def test_packages_import_without_the_extras():
    """giotto-tda is AGPL and the others are optional: nothing imports them until it is used."""
    code = (
        "import sys, lightning_modules.cli, lightning_modules.portfolio.walk, lightning_modules.topology, datamodules;"
        "optional = {'gtda', 'gudhi', 'sklearn', 'clarabel', 'sktime', 'tslearn', 'lightgbm', 'wandb'};"
        "extras = optional & set(sys.modules);"
        "assert not extras, extras"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wheel_holds_the_three_packages_and_their_data(project, tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(project)]
    # The build leaves build/ and *.egg-info behind in the source folder: build from a copy of what git tracks.
    copy = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, files):
        source = project / name.decode()
        if source.is_file():
            target = copy / name.decode()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command[-1] = str(copy)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    assert "datamodules/bundled/online_retail/transactions.parquet" in names
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert b"seqlit = lightning_modules.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_every_dependency_is_pinned(project):
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    wanted = [*settings["dependencies"], *chain(*settings["optional-dependencies"].values())]
    names = {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower().replace("_", "-") for line in wanted} - {"seqlit"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (project / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= pinned, names - pinned


def test_readme_commands_exist(project):
    """Every `bash <script>`, `python <script>`, and every config a document's `seqlit` command names is there."""
    documents = [project / "README.md", *project.glob("configs/*/README.md"), *project.glob("kernels/*/README.md")]
    seen = set()
    for document in documents:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"(?:bash|python) ((?:scripts|\.ci)/[\w./-]+)", text)
        named += re.findall(r"--config (configs/[\w./-]+\.yaml)", text)
        for name in named:
            assert (project / name).is_file(), f"{document.relative_to(project)} names {name}"
            seen.add(name)
        for word in re.findall(r"\bseqlit (\w+)\b --", text):
            known = {"fit", "validate", "test", "predict", "audit"}
            assert word in known, f"{document.relative_to(project)}: seqlit {word}"
    assert {"scripts/quickstart.sh", "scripts/test.sh", "configs/sasrec_cce/online_retail.yaml"} <= seen


def test_configs_type_no_linked_fact_and_no_dict_kwargs(project):
    from lightning_modules.cli import LINKS

    for file in sorted(project.glob("configs/*/*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "model" not in config:
            continue  # of the trainer alone, or of a sweep
        typed = set(config["model"]["init_args"]) & set(LINKS)
        assert not typed, f"{file.name} types {typed}, which the data module knows"
        assert "dict_kwargs" not in file.read_text(encoding="utf-8"), file.name
