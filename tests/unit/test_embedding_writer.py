"""Embeddings as a table: what was predicted stands in the file, whole or not at all."""

from datetime import datetime
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_modules.callbacks import EmbeddingWriter
from lightning_modules.callbacks.embedding_writer import embeddings_frame
from lightning_modules.context.audit_reading import read_embeddings
from lightning_modules.context.evaluation import Embeddings

COLUMNS = ["user", "time", "own", "context", "embedding", "top_users", "top_weights"]
MOMENT = 1_700_000_000_123_456  # 2023-11-14 22:13:20.123456 UTC


def embeddings(users=("b", "a", "b"), *, top=None, weights=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = len(users)
    own, context = (torch.randn(n, width, generator=generator) for width in (3, 2))
    if top is None:
        top = [[users[0], users[-1]], [], [users[0]]][:n]
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])[:n]
    return Embeddings(
        target="silent",
        n_users=40,
        user_ids=list(users),
        times=torch.arange(n) * 1_000_001 + MOMENT,
        own=own,
        context=context,
        embedding=torch.cat([own, context], 1),
        aggregator="kernel",
        top_users=top,
        top_weights=shares if weights else None,
    )


def test_the_users_that_are_asked_may_have_smaller_numbers_than_those_that_influence_them():
    frame = embeddings_frame(embeddings((1, 2, 1), top=[[2**63 + 1], [], [2]]))
    assert frame["user"].to_list() == [1, 2, 1]
    assert frame["top_users"].to_list() == [[2**63 + 1], [], [2]]


class Predicts(LightningModule):
    """Returns one of the given outcomes a batch."""

    def __init__(self, outcomes):
        super().__init__()
        self.outcomes = outcomes

    def predict_step(self, batch, batch_idx):
        return self.outcomes[batch_idx]


class Batches(LightningDataModule):
    """As many batches as asked for."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def predict_dataloader(self):
        return DataLoader(torch.zeros(self.n, 1))


def predict(folder, *outcomes):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        callbacks=[EmbeddingWriter()],
    )
    trainer.predict(Predicts(outcomes), Batches(len(outcomes)), return_predictions=False)


def test_a_row_is_a_query():
    found = embeddings()
    frame = embeddings_frame(found)
    assert frame.columns == COLUMNS
    assert frame.schema["time"] == pl.Datetime("us")
    assert {frame.schema[name] for name in COLUMNS[2:5]} == {pl.List(pl.Float32)}
    assert frame["user"].to_list() == ["b", "a", "b"]
    assert frame["time"][1] == datetime(2023, 11, 14, 22, 13, 21, 123457)
    for name in ("own", "context", "embedding"):
        assert frame[name].to_list() == getattr(found, name).tolist()  # float32 both, bit for bit


def test_weights_end_with_the_users():
    frame = embeddings_frame(embeddings())
    assert frame["top_users"].to_list() == [["b", "b"], [], ["b"]]
    assert frame["top_weights"].to_list() == [[0.75, 0.25], [], [1.0]]


@pytest.mark.parametrize("users", [(7, 5, 7), ("b", "a", "b")])
def test_columns_do_not_depend_on_what_was_seen(users):
    usual = embeddings_frame(embeddings(users)).schema
    assert embeddings_frame(embeddings(users, top=[[], [], []])).schema == usual
    unweighted = embeddings_frame(embeddings(users, top=[[], [], []], weights=False))
    assert unweighted.schema == usual
    assert unweighted["top_weights"].to_list() == [[], [], []]


def test_batches_are_joined_in_order_in_a_file_the_audit_reads(tmp_path, capsys):
    first, second = embeddings(seed=1), embeddings(("c",), top=[[]], seed=2)
    predict(tmp_path, first, second)
    path = tmp_path / "embeddings.parquet"
    said = f"seqlit: 4 embeddings (3 of 40 users: test queries of target 'silent') in {path}"
    assert said in capsys.readouterr().out
    frame = pl.read_parquet(path)
    assert frame["user"].to_list() == ["b", "a", "b", "c"]
    assert frame["own"].to_list() == [*first.own.tolist(), *second.own.tolist()]
    table = read_embeddings(path, user_column="user", time_column="time", embedding_column="embedding", time_unit=None)
    assert table.times.tolist() == [*first.times.tolist(), *second.times.tolist()]
    np.testing.assert_array_equal(table.vectors, torch.cat([first.embedding, second.embedding]).double().numpy())
    assert not list(tmp_path.glob(".*"))  # no draft is left


def test_nan_ends_in_one_line_and_leaves_the_old_file(tmp_path):
    predict(tmp_path, embeddings())
    path = tmp_path / "embeddings.parquet"
    before = path.read_bytes()
    broken = embeddings(seed=3)
    broken.context[1, 0] = torch.nan
    with pytest.raises(ValueError, match="context of user 'a', query 1, must be finite, got nan or inf"):
        predict(tmp_path, embeddings(seed=4), broken)
    assert path.read_bytes() == before


def test_other_predictions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="EmbeddingWriter needs Embeddings from predict_step, got list"):
        predict(tmp_path, [1.0])
    assert not list(tmp_path.iterdir())


def test_of_several_processes_the_first_alone_must_have_embeddings():
    EmbeddingWriter().on_predict_batch_end(SimpleNamespace(is_global_zero=False), Predicts([]), None, None, 0)
    with pytest.raises(ValueError, match="EmbeddingWriter needs Embeddings from predict_step, got NoneType"):
        EmbeddingWriter().on_predict_batch_end(SimpleNamespace(is_global_zero=True), Predicts([]), None, None, 0)
