"""The cache: written whole or not at all, reused, and keyed by content and by every setting that matters."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest

from datamodules import InteractionsDataModule, array_cache, interactions, preparation
from datamodules.array_cache import content_digests
from datamodules.synthetic import markov_interactions


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.parquet"
    markov_interactions(150, 60, mean_length=10, n_days=20, seed=4).write_parquet(path)
    return path


@pytest.fixture
def build(tmp_path, rows):
    def module(**arguments):
        settings = {
            "paths": str(rows),
            "user_column": "user_id",
            "item_column": "item_id",
            "time_column": "timestamp",
            "cache_dir": str(tmp_path / "cache"),
        }
        return InteractionsDataModule(**(settings | arguments))

    return module


@pytest.fixture
def n_read(monkeypatch):
    """How often the files were read."""
    count = []
    read = preparation.read_interactions

    def counted(*arguments):
        count.append(1)
        return read(*arguments)

    monkeypatch.setattr(preparation, "read_interactions", counted)
    return count


def folders(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_nothing_is_read_at_construction_and_once_after(build, n_read, tmp_path):
    module = build(paths=str(tmp_path / "not there.parquet"))
    assert module.max_length == 50
    with pytest.raises(FileNotFoundError):
        _ = module.n_items
    first = build()
    assert not n_read
    assert first.n_items > 10
    first.prepare_data()
    first.setup("fit")
    assert len(n_read) == 1
    assert build().catalogue_hash == first.catalogue_hash
    assert len(n_read) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 7},
        {"batch_size": 3},
        {"eval_batch_size": 3},
        {"train_window": "strided"},
        {"num_workers": 1},
        {"shuffle_within_basket": False},
        {"train_targets": "new"},
    ],
    ids=str,
)
def test_settings_of_batches_share_a_folder(build, n_read, change):
    build().prepare_data()
    build(**change).prepare_data()
    assert len(n_read) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"where": ["user_id > 3"]},
        {"min_item_count": 6},
        {"min_user_count": 4},
        {"split": "leave_last_out"},
        {"test_fraction": 0.2},
        {"validation_user_fraction": 0.1},
        {"target": "next_basket"},
        {"recommend_seen": True},
        {"keep_seen_targets": True},
        {"train_targets": "all"},
        {"user_column": "item_id", "item_column": "user_id"},
        {"time_unit": "ms"},
    ],
    ids=str,
)
def test_settings_of_the_data_have_a_folder_each(build, n_read, change, tmp_path):
    build().prepare_data()
    build(**change).prepare_data()
    assert len(n_read) == 2
    assert len(folders(tmp_path / "cache")) == 2


def test_changed_content_is_read_anew_and_a_copy_is_not(build, n_read, rows, tmp_path):
    before = build().report_facts()
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(rows.read_bytes())
    assert build(paths=str(copy)).report_facts()["split"] == before["split"]
    assert len(n_read) == 1
    frame = pl.read_parquet(rows)
    frame.with_columns(pl.col("user_id") + 100).write_parquet(rows)
    changed = build()
    assert changed.decode_users([0])[0] > 100
    assert len(n_read) == 2


def test_digests_are_remembered(rows, tmp_path, monkeypatch):
    first = content_digests([rows], tmp_path)

    def forbidden(*arguments):
        raise AssertionError("the file was hashed again")

    monkeypatch.setattr(array_cache.hashlib, "file_digest", forbidden)
    assert content_digests([rows], tmp_path) == first
    os.utime(rows, ns=(1, 1))
    with pytest.raises(AssertionError, match="hashed again"):
        content_digests([rows], tmp_path)


def test_damaged_memory_of_digests_is_replaced(rows, tmp_path):
    first = content_digests([rows], tmp_path)
    (tmp_path / "content.json").write_text("{")
    assert content_digests([rows], tmp_path) == first
    json.loads((tmp_path / "content.json").read_text())


def damage_cut(folder):
    path = folder / "train_items.npy"
    path.write_bytes(path.read_bytes()[:-4])


def damage_gone(folder):
    (folder / "all_offsets.npy").unlink()


def damage_facts(folder):
    path = folder / "facts.json"
    path.write_text(path.read_text()[:100])


def damage_facts_gone(folder):
    (folder / "facts.json").unlink()


def damage_type(folder):
    path = folder / "train_items.npy"
    np.save(path, np.load(path).view(np.float32))


def damage_table(folder):
    path = folder / "item_ids.parquet"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_gone, damage_facts, damage_facts_gone, damage_type, damage_table]
)
def test_damaged_folder_is_built_anew(build, n_read, tmp_path, damage):
    expected = [batch["item_ids"].tolist() for batch in build().train_dataloader()]
    (name,) = folders(tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    assert [batch["item_ids"].tolist() for batch in build().train_dataloader()] == expected
    assert len(n_read) == 2
    assert folders(tmp_path / "cache") == [name]
    build().prepare_data()
    assert len(n_read) == 2


def test_failure_while_writing_leaves_nothing(build, tmp_path, monkeypatch):
    save = np.save
    saved = []

    def failing(file, array):
        if len(saved) == 3:
            raise OSError("No space left on device")
        saved.append(file)
        save(file, array)

    monkeypatch.setattr(array_cache.np, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        build().prepare_data()
    assert len(saved) == 3
    assert folders(tmp_path / "cache") == []
    monkeypatch.undo()
    build().prepare_data()
    assert len(folders(tmp_path / "cache")) == 1


def test_killed_process_leaves_nothing_that_is_used(build, rows, tmp_path, n_read):
    program = f"""
        import os, signal
        import numpy as np
        from datamodules import InteractionsDataModule, array_cache
        save, saved = np.save, []
        def deadly(file, array):
            save(file, array)
            saved.append(file)
            if len(saved) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        array_cache.np.save = deadly
        InteractionsDataModule(paths={str(rows)!r}, user_column="user_id", item_column="item_id",
                               time_column="timestamp", cache_dir={str(tmp_path / "cache")!r}).prepare_data()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    (left,) = folders(tmp_path / "cache")
    assert left.startswith(".building-")
    assert len(list((tmp_path / "cache" / left).iterdir())) == 4
    build().prepare_data()
    assert len(n_read) == 1
    (name,) = folders(tmp_path / "cache")  # what the dead process left is gone
    assert not name.startswith(".")


def test_two_processes_may_build_the_same(build, tmp_path, monkeypatch):
    """The other process finishes while this one is preparing, on a disk that knows no locks."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(array_cache.fcntl, "flock", unsupported)
    prepare = interactions.prepare_histories
    nested = []

    def slow(files, settings):
        if not nested:
            nested.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(array_cache, "_process_name", lambda: "elsewhere-1")
                build().prepare_data()
        return prepare(files, settings)

    monkeypatch.setattr(interactions, "prepare_histories", slow)
    module = build()
    module.prepare_data()
    assert len(folders(tmp_path / "cache")) == 1
    assert len(list(module.train_dataloader())) > 0


def test_leftover_of_the_same_process_number_is_replaced(build, tmp_path, monkeypatch):
    """Processes in containers often share a number, so a dead one may look alive."""
    cache = tmp_path / "cache"
    build().prepare_data()
    (name,) = folders(cache)
    (cache / name).rename(cache / f".building-{name}-{array_cache._process_name()}")
    build().prepare_data()
    assert folders(cache) == [name]


def test_folder_is_relative_to_where_the_module_was_made(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = build(cache_dir="here/and/there")
    monkeypatch.chdir("/")
    module.prepare_data()
    assert len(folders(tmp_path / "here" / "and" / "there")) == 1
