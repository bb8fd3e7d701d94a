"""KernelAttentionAggregator on two and three processes against one: losses, steps, metrics, reports, files."""

import json
import warnings
from functools import partial

import polars as pl
import pytest
import torch
from lightning import Trainer, seed_everything

from datamodules import EventSequencesDataModule
from datamodules.event_batches import ColesSlices, Crops, TailWindows
from datamodules.event_targets import CalendarDates, NoEventWithin
from datamodules.synthetic_events import regime
from lightning_modules import KernelAttentionAggregator
from lightning_modules.callbacks import ContextReport, EmbeddingWriter
from lightning_modules.collectives import average_gradients, n_processes, rank
from lightning_modules.context import (
    Attention,
    Ema,
    Evaluation,
    EveryKSteps,
    Gated,
    KernelAttention,
    Live,
    LogisticProbe,
    fit_contexts,
)
from lightning_modules.losses import CPC, CoLES, NextEvent, Supervised
from lightning_modules.networks import RecurrentEncoder, encode_table

VOCABULARIES = [7, 4]
FACTS = {"d": 5, "vocabulary_sizes": VOCABULARIES, "n_numeric": 2}
OBJECTIVES = {
    "next_event": lambda: NextEvent(**FACTS, weights=(5, 1)),
    "supervised": lambda: Supervised(**FACTS, n_classes=3),
    "coles": lambda: CoLES(**FACTS, margin=1.5, n_negatives=2),
    "coles_mean": lambda: CoLES(**FACTS, margin=1.5, n_negatives=2, reduction="mean"),
    "cpc": lambda: CPC(**FACTS, n_steps_ahead=2, d_event=4, group_size=4),
    "cpc_of_one_group": lambda: CPC(**FACTS, n_steps_ahead=6, d_event=4),
}
# Lengths of a batch of one process; the last one leaves most processes without any row.
LENGTHS = {"uneven": [6, 1, 4, 6, 2, 3, 5], "nearly empty": [5]}
USERS = {"uneven": [0, 1, 0, 2, 1, 3, 3], "nearly empty": [4]}


# Losses


def batch_of(case):
    lengths, generator = LENGTHS[case], torch.Generator().manual_seed(0)
    shape = len(lengths), max(lengths)
    return {
        "categorical": torch.stack([torch.randint(1, n, shape, generator=generator) for n in VOCABULARIES], -1),
        "numeric": torch.randn(*shape, 2, generator=generator, dtype=torch.float64),
        "mask": torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        "users": torch.tensor(USERS[case]),
        "labels": torch.arange(shape[0]) % 3,
    }


def part_of(batch):
    """Rows r, r + R, ... up to their own longest, and a padding row where others have one more."""
    n_rows = len(batch["mask"])
    rows = torch.arange(-(-n_rows // n_processes())) * n_processes() + rank()
    there = rows < n_rows
    own = {name: value[torch.where(there, rows, 0)] for name, value in batch.items()}
    own["mask"][~there], own["users"][~there], own["labels"][~there] = False, -1, -100
    n_steps = max(1, int(own["mask"].sum(1).max()))
    return {name: value[:, :n_steps] if value.ndim > 1 else value for name, value in own.items()}


def gradients(objective, batch):
    """Loss and gradients of an objective on a network of the events before each step, float64."""
    torch.manual_seed(3)
    table = torch.nn.Embedding(VOCABULARIES[0], FACTS["d"]).double()
    objective = OBJECTIVES[objective]().double()
    states = table(batch["categorical"][..., 0]).masked_fill(~batch["mask"].unsqueeze(-1), 0.0).cumsum(1)
    loss = objective(states if objective.needs == "steps" else states[:, -1], batch)
    loss.backward()
    parameters = {"table": table.weight} | dict(objective.named_parameters())
    average_gradients(parameters.values())
    return loss.detach(), {name: one.grad for name, one in parameters.items()}, objective.state_dict()


def of_every_objective(part):
    return {(case, name): gradients(name, part(batch_of(case))) for case in LENGTHS for name in OBJECTIVES}


# Fits, tests and predictions


def events_of(folder, sampler, batch_size=6):
    return EventSequencesDataModule(
        paths=str(folder / "events.parquet"),
        user_column="user",
        time_column="time",
        categorical=["event_type"],
        validation_fraction=0.25,
        test_fraction=0.25,
        sampler=sampler,
        targets={"silent": NoEventWithin(rule=CalendarDates(every_days=12), days=3)},
        batch_size=batch_size,
        cache_dir=str(folder / "cache"),
    )


GRU = partial(RecurrentEncoder, d_model=6, d_embedding=4, noise=0.0)
SGD = partial(torch.optim.SGD, lr=0.1)
CASES = {
    "coles": (ColesSlices(2, 2, 12), {"encoder_objective": partial(CoLES, reduction="mean")}),
    "next_event": (
        Crops(2, 12),
        {"encoder_objective": NextEvent, "tune_encoder": True, "refresh": EveryKSteps(1), "wide_encoder": GRU},
    ),
    "cpc": (Crops(2, 12), {"encoder_objective": CPC, "tune_encoder": True, "refresh": Live(3)}),
    "supervised": (
        TailWindows("silent", 8),
        {"encoder_objective": Supervised, "tune_encoder": True, "refresh": Ema(0.5)},
    ),
    "fewer rows than processes": (Crops(60, 80), {"encoder_objective": NextEvent}),
}


PROCESSES = {"coles": 2, "next_event": 2, "supervised": 2, "cpc": 3, "fewer rows than processes": 3}


def module_of(data, settings):
    return KernelAttentionAggregator(
        vocabulary_sizes=data.vocabulary_sizes,
        n_numeric=data.n_numeric,
        median_gap=data.median_gap,
        encoder=GRU,
        encoder_epochs=1,
        aggregators={"kernel": KernelAttention, "gated": partial(Attention, n_heads=1)},
        aggregator_epochs=1,
        combination=Gated,
        evaluation=Evaluation(probe=LogisticProbe(strengths=(0.1,), max_iterations=10)),
        encoder_optimizer=SGD,
        aggregator_optimizer=SGD,
        **settings,
    )


def trainer_of(world, folder, *callbacks):
    several = {"strategy": "replicated"} if world > 1 else {}
    return Trainer(
        accelerator="cpu",
        devices=world,
        max_epochs=2,
        precision="64-true",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **several,
    )


def fitted(folder, case, world):
    """Weights, contexts and metrics of a fit in which batches of ``world`` processes have as many rows together."""
    seed_everything(1, verbose=False)
    sampler, settings = CASES[case]
    rows = 60 if case == "supervised" else 6  # there are many more queries than users
    data = events_of(folder, sampler, batch_size=rows // world)
    module, trainer = module_of(data, settings), trainer_of(world, folder)
    with pytest.MonkeyPatch.context() as patch:  # as many blocks of a bank as make each process encode some
        patch.setattr(fit_contexts, "encode_table", partial(encode_table, max_tokens=64))
        trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return module.state_dict(), module.contexts.state_dict(), metrics, trainer.global_step


class Counted(ContextReport):
    """Counts how often it writes."""

    written = 0

    def write(self, folder, studies, facts):
        """As always."""
        self.written += 1
        super().write(folder, studies, facts)


def evaluated(folder, checkpoint, world, out):
    """Validation, test and prediction of a checkpoint, and what was written."""
    seed_everything(1, verbose=False)
    sampler, settings = CASES["coles"]
    data = events_of(folder, sampler)
    report = Counted(n_resamples=20)
    module, trainer = module_of(data, settings), trainer_of(world, out, report, EmbeddingWriter())
    (validated,) = trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
    trainer.test(module, data, ckpt_path=checkpoint, verbose=False)
    predicted = trainer.predict(module, data, ckpt_path=checkpoint)
    return validated, report.written, len([one for one in predicted if one is not None])


def in_a_process(folder, checkpoint, world, out):
    warnings.simplefilter("ignore")
    fits = {case: fitted(folder, case, world) for case in CASES if world == PROCESSES[case]}
    return of_every_objective(part_of), fits, evaluated(folder, checkpoint, world, out)


# What one process gives


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("events")
    regime(0, n_users=40, n_days=60, events_per_day=1.0, labels_per_day=0.2).write(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Results of one process, its checkpoint, and the folder it wrote to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("alone")
    checkpoint = str(out / "one.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_everything(1, verbose=False)
        sampler, settings = CASES["coles"]
        data = events_of(folder, sampler)
        module, trainer = module_of(data, settings), trainer_of(1, out)
        trainer.fit(module, data)
        trainer.save_checkpoint(checkpoint)
        fits = {case: fitted(folder, case, 1) for case in CASES}
        found = of_every_objective(lambda batch: batch), fits, evaluated(folder, checkpoint, 1, out)
    torch.set_num_threads(threads)
    return found, checkpoint, out


@pytest.fixture(scope="module")
def several(in_processes, alone, folder, tmp_path_factory):
    """By number of processes, the results of each of them and the folder they wrote to."""
    found = {}
    for world in (2, 3):
        out = tmp_path_factory.mktemp("several")
        given = in_processes(world, __file__, "in_a_process", folder, alone[1], world, out, joined=True)
        found[world] = given, out
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_gradients_of_parts_are_those_of_the_joined_batch(alone, several, world):
    wanted = alone[0][0]
    for found, _, _ in several[world][0]:
        for case, (_, gradients_of_one, buffers) in wanted.items():
            _, gradients_here, buffers_here = found[case]
            # shares are float32: 1e-7 of gradients of order 1
            torch.testing.assert_close(gradients_here, gradients_of_one, rtol=1e-6, atol=1e-7, msg=str(case))
            torch.testing.assert_close(buffers_here, buffers, rtol=0, atol=1e-12)  # float64 sums in another order
    for case, (loss, _, _) in wanted.items():
        mean = torch.stack([found[case][0] for found, _, _ in several[world][0]]).mean()
        torch.testing.assert_close(mean, loss, rtol=1e-6, atol=1e-7)  # as above
    assert float(wanted["uneven", "cpc"][0]) > 0 < float(wanted["uneven", "coles"][0])
    assert float(wanted["nearly empty", "next_event"][0]) > 0 == float(wanted["nearly empty", "cpc"][0])


@pytest.mark.parametrize(("case", "world"), PROCESSES.items())
def test_fits_end_at_the_weights_contexts_and_metrics_of_one_process(alone, several, case, world):
    weights, contexts, metrics, n_steps = alone[0][1][case]
    first = several[world][0][0][1][case]
    for _, fits, _ in several[world][0]:
        weights_here, contexts_here, metrics_here, n_steps_here = fits[case]
        assert n_steps_here == n_steps
        assert metrics_here.keys() == metrics.keys()
        # float32 shares, states of contexts and logged values
        torch.testing.assert_close(metrics_here, metrics, rtol=1e-5, atol=1e-6)
        # sums of means, an own part in each process
        kept = [name for name in weights if not name.startswith(("train_loss", "bank_ages"))]
        torch.testing.assert_close(
            {name: weights_here[name] for name in kept}, {name: weights[name] for name in kept}, rtol=1e-5, atol=1e-6
        )
        assert all(torch.equal(weights_here[name], first[0][name]) for name in kept), "processes went apart"
        for name, bank in contexts["banks"].items():
            here = contexts_here["banks"][name]
            assert torch.equal(here["event_rows"], bank["event_rows"])
            torch.testing.assert_close(here["states"], bank["states"], rtol=1e-5, atol=1e-6)
            assert torch.equal(here["states"], first[1]["banks"][name]["states"])
        assert contexts_here["refreshes"] == contexts["refreshes"]
        assert contexts_here["steps"] == contexts["steps"]


@pytest.mark.parametrize("world", [2, 3])
def test_a_checkpoint_gives_the_metrics_report_and_embeddings_of_one_process(alone, several, world):
    validated, n_reports, n_predicted = alone[0][2]
    assert (n_reports, n_predicted) == (1, 1)
    for number, (_, _, (validated_here, n_reports_here, n_predicted_here)) in enumerate(several[world][0]):
        torch.testing.assert_close(validated_here, validated, rtol=0, atol=1e-6)  # the same in each, but for a mean
        assert (n_reports_here, n_predicted_here) == ((1, 1) if number == 0 else (0, 0))
    reports = [json.loads((out / "report" / "metrics.json").read_text()) for out in (alone[2], several[world][1])]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]
    frames = [pl.read_parquet(out / "embeddings.parquet") for out in (alone[2], several[world][1])]
    assert len(frames[0]) > 10
    assert frames[0].equals(frames[1])
    assert {path.name for path in several[world][1].iterdir()} == {"report", "embeddings.parquet"}, "a draft is left"
