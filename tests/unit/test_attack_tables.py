"""What the script behind the table of attacks keeps of a cell, says of several, and does not compute again."""

import importlib

import pytest


@pytest.fixture
def tables(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project / "scripts"))
    return importlib.import_module("reproduce_concealed_attack")


def cell(tables, seconds=12.0, one_answer=(0.0, 0.0), panel=(0.125, 0.125), **success):
    """Two folds in which an attack has F ``success[attack]``, by default 0.5; 1 % is not resolvable."""
    names = [plan.name for plan in tables.plans()]
    folds = []
    for degenerate, joint in zip(one_answer, panel, strict=True):
        figures = dict(zip(tables.OF_MODELS, (0.9, degenerate, 1.0, 1.0), strict=True))
        rest = {"panel: joint at 5 %": joint, "all judges: joint at 5 %": 0.25, "panel: joint at 1 %": None}
        folds.append({name: figures | {"F": success.get(name, 0.5)} | rest | {"Linf": 0.123456} for name in names})
    chosen = {"step": None, "radius": 0.25, "alpha": 0.1, "iteration": 7}
    return {"folds": folds, "chosen": dict.fromkeys(names, chosen), "seconds": seconds}


def test_a_table_keeps_every_figure_of_a_cell(tables, tmp_path):
    cells = {("GunPoint", "S4", 1): cell(tables), ("Coffee", "ResCNN", 0): cell(tables, 3.0, pgd=1 / 3)}
    file = tmp_path / "table.csv"
    tables.write_table(file, cells)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("set,network,seed,seconds,fold,attack,step,radius,alpha,iteration,accuracy of the ")
    assert len(lines) == 1 + 2 * 2 * len(tables.plans())
    first = "Coffee,ResCNN,0,3,0,ifgsm,,0.25,0.1,7,0.9,0,1,1,0.5,0.125,0.25,,0.123456"
    assert lines[1] == first, "empty: not resolvable"
    found = tables.read_table(file)
    assert found.keys() == cells.keys()
    assert found["GunPoint", "S4", 1] == cells["GunPoint", "S4", 1]
    for fold in found["Coffee", "ResCNN", 0]["folds"]:
        assert fold["pgd"]["F"] == pytest.approx(1 / 3, abs=1e-6)
    assert tables.read_table(tmp_path / "none.csv") == {}
    tables.write_table(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_bytes() == file.read_bytes()


def test_known_cells_are_printed_and_only_others_computed(tables, tmp_path, monkeypatch, capsys):
    file, computed = tmp_path / "table.csv", []
    tables.write_table(file, {("GunPoint", "S4", 0): cell(tables)})

    def compute(folder, out, *place):
        computed.append(place)
        return cell(tables, **{"ifgsm sum": 0.875})

    monkeypatch.setattr(tables, "cell", compute)
    arguments = [
        "--folder",
        "data",
        "--sets",
        "GunPoint",
        "--networks",
        "S4",
        "--seeds",
        "0",
        "1",
        "--table",
        str(file),
    ]
    monkeypatch.setattr("sys.argv", ["script", *arguments])
    tables.main()
    assert computed == [("GunPoint", "S4", 1)]
    first = capsys.readouterr().out
    assert "| GunPoint | S4 | 2 | 0.90 | 1.00 | 0.50 | 0.69 | 0.50 |" in first
    assert "- ifgsm sum: ahead of ifgsm in 1 of 1 cells (1.00 [0.03, 1.00]), mean gain in F +0.19." in first
    assert "| GunPoint | S4 | ifgsm sum | 0.69 (0.27) |" in first
    tables.main()
    assert computed == [("GunPoint", "S4", 1)]
    assert capsys.readouterr().out == first


def test_coffee_is_shown_and_not_counted(tables):
    lost, won = cell(tables, **{"pgd sum": 0.25}), cell(tables, **{"pgd sum": 0.75})
    cells = {("Coffee", "S4"): [lost], ("GunPoint", "S4"): [won], ("PowerCons", "S4"): [lost]}
    (said,) = [line for line in tables.verdict(cells) if "pgd sum" in line]
    assert said == "- pgd sum: ahead of pgd in 1 of 2 cells (0.50 [0.01, 0.99]), mean gain in F +0.00."
    assert sum(line.startswith("| Coffee | S4 |") for line in tables.overview(cells)) == 1


def test_a_mean_over_fewer_folds_and_victims_of_one_answer_are_named(tables):
    able = cell(tables, panel=(0.5, None), **{"ifgsm sum": 0.75})
    half, lost = (cell(tables, one_answer=of, **{"ifgsm sum": 0.25}) for of in ((1.0, 0.0), (1.0, 1.0)))
    cells = {("GunPoint", "S4"): [able], ("PowerCons", "S4"): [able, half], ("Strawberry", "S4"): [lost]}
    rows = [line for line in tables.overview(cells) if "S4" in line]
    assert "| 0.50 (1 of 2) / 0.50 (1 of 2) / 0.50 (1 of 2) | 0.25 / 0.25 / 0.25 |" in rows[0]
    assert "| 0.90 (one answer in 1 of 4) |" in rows[1]
    every, only_able = (line for line in tables.verdict(cells) if line.startswith("- ifgsm sum"))
    assert "in 1 of 3 cells" in every, "the gains in PowerCons cancel"
    assert "in 2 of 2 cells" in only_able
    assert only_able.endswith("mean gain in F +0.17, without victims of one answer."), "(1/4 + 1/12) / 2"
