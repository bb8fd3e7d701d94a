"""``seqlit audit``: look for leaks in a fitted model, or in a table of embeddings that another pipeline made.

    seqlit audit --config CONFIG [--ckpt_path CHECKPOINT]
    seqlit audit --table EMBEDDINGS --events EVENTS --user_column U --time_column T [--truncated TABLE --cut DATE]
                 [--events_user_column U --events_time_column T --events_time_unit s] where events name them otherwise
    seqlit audit --events EVENTS --time_column T --cut DATE --write-truncated OUT

The exit status is 1 with a leak and 0 without, so that a continuous integration can use it. A model must have
``represent(events, users, times, context_users=None)``; where it also has ``represent_context(own, others, users,
times, context_times, context_users=None)``, self-exclusion and the clock are checked on the context alone.

Events strictly before a query, by however little, count as known; with ``--ties inclusive``, for states after each
event that are stamped with its time, those at it too. With ``--config`` events come coded, normalised and
labelled by the data module; what it fitted and read is not checked here, and the report says what would check it.
"""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import polars as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lightning_modules.callbacks import RandomState
from lightning_modules.cli import CLI_OPTIONS, SeqlitCLI
from lightning_modules.context.audit import Audit
from lightning_modules.context.audit_edits import only_users
from lightning_modules.context.audit_findings import AuditFinding, exit_code, moment, report
from lightning_modules.context.audit_reading import MICROSECONDS, open_frame, read_embeddings, read_events, times_of
from lightning_modules.context.audit_table import audit_table
from lightning_modules.context.visible import Events
from lightning_modules.run_folder import drafted, write_whole

TEST_FOLD = 2
OF_MODELS = ("ckpt_path", "target", "n_queries", "n_cuts", "n_users", "tolerance")
"""Options that mean nothing without ``--config``."""
NAMED = ("user_column", "time_column", "time_unit")
"""Options that say how a file is read, which events may have of their own as ``--events_...``."""
OF_TABLES = (
    *("table", "events", "embedding_column", "columns", *NAMED, *(f"events_{name}" for name in NAMED)),
    *("truncated", "cut", "write_truncated", "implausible"),
)
"""Options that mean nothing with it."""


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"audit: {message}")


class _BuiltCLI(SeqlitCLI):
    """Builds everything of ``test`` and finds its checkpoint, and runs nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning warns of arguments that are not those of the command line; here they are made from them.
        self.config = parser.parse_args(args)

    def _run_subcommand(self, subcommand: str) -> None:
        return


def audit_main(arguments: list[str]) -> int:
    """Run ``seqlit audit``.

    Args:
        arguments: Those after ``audit``. With ``--config`` the ones not listed by ``--help`` go to the config, as
            with ``seqlit test``.

    Returns:
        1 with a leak, else 0.

    Raises:
        ValueError: If arguments, files or the checkpoint do not fit; one line.
    """
    parser = _parser()
    # The options of other commands have underscores; here both are understood.
    known, rest = _parsed(parser, [_underscored(one) for one in arguments])
    if known.config is not None:
        return _finish(audit_model(known, rest), known.output)
    if rest:
        raise ValueError(f"audit: unknown arguments: {' '.join(rest)}")
    if known.events is None:
        raise ValueError("audit: give --config, or --events with --table or --write_truncated")
    cut = None if known.cut is None else _microseconds(known.cut)
    if known.write_truncated is not None:
        if cut is None or known.table is not None or known.truncated is not None:
            raise ValueError(
                "audit: --write_truncated needs --events, --time_column and --cut, and no --table or --truncated"
            )
        of_events = _names(known, of_events=True)
        column, unit = of_events["time_column"], of_events["time_unit"]
        write_truncated(Path(known.events), Path(known.write_truncated), column, unit, cut)
        return 0
    if known.table is None:
        raise ValueError("audit: --events needs --table or --write_truncated")
    if (known.truncated is None) != (cut is None):
        raise ValueError("audit: --truncated and --cut must be given together")
    return _finish(_audit_files(known, cut), known.output)


def _parser() -> argparse.ArgumentParser:
    parser = _Arguments(prog="seqlit audit", description="Look for leaks; exit status 1 if there is one.")
    parser.add_argument("--config", action="append", help="config of a fitted model; may be repeated")
    parser.add_argument("--ckpt_path", help="its checkpoint; by default of the newest run of the config")
    parser.add_argument("--target", help="target whose test queries are audited; by default the first")
    parser.add_argument(
        "--ties",
        default="strict",
        choices=("strict", "inclusive"),
        help="whether events at t are known at t, as in states after each event; earlier ones are, by however little",
    )
    parser.add_argument("--n_queries", type=int, default=128)
    parser.add_argument("--n_cuts", type=int, default=5, help="moments from which on events are changed")
    parser.add_argument("--n_users", type=int, default=300, help="users of context kept for the audit")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="relative to the spread of a feature; 0: bit for bit"
    )
    parser.add_argument(
        "--resize_tolerance", type=float, default=1e-5, help="where edits change shapes, of self, of tables"
    )
    parser.add_argument("--table", help="embeddings of another pipeline, CSV or Parquet")
    parser.add_argument("--events", help="the events it read, CSV or Parquet")
    parser.add_argument("--user_column", default="user")
    parser.add_argument("--time_column", default="time")
    for name in NAMED:
        choices = tuple(MICROSECONDS) if name == "time_unit" else None
        parser.add_argument(
            f"--events_{name}", choices=choices, help=f"of the events, if not that of --{name}, of the embeddings"
        )
    parser.add_argument("--embedding_column", default="embedding", help="of lists; else columns e0, e1, ... are read")
    parser.add_argument("--time_unit", choices=tuple(MICROSECONDS), help="of times that are numbers, since 1970-01-01")
    parser.add_argument(
        "--columns", nargs="+", help="columns of events looked for in embeddings; by default the first 8"
    )
    parser.add_argument("--truncated", help="embeddings by the same pipeline from events before --cut alone")
    parser.add_argument("--cut", help="ISO 8601 date or time, UTC where it names no zone")
    parser.add_argument("--write_truncated", help="write the events before --cut here and stop")
    parser.add_argument("--implausible", type=float, default=0.5, help="share of the open variance that is a leak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the findings here as JSON")
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Known arguments and the others; known ones that this audit would pass over in silence are refused."""
    default = object()
    preset = argparse.Namespace(**dict.fromkeys(OF_MODELS + OF_TABLES, default))
    known, rest = parser.parse_known_args(arguments, preset)
    given = [name for name in OF_MODELS + OF_TABLES if getattr(known, name) is not default]
    unread, mode = (OF_MODELS, "without") if known.config is None else (OF_TABLES, "with")
    named = ", ".join(f"--{name}" for name in given if name in unread)
    if named:
        raise ValueError(f"audit: {named} cannot be used {mode} --config: a model or tables are audited, one at a time")
    for name in set(OF_MODELS + OF_TABLES).difference(given):
        setattr(known, name, parser.get_default(name))
    return known, rest


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value


def _microseconds(said: str) -> int:
    try:
        time = datetime.fromisoformat(said)
    except ValueError as error:
        raise ValueError(f"audit: --cut must be an ISO 8601 date or time such as 2011-06-01, got {said!r}") from error
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    # Whole microseconds: a timestamp in float64 seconds would round them.
    gap = time - datetime(1970, 1, 1, tzinfo=UTC)
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def _finish(findings: list[AuditFinding], output: str | None) -> int:
    print(report(findings), flush=True)
    if output is not None:
        # JSON knows no infinity.
        plain = [asdict(one) | {"worst": None if one.worst == float("inf") else one.worst} for one in findings]
        write_whole(Path(output), json.dumps(plain, indent=2, allow_nan=False) + "\n")
    return exit_code(findings)


def _names(known: argparse.Namespace, *, of_events: bool = False) -> dict[str, Any]:
    """What columns of the embeddings are called, or those of the events, which go by the same unless they say so."""
    own = {name: getattr(known, f"events_{name}") for name in NAMED} if of_events else {}
    return {name: own.get(name) or getattr(known, name) for name in NAMED}


def _audit_files(known: argparse.Namespace, cut: int | None) -> list[AuditFinding]:
    names = _names(known)
    embeddings = read_embeddings(Path(known.table), embedding_column=known.embedding_column, **names)
    of_events = _names(known, of_events=True)
    events, embeddings = read_events(Path(known.events), embeddings, columns=known.columns, **of_events)
    truncated = None
    if known.truncated is not None:
        truncated = read_embeddings(Path(known.truncated), embedding_column=known.embedding_column, **names)
    return audit_table(
        embeddings,
        events,
        truncated=truncated,
        cut=cut,
        ties=known.ties,
        tolerance=known.resize_tolerance,
        implausible=known.implausible,
        seed=known.seed,
    )


def write_truncated(events: Path, out: Path, time_column: str, time_unit: str | None, cut: int) -> None:
    """Write the events before a cut, all columns as they are, for a second run of a pipeline.

    Raises:
        ValueError: If ``out`` is the file itself or has another ending, or no event or every one is before the cut.
    """
    if out.suffix.lower() != events.suffix.lower() or out.resolve() == events.resolve():
        raise ValueError(f"{out}: must be another file than {events}, and end in {events.suffix}")
    frame = open_frame(events)
    earlier = times_of(events, frame, time_column, time_unit) < cut
    if earlier.all() or not earlier.any():
        which = "every event is" if earlier.all() else "no event is"
        raise ValueError(f"{events}: {which} before the cut {moment(cut)}, choose one inside")
    with drafted(out) as draft:
        kept = frame.filter(pl.Series(earlier))
        if out.suffix.lower() == ".parquet":
            kept.write_parquet(draft)
        else:
            kept.write_csv(draft)
    print(f"seqlit: {int(earlier.sum())} of {len(earlier)} events, those before {moment(cut)}, in {out}", flush=True)
    print(
        "seqlit: run the same pipeline on it with the same weights, then audit with --truncated and --cut", flush=True
    )


def audit_model(known: argparse.Namespace, rest: list[str]) -> list[AuditFinding]:
    """Audit a fitted model on the test queries of a target.

    Raises:
        ValueError: If there is no checkpoint, the model has no ``represent``, or there is no such target.
    """
    files = [argument for name in known.config for argument in ("--config", name)]
    checkpoint = [] if known.ckpt_path is None else ["--ckpt_path", known.ckpt_path]
    cli = _BuiltCLI(
        args=["test", *files, *checkpoint, *rest], **CLI_OPTIONS, trainer_defaults={"callbacks": [RandomState()]}
    )
    path = cli.config["test"].ckpt_path
    cli.datamodule.prepare_data()
    cli.datamodule.setup("test")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = saved.get(type(cli.datamodule).__qualname__)
    if state is not None:
        cli.datamodule.load_state_dict(state)  # refuses a checkpoint of other events
    cli.model.on_load_checkpoint(saved)
    cli.model.load_state_dict(saved["state_dict"])
    batch = next(iter(cli.datamodule.test_dataloader()))
    return audit_batch(cli.model.eval(), batch, known)


def audit_batch(model: Any, batch: dict[str, Any], known: argparse.Namespace) -> list[AuditFinding]:
    """Audit a model on a sample of the queries and users of a test batch.

    Args:
        model: With ``represent`` and perhaps ``represent_context``, in evaluation mode.
        batch: The batch of ``test_dataloader()``.
        known: Arguments of the command.

    Raises:
        ValueError: If the model has no ``represent``, there is no such target, or less than two test queries.
    """
    if not hasattr(model, "represent"):
        raise ValueError(f"audit: {type(model).__name__} has no represent(events, users, times), nothing to audit")
    queries = batch["queries"]
    target = next(iter(queries)) if known.target is None else known.target
    if target not in queries:
        raise ValueError(f"audit: no target {target!r}, there are {', '.join(queries)}")
    random = torch.Generator().manual_seed(known.seed)
    asked = queries[target]
    rows = (asked["fold"] == TEST_FOLD).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=random)[: known.n_queries]].sort().values
    context = batch["context_users"]
    context = context[torch.randperm(len(context), generator=random)[: known.n_users]].sort().values
    users = torch.cat([asked["users"][rows], context]).unique()
    events = only_users(batch["events"], users)
    # Users are numbered anew among those that are kept.
    context = torch.searchsorted(users, context)

    @torch.no_grad()
    def represent(events: Events, users: Tensor, times: Tensor) -> Tensor:
        return model.represent(events, users, times, context_users=context)

    @torch.no_grad()
    def represent_context(own: Events, others: Events, users: Tensor, times: Tensor, context_times: Tensor) -> Tensor:
        return model.represent_context(own, others, users, times, context_times, context_users=context)

    audit = Audit(
        represent,
        context=represent_context if hasattr(model, "represent_context") else None,
        ties=known.ties,
        train_stop=batch["train_stop"],
        n_queries=known.n_queries,
        n_cuts=known.n_cuts,
        tolerance=known.tolerance,
        resize_tolerance=known.resize_tolerance,
        prepared=True,
        seed=known.seed,
    )
    return audit.run(
        events,
        torch.searchsorted(users, asked["users"][rows]),
        asked["times"][rows],
        labels=asked["labels"][rows],
        label_tables=[one["labels"] for one in queries.values()],
        user_names=[batch["user_ids"][user] for user in users.tolist()],
    )
