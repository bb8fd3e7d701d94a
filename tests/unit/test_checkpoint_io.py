"""Checkpoints are whole or not there, and leave nothing beside them."""

import os

import pytest
import torch

from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.run_folder import remove_drafts

CHECKPOINT = {"state_dict": {"weight": torch.arange(6.0)}, "epoch": 3, "name": "x", "loops": {"a": [1, None, 0.5]}}


def test_what_is_written_is_read_with_plain_values_only(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    found = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert found["state_dict"]["weight"].equal(CHECKPOINT["state_dict"]["weight"])
    assert {key: found[key] for key in ("epoch", "name", "loops")} == {
        "epoch": 3,
        "name": "x",
        "loops": {"a": [1, None, 0.5]},
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT | {"epoch": 4}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_disk_holds_the_file_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync") or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt")
    assert calls == ["fsync", "replace", "fsync"]


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "last.ckpt", storage_options={})


def test_drafts_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    kept = [folder / "last.ckpt", folder / ".hidden", tmp_path / ".config.yaml", tmp_path / "metrics.1.csv"]
    drafts = [folder / ".last.4711.ckpt", tmp_path / ".fit.12.json", tmp_path / ".notes.12"]
    for path in kept + drafts:
        path.touch()
    remove_drafts(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)
