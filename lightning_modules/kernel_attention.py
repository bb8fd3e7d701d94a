"""Representations of event sequences enriched with what others were doing at that moment.

Source: arXiv 2502.10205; where the released code looks ahead, sees itself or computes on seconds, the right thing is the
default and the released behaviour a flag.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_modules.context.aggregators import AggregatorFactory, KernelAttention
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.combination import CombinationFactory, Concat
from lightning_modules.context.enriched import ContextRules, EnrichedEncoder
from lightning_modules.context.evaluation import Embeddings, Evaluation, evaluate, exported
from lightning_modules.context.fixed_sequences import even_slices, gathered, sliding_windows
from lightning_modules.context.refresh import Ema, Live, PerEpoch, Refresh, Static, drift
from lightning_modules.context.study import ContextStudy
from lightning_modules.context.visible import Events
from lightning_modules.losses import CoLES, ObjectiveFactory
from lightning_modules.networks import EncoderFactory, RecurrentEncoder, encode_table

SHARED = "shared"
"""Name of the bank of a frozen encoder, which all aggregators read."""


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


class KernelAttentionAggregator(LightningModule):
    """Pre-train an encoder, train aggregators of the states of others on it, and see what they add.

    ``fit`` first trains the encoder on its own objective (or loads it) and keeps its epoch of least ``val/loss``, then
    all aggregators at once by the same kind of loss on z = combination(q, b), with the encoder frozen or, each branch
    its own copy, tuned. ``test`` hands own states, time features and contexts to probes of every target and returns a
    study; ``predict`` gives embeddings with the users that influenced them. Batches are those of
    ``EventSequencesDataModule``: sequences in training; in validation, test and prediction one batch of flat events,
    context users and queries. In validation nothing of the test is in it, and under a time split weights and banks of
    the fit end at ``train_stop``; later the context goes on taking in events strictly before each query.

    Logged: ``train/loss``; ``val/loss`` of what is being trained, ``val/<aggregator>/loss`` of each; with a tuned
    encoder ``bank/<aggregator>/drift``, 1 - cosine of stored and fresh states.

    Args:
        vocabulary_sizes: Of the categorical features, linked by the CLI as the next two.
        n_numeric: Number of numeric features.
        median_gap: Days between events of a user, the default time unit of decay.
        encoder: Factory of the encoder.
        encoder_objective: Factory of what it is trained by.
        encoder_epochs: Epochs of the encoder; 0 with ``encoder_weights``.
        encoder_weights: A checkpoint of this module whose encoder is taken instead of training one.
        wide_encoder: Factory of a wider encoder, trained beside the first: the parameter-matched control.
        aggregators: Factories by name; the default is kernel attention.
        aggregator_epochs: Epochs of the aggregators; 0 if none has anything to learn.
        objective: Factory of what aggregators are trained by; by default as the encoder.
        combination: Factory of what joins own state and context.
        context: What counts as context.
        tune_encoder: Whether branches train copies of the encoder; a branch without context gets as many epochs.
        refresh: When the bank is encoded anew while tuning; by default every epoch, with a frozen encoder never.
        max_context_queries: Most steps of a training batch whose context is looked up.
        evaluation: Probes, arms and controls of the test.
        reference_mode: Context as the released code has it, see ``ContextRules.published``.
        encoder_optimizer: Called with the parameters of an encoder and its objective.
        aggregator_optimizer: Called with the parameters of each branch.

    Raises:
        ValueError: If a fact of the data was not linked, or numbers of epochs do not fit together.
    """

    def __init__(
        self,
        *,
        vocabulary_sizes: Any,
        n_numeric: int,
        median_gap: float,
        encoder: EncoderFactory = RecurrentEncoder,
        encoder_objective: ObjectiveFactory = CoLES,
        encoder_epochs: int = 10,
        encoder_weights: str | None = None,
        wide_encoder: EncoderFactory | None = None,
        aggregators: dict[str, AggregatorFactory] | None = None,
        aggregator_epochs: int = 5,
        objective: ObjectiveFactory | None = None,
        combination: CombinationFactory = Concat,
        context: ContextRules | None = None,
        tune_encoder: bool = False,
        refresh: Refresh | None = None,
        max_context_queries: int = 2048,
        evaluation: Evaluation | None = None,
        reference_mode: bool = False,
        encoder_optimizer: OptimizerCallable = _adam,
        aggregator_optimizer: OptimizerCallable = _adam,
    ) -> None:
        facts = {"vocabulary_sizes": vocabulary_sizes, "n_numeric": n_numeric, "median_gap": median_gap}
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must come from the data, got None")
        for name, value, least in (
            ("encoder_epochs", encoder_epochs, 0 if encoder_weights else 1),
            ("aggregator_epochs", aggregator_epochs, 0),
            ("max_context_queries", max_context_queries, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if encoder_weights and encoder_epochs:
            raise ValueError(f"encoder_epochs must be 0 with encoder_weights, got {encoder_epochs}")
        super().__init__()
        self.automatic_optimization = False
        known = {"vocabulary_sizes": list(vocabulary_sizes), "n_numeric": n_numeric}
        network = encoder(**known)
        if encoder_weights:
            network.load_state_dict(encoder_from(encoder_weights))
        rules = context or ContextRules()
        self.model = EnrichedEncoder(
            network,
            aggregators or {"kernel": KernelAttention},
            combination=combination,
            objective=objective or encoder_objective,
            median_gap=float(median_gap),
            rules=rules.published() if reference_mode else rules,
            tune=tune_encoder,
            **known,
        )
        self.pretraining = nn.ModuleDict({"encoder": encoder_objective(d=network.d_model, **known)})
        self.wide = None if wide_encoder is None else wide_encoder(**known)
        if self.wide is not None:
            self.pretraining["wide"] = encoder_objective(d=self.wide.d_model, **known)
        self.encoder_epochs, self.aggregator_epochs = encoder_epochs, aggregator_epochs
        if refresh is not None and not tune_encoder:
            raise ValueError("refresh is for a tuned encoder: the states of a frozen one stay as they are")
        self.max_context_queries = max_context_queries
        self.evaluation = evaluation or Evaluation()
        self.encoder_optimizer, self.aggregator_optimizer = encoder_optimizer, aggregator_optimizer
        self.learned = [name for name in self.model.branches if self.model.branch(name).learns]
        if self.learned and aggregator_epochs == 0:
            raise ValueError(f"aggregator_epochs must be at least 1 for {', '.join(self.learned)}, got 0")
        if encoder_epochs + (aggregator_epochs if self.learned else 0) == 0:
            raise ValueError("nothing is trained: encoder_weights are given and no aggregator has anything to learn")
        # Contexts of the fit, by branch; one for all with a frozen encoder.
        self.banks: dict[str, ContextBank] = {}
        with_context = self.model.aggregators if tune_encoder else [SHARED]
        policy = refresh or (PerEpoch() if tune_encoder else Static())
        self.refreshes = {name: deepcopy(policy) for name in with_context}
        self._seen: dict[str, Any] = {}
        self._validation: dict[str, dict[str, Tensor]] = {}
        self._best_encoder: tuple[float, dict[str, Tensor]] | None = None

    def forward(self, events: Events, name: str = SHARED) -> Tensor:
        """``(E, d)`` own states after every event."""
        return self.model.encode(events, name)

    # Fit

    @property
    def _is_pretraining(self) -> bool:
        return self.current_epoch < self.encoder_epochs

    def on_fit_start(self) -> None:
        """See that the trainer fits the plan.

        Raises:
            ValueError: If epochs do not add up, or there are several processes.
        """
        if self.trainer.world_size > 1:
            raise ValueError(f"KernelAttentionAggregator is fitted by one process, got {self.trainer.world_size}")
        wanted = self.encoder_epochs + (self.aggregator_epochs if self.learned else 0)
        if self.trainer.max_epochs != wanted:
            what = f"{self.encoder_epochs} of the encoder and {wanted - self.encoder_epochs} of the aggregators"
            raise ValueError(f"trainer.max_epochs must be {wanted}: {what}, got {self.trainer.max_epochs}")

    def on_train_start(self) -> None:
        """Take the flat events of validation: what banks of the fit are built from.

        Raises:
            ValueError: If there is no validation.
        """
        if not self.trainer.val_dataloaders or not self.trainer.limit_val_batches:
            raise ValueError("banks are built from the events of validation, there is none (trainer.limit_val_batches)")
        self._seen = next(iter(self.trainer.val_dataloaders))

    def on_train_epoch_start(self) -> None:
        """Freeze the encoder and build the context once aggregators train; encode it anew where that is due."""
        if self._is_pretraining:
            return
        first = self.current_epoch == self.encoder_epochs
        if first and self._best_encoder is not None:
            self.model.encoder.load_state_dict(self._best_encoder[1])
        self.model.encoder.requires_grad_(False).eval()  # statistics of its norms too
        if first:
            self.model.start_tuning()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Encode the context anew where that is due."""
        if self._is_pretraining or not self.learned:
            return
        step, epoch = self.global_step, self.current_epoch
        for name, refresh in self.refreshes.items():
            if refresh.due(step, epoch):
                self._encode_context(name, refresh)
                refresh.done(step, epoch)

    def _encode_context(self, name: str, refresh: Refresh) -> None:
        events = self._seen["events"]
        source: Any = refresh.source(self.model.encoder_of(name))
        states = encode_table(source, events, window=self.model.rules.window)
        bank = self.model.bank(states, events, self._seen["context_users"], self._seen["train_stop"]).to(self.device)
        if name in self.banks:
            self.log(f"bank/{name}/drift", drift(self.banks[name].states, bank.states), batch_size=1)
        self.banks[name] = bank

    def bank_of(self, name: str) -> ContextBank | None:
        """The context a branch is trained with; None for the branch that has none."""
        return self.banks.get(name if self.model.tune else SHARED)

    def _live_states(self, name: str, bank: ContextBank | None) -> Tensor | None:
        """States of the bank with those of some users encoded in this step, with gradient."""
        refresh = self.refreshes.get(name)
        if not isinstance(refresh, Live) or bank is None or not torch.is_grad_enabled():
            return None
        users = refresh.users(bank.context_users, self.global_step).cpu()
        events = self._seen["events"]
        starts, lengths = events["offsets"][users], events["offsets"].diff()[users]
        batch = {key: value.to(self.device) for key, value in gathered(events, users, starts, lengths).items()}
        steps = self.model.encoder_of(name).encode_steps(batch)
        rows = bank.rows_of(users.to(self.device))
        event_rows = (batch["starts"].unsqueeze(1) + torch.arange(steps.shape[1], device=self.device))[batch["mask"]]
        place = torch.searchsorted(event_rows, bank.event_rows[rows])  # both rise: users and events are in order
        return bank.states.index_copy(0, rows, steps[batch["mask"]][place])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the encoder, or of every branch that has something to learn."""
        optimizers: Any = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        named = dict(zip(self._optimised, optimizers, strict=True))
        losses = []
        for name in self._trained_now:
            loss = self._loss(name, batch)
            named[name].zero_grad()
            self.manual_backward(loss)
            named[name].step()
            if name in self.refreshes:
                self.refreshes[name].follow(self.model.encoder_of(name))
            losses.append(loss.detach())
        self.log(
            "train/loss",
            torch.stack(losses).mean(),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(batch["mask"]),
        )

    @property
    def _optimised(self) -> list[str]:
        return ([*self.pretraining] if self.encoder_epochs else []) + self.learned

    @property
    def _trained_now(self) -> list[str]:
        return [*self.pretraining] if self._is_pretraining else self.learned

    def _loss(self, name: str, batch: Mapping[str, Tensor]) -> Tensor:
        if name in self.pretraining:
            network = self.model.encoder if name == "encoder" else self.wide
            assert network is not None
            objective: Any = self.pretraining[name]
            return objective(network.encode_last(batch) if objective.needs == "last" else network.encode_steps(batch), batch)
        branch = self.model.branch(name)
        bank = self.bank_of(name)
        return branch.loss(
            self.model.encoder,
            bank,
            batch,
            max_queries=self.max_context_queries,
            states=self._live_states(name, bank),
        )

    def _validation_batch(self, batch: dict[str, Any], needs: str) -> dict[str, Tensor]:
        """The same sequences of validation users in every epoch; under a time split none begins before it."""
        if needs not in self._validation:
            queries = batch["queries"].values()
            users = torch.cat([one["users"][one["fold"] == 1] for one in queries]).unique()
            start = batch["train_stop"] if batch["split"] == "time" else -(2**63)
            cut = even_slices if needs == "last" else sliding_windows
            self._validation[needs] = cut(batch["events"], users[: self.evaluation.max_validation_users], start=start)
        return self._validation[needs]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss of what is being trained on sequences of validation."""
        if self.trainer.sanity_checking:
            return
        losses = {}
        for name in self._trained_now:
            objective: Any = self.pretraining[name] if name in self.pretraining else self.model.branch(name).objective
            sequences = self._validation_batch(batch, objective.needs)
            if sequences:
                losses[name] = self._loss(name, {key: value.to(self.device) for key, value in sequences.items()})
        if not losses:
            raise ValueError("no validation user has two events to compute a loss of, give more (validation_fraction)")
        key = "encoder" if self._is_pretraining else None
        loss = losses[key] if key else torch.stack(list(losses.values())).mean()
        self.log("val/loss", loss, prog_bar=True, batch_size=1)
        if not self._is_pretraining:
            self.log_dict({f"val/{name}/loss": value for name, value in losses.items()}, batch_size=1)
        elif self._best_encoder is None or float(loss) < self._best_encoder[0]:
            state = {key: value.detach().clone() for key, value in self.model.encoder.state_dict().items()}
            self._best_encoder = float(loss), state

    def on_train_end(self) -> None:
        """The best epoch of the encoder is kept also where no aggregator learns."""
        if self._best_encoder is not None and not self.learned:
            self.model.encoder.load_state_dict(self._best_encoder[1])

    # Test and prediction

    @torch.no_grad()
    def represent(self, events: Events, users: Tensor, times: Tensor, context_users: Tensor | None = None) -> Tensor:
        """Features of queries ``(Q, k)``: own states, then the context vectors of every aggregator.

        A query reads events strictly before its time alone, of itself and of others: what an audit checks.

        Args:
            events: Flat.
            users: ``(Q,) int64``.
            times: ``(Q,) int64`` microseconds.
            context_users: Users others may see; None takes all.
        """
        everybody = torch.arange(len(events["offsets"]) - 1) if context_users is None else context_users
        parts: list[Tensor] = []
        for name in self.model.aggregators:
            states = self.model.encode(events, name)
            own = self.model.own(states, events, users, times, name).states
            bank = self.model.bank(states, events, everybody)
            parts += [*([] if parts else [own]), self.model.contexts(name, own, bank, users, times)]
        return torch.cat(parts, dim=1)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> ContextStudy:  # type: ignore[override]
        """Probe every target with and without context; the report callback reads what is returned."""
        return evaluate(self.model, batch, self.evaluation, wide=self.wide, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Embeddings:
        """Embeddings at the test queries of the first target, with own state, context and who influenced it most."""
        return exported(self.model, batch, self.evaluation)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the contexts of the fit and the best encoder: tensors and plain values."""
        checkpoint["banks"] = {name: bank.state_dict() for name, bank in self.banks.items()}
        checkpoint["best_encoder"] = self._best_encoder
        checkpoint["refreshes"] = {name: refresh.state_dict() for name, refresh in self.refreshes.items()}
        checkpoint["momentum_encoders"] = {
            name: refresh.momentum_encoder.state_dict()
            for name, refresh in self.refreshes.items()
            if isinstance(refresh, Ema) and refresh.momentum_encoder is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up contexts, the best encoder, and where the policies of refreshing stood."""
        self.banks = {name: ContextBank() for name in checkpoint.get("banks", {})}
        for name, bank in self.banks.items():
            bank.load_state_dict(checkpoint["banks"][name])
        self._best_encoder = checkpoint.get("best_encoder")
        for name, state in checkpoint.get("refreshes", {}).items():
            self.refreshes[name].load_state_dict(state)
        for name, state in checkpoint.get("momentum_encoders", {}).items():
            self.refreshes[name].source(self.model.encoder_of(name)).load_state_dict(state)

    def configure_optimizers(self) -> Any:
        """One optimiser for each encoder that is pre-trained and each branch that learns."""
        found = []
        for name in self._optimised:
            if name in self.pretraining:
                network = self.model.encoder if name == "encoder" else self.wide
                assert network is not None
                params = [*network.parameters(), *self.pretraining[name].parameters()]
                found.append(self.encoder_optimizer(params))
            else:
                params = [p for p in self.model.branch(name).parameters() if p.requires_grad]
                found.append(self.aggregator_optimizer(params))
        return found


def encoder_from(path: str) -> dict[str, Tensor]:
    """Weights of the encoder in a checkpoint of :class:`KernelAttentionAggregator`.

    Raises:
        ValueError: If the file holds none.
    """
    weights = torch.load(path, map_location="cpu", weights_only=True).get("state_dict", {})
    prefix = "model.encoder."
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"encoder_weights: no encoder in {path}, give a checkpoint of KernelAttentionAggregator")
    return found
