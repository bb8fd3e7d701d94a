"""Representations of event sequences enriched with what others were doing at that moment.

Source: arXiv 2502.10205; where the released code looks ahead, sees itself or computes on seconds, the right thing is
the default and the released behaviour a flag.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_modules.collectives import from_first, gather_rows, kept_by_first
from lightning_modules.context.aggregators import AggregatorFactory, KernelAttention
from lightning_modules.context.combination import CombinationFactory, Concat
from lightning_modules.context.data_state import check_trained_on, require_absolute_times
from lightning_modules.context.enriched import Asked, Branch, ContextRules, EnrichedEncoder, drawn_by_name
from lightning_modules.context.evaluation import Embeddings, Encoded, Evaluation, evaluate, exported
from lightning_modules.context.fit_contexts import FitContexts
from lightning_modules.context.fixed_sequences import validation_sequences
from lightning_modules.context.refresh import PerEpoch, Refresh, Static
from lightning_modules.context.study import ContextStudy
from lightning_modules.context.visible import Context, Events
from lightning_modules.losses import CoLES, EventObjective, ObjectiveFactory, recall_at
from lightning_modules.many_devices import require_replicas
from lightning_modules.metrics import EpochMean
from lightning_modules.networks import EncoderFactory, EventEncoder, RecurrentEncoder


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


class KernelAttentionAggregator(LightningModule):
    """Pre-train an encoder, train aggregators of the states of others on it, and see what they add.

    ``fit`` first trains the encoder on its own objective (or loads it) and keeps its epoch of least ``val/loss``, then
    all aggregators at once by the same kind of loss on z = combination(q, b), with the encoder frozen or tuned, each
    branch its own copy and the wider encoder beside them; of these the last epoch is kept. ``test`` hands own states, z
    and time features to probes of every target and returns a study; ``predict`` gives embeddings z with the users that
    influenced them.

    Batches are those of ``EventSequencesDataModule``: sequences in training; in validation, test and prediction one
    batch of flat events, context users and queries. In validation nothing of the test is in it, and under a time split
    weights and banks of the fit end at ``train_stop``; later the context goes on taking in events strictly before each
    query.

    Logged: ``train/loss``, the mean over what is trained; ``val/loss``, and ``val/<aggregator>/loss`` or
    ``val/wide/loss`` of each, over one batch of all validation sequences, so that a CoLES that sums over pairs has
    another scale there than in training; while CoLES trains encoders ``val/recall`` and ``val/wide/recall``, the share
    of a user's other slices among the 4 most similar; with a tuned encoder ``bank/<aggregator>/drift``, 1 - cosine of
    the bank's states and fresh ones at the end of an epoch, and ``bank/<aggregator>/age_steps``, batches since it was
    encoded.

    Of several processes each trains on its part of a batch, and the step is that of one process with the joined batch,
    but for norms, whose statistics in training are those of each part. Each holds all events and encodes the contexts;
    the first validates, tests and predicts for all.

    Args:
        vocabulary_sizes: Of the categorical features, linked by the CLI as the next two.
        n_numeric: Number of numeric features.
        median_gap: Days between events of a user, the default time unit of decay.
        encoder: Factory of the encoder.
        encoder_objective: Factory of what it is trained by.
        encoder_epochs: Epochs of the encoder; 0 with ``encoder_weights``.
        encoder_weights: A checkpoint of this module whose encoder is taken instead of training one. A fit refuses one
            that was trained on another split, other events or another coding, and warns of one that does not say.
        wide_encoder: Factory of a wider encoder, the parameter-matched control: trained beside the first, and where
            that is tuned for as many further epochs as the branches.
        aggregators: Factories by name; the default is kernel attention.
        aggregator_epochs: Epochs of the aggregators; 0 if none has anything to learn.
        objective: Factory of what aggregators are trained by; by default as the encoder.
        combination: Factory of what joins own state and context.
        context: What counts as context.
        tune_encoder: Whether branches train copies of the encoder; a branch without context gets as many epochs.
        refresh: When the bank is encoded anew while tuning, and by which encoder in a test; by default every epoch and
            by the tuned one, published never. With a frozen encoder there is nothing to refresh.
        max_context_queries: Most steps of a batch, and process, whose context is looked up, where the objective reads
            every step: later sequences of the batch are left out.
        evaluation: Probes, arms and controls of the test.
        reference_mode: Whether rules of the context, arguments of aggregators and the policy of refreshing that are not
            given are those of the released code: see ``ContextRules`` and what ``published`` means for each aggregator.
        encoder_optimizer: Called with the parameters of an encoder and its objective.
        aggregator_optimizer: Called with the parameters of each branch.

    Raises:
        ValueError: If a fact of the data was not linked, or arguments do not fit together.
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
        if wide_encoder is not None and not encoder_epochs:
            raise ValueError(
                "wide_encoder is trained beside the encoder and needs encoder_epochs, got 0; null leaves it out"
            )
        if refresh is not None and not tune_encoder:
            raise ValueError(
                "refresh is for a tuned encoder (tune_encoder): the states of a frozen one stay as they are"
            )
        if "encoder" in (aggregators or {}):
            raise ValueError("no aggregator may be called 'encoder', which names the one that is pre-trained")
        super().__init__()
        self.automatic_optimization = False
        self._encoder_source: tuple[str, dict[str, dict[str, Any]]] | None = None
        known: dict[str, Any] = {"vocabulary_sizes": list(vocabulary_sizes), "n_numeric": n_numeric}
        network = encoder(**known)
        if encoder_weights:
            weights, kept = encoder_from(encoder_weights)
            network.load_state_dict(weights)
            self._encoder_source = encoder_weights, kept
        self.model = EnrichedEncoder(
            network,
            aggregators or {"kernel": KernelAttention},
            combination=combination,
            objective=objective or encoder_objective,
            median_gap=float(median_gap),
            rules=context,
            tune=tune_encoder,
            published=reference_mode,
            **known,
        )
        self.pretraining = nn.ModuleDict({"encoder": encoder_objective(d=network.d_model, **known)})
        self.wide = None if wide_encoder is None else wide_encoder(**known)
        self.wide_branch: Branch | None = None
        if self.wide is not None:
            self.pretraining["wide"] = encoder_objective(d=self.wide.d_model, **known)
        if self.wide is not None and tune_encoder:
            with drawn_by_name("wide"):
                self.wide_branch = Branch(
                    None,
                    d=self.wide.d_model,
                    combination=combination,
                    objective=objective or encoder_objective,
                    facts=known,
                    encoder=None,
                )
        self.encoder_epochs, self.aggregator_epochs = encoder_epochs, aggregator_epochs
        self.max_context_queries = max_context_queries
        self.evaluation = evaluation or Evaluation()
        self.evaluation.check_aggregators(self.model.aggregators)
        self.encoder_optimizer, self.aggregator_optimizer = encoder_optimizer, aggregator_optimizer
        self.learned = [name for name in self.model.branches if self.model.branch(name).learns]
        self.learned += [] if self.wide_branch is None else ["wide"]
        if self.learned and aggregator_epochs == 0:
            raise ValueError(f"aggregator_epochs must be at least 1 for {', '.join(self.learned)}, got 0")
        if encoder_epochs + (aggregator_epochs if self.learned else 0) == 0:
            raise ValueError("nothing is trained: encoder_weights are given and no aggregator has anything to learn")
        self._policy = refresh or (PerEpoch() if tune_encoder and not reference_mode else Static())
        self._start_over()
        self.train_loss = EpochMean()
        self.bank_ages = nn.ModuleDict({name: EpochMean() for name in self.contexts.refreshes if tune_encoder})

    def _start_over(self) -> None:
        """Forget an earlier fit, but for its weights."""
        self.contexts = FitContexts(self.model, self._policy)
        self._best: dict[str, tuple[float, dict[str, Tensor]]] = {}

    def forward(self, events: Events, name: str = "own") -> Tensor:
        """``(E, d)`` own states after every event, of the encoder that the branch ``name`` reads."""
        return self.model.encode(events, name)

    # Fit

    @property
    def _is_pretraining(self) -> bool:
        if self.trainer.state.fn == TrainerFn.FITTING:
            return self.current_epoch < self.encoder_epochs
        return not self.contexts.banks  # a validation by itself, of the phase that a checkpoint ended in

    def setup(self, stage: str) -> None:
        """See that every process holds the whole model, times compare, and a loaded encoder is of the same training.

        Raises:
            ValueError: Under a strategy that splits the model, with relative times, or, in a fit, if the encoder was
                trained on something else.
        """
        require_replicas(self.trainer)
        datamodule = getattr(self.trainer, "datamodule", None)
        require_absolute_times(datamodule)
        if stage == "fit" and self._encoder_source is not None:
            path, kept = self._encoder_source
            if not check_trained_on(path, kept, datamodule):
                rank_zero_warn(
                    f"encoder_weights: {path} does not say what it was trained on, so nothing could be compared: were "
                    "later events, users of the test or other ids of categories among it, results are worth nothing"
                )

    def on_fit_start(self) -> None:
        """See that the trainer fits the plan.

        Raises:
            ValueError: If epochs do not add up.
        """
        wanted = self.encoder_epochs + (self.aggregator_epochs if self.learned else 0)
        if self.trainer.max_epochs != wanted:
            what = f"{self.encoder_epochs} of the encoder and {wanted - self.encoder_epochs} of the aggregators"
            raise ValueError(f"trainer.max_epochs must be {wanted}: {what}, got {self.trainer.max_epochs}")

    def on_train_start(self) -> None:
        """Take the flat events of validation: what banks of the fit are built from.

        Raises:
            ValueError: If there is no validation, or it lacks what will be asked of it.
        """
        if not self.trainer.val_dataloaders or not self.trainer.limit_val_batches:
            raise ValueError(
                "banks are built from the events of validation, which must follow each epoch: see "
                "trainer.limit_val_batches and trainer.check_val_every_n_epoch"
            )
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed, and a resumed fit draws one more of them
            seen = next(iter(self.trainer.val_dataloaders))
        self.evaluation.check_targets(seen["queries"], (0, 1))
        if self.global_step == 0:
            self._start_over()
        self.contexts.read(seen["events"], seen["context_users"], seen["train_stop"], self.device)
        self._freeze()  # a fit that goes on amid an epoch meets no start of one

    def on_train_epoch_start(self) -> None:
        """Freeze the encoder once aggregators train; begin the means of the epoch."""
        self._freeze()
        if self.current_epoch == self.encoder_epochs:
            self.model.start_tuning()
        means: list[Any] = [self.train_loss, *self.bank_ages.values()]
        for mean in means:
            mean.reset()

    def _freeze(self) -> None:
        """The encoder, statistics of its norms too, learns in its own phase alone."""
        self.model.encoder.requires_grad_(self._is_pretraining).train(self._is_pretraining)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Encode the context anew where that is due."""
        if self._is_pretraining:
            return
        self.contexts.encode_due(self.current_epoch)
        if self.model.tune:
            for name, steps in self.contexts.ages().items():
                age: Any = self.bank_ages[name]
                age.update(steps)
                self.log(f"bank/{name}/age_steps", age, on_step=False, on_epoch=True, batch_size=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the encoder, or of every branch that has something to learn."""
        optimizers: Any = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        n_first = len(self.pretraining) if self.encoder_epochs else 0
        if self._is_pretraining:
            named = dict(zip(self.pretraining, optimizers[:n_first], strict=True))
        else:
            named = dict(zip(self.learned, optimizers[n_first:], strict=True))
        losses = []
        for name, loss in self._losses(batch):
            named[name].zero_grad()
            self.manual_backward(loss)
            named[name].step()
            self.contexts.follow(name)
            losses.append(loss.detach())
        self.contexts.steps += not self._is_pretraining
        joined, _ = gather_rows(torch.stack(losses).mean().unsqueeze(0))
        self.train_loss.update(joined.mean(), batch["mask"].any(1).sum())  # padding rows are no rows
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def _losses(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Losses of all that is trained now, one by one, so that one graph at a time is held."""
        if self._is_pretraining:
            for name in self.pretraining:
                yield name, self._objective(name)(self._represented(name, batch), batch)
            return
        # Branches of a frozen encoder ask the same: it is looked up once.
        frozen = None if self.model.tune else self._looked_up(self.learned[0], batch)
        devices = [self.device] if self.device.type == "cuda" else []
        for name in self.learned:
            # Branches draw noise from one stream, which a control must not move.
            with torch.random.fork_rng(devices=devices, enabled=name == "wide"):
                query, context, asked = frozen or self._looked_up(name, batch)
                loss = self._branch(name).loss(query, context, asked)
            yield name, loss

    def _represented(self, name: str, batch: Mapping[str, Tensor]) -> Tensor:
        """What an encoder in pre-training gives its objective."""
        network = self._pretrained(name)
        return network.encode_last(batch) if self._objective(name).needs == "last" else network.encode_steps(batch)

    def _looked_up(self, name: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Context | None, Asked]:
        asked = Asked.by(self._objective(name), batch, self.max_context_queries)
        with torch.set_grad_enabled(self.model.tune and torch.is_grad_enabled()):
            query = asked.states(self._pretrained(name) if name == "wide" else self.model.encoder_of(name))
        bank = self.contexts.bank(name)
        if bank is None:
            return query, None, asked
        return query, bank.context(asked.times, asked.users, states=self.contexts.live_states(name)), asked

    def _pretrained(self, name: str) -> EventEncoder:
        network = self.model.encoder if name == "encoder" else self.wide
        assert network is not None
        return network

    def _branch(self, name: str) -> Branch:
        """A branch of the model, or that of the wider encoder."""
        found = self.wide_branch if name == "wide" else self.model.branch(name)
        assert found is not None
        return found

    def _objective(self, name: str) -> EventObjective:
        """Of what is trained now."""
        found: Any = self.pretraining[name] if self._is_pretraining else self._branch(name).objective
        return found

    def on_validation_start(self) -> None:
        """Have contexts of a checkpoint where the model is: in a validation by itself nobody else moves them."""
        self.contexts.to(self.device)

    def on_test_start(self) -> None:
        """As :meth:`on_validation_start`."""
        self.contexts.to(self.device)

    def on_predict_start(self) -> None:
        """As :meth:`on_validation_start`."""
        self.contexts.to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss of what is being trained on sequences of validation.

        Raises:
            ValueError: If there are no such sequences.
        """
        if self.trainer.sanity_checking:
            return
        found, recalls = from_first(lambda: self._validated(batch))
        losses = {name: value.to(self.device) for name, value in found.items()}  # where they are summed up
        loss = losses.pop("encoder") if self._is_pretraining else torch.stack(list(losses.values())).mean()
        # The same in all processes: what is synchronised is equal.
        self.log("val/loss", loss, prog_bar=True, batch_size=1, sync_dist=True)
        self.log_dict({f"val/{name}/loss": value for name, value in losses.items()}, batch_size=1, sync_dist=True)
        for name, recall in recalls.items():
            self.log("val/recall" if name == "encoder" else f"val/{name}/recall", recall, batch_size=1, sync_dist=True)
        if self._is_pretraining and self.trainer.state.fn == TrainerFn.FITTING:
            for name, value in {"encoder": loss, **losses}.items():
                if float(value) < self._best.get(name, (float("inf"), {}))[0]:
                    weights = self._pretrained(name).state_dict()
                    self._best[name] = float(value), {key: one.detach().clone() for key, one in weights.items()}

    def _validated(self, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Losses by what is trained now, and recalls of encoders that tell users by their slices.

        Computed once, since processes that disagree in a digit might choose differently.
        """
        longest = [one.max_length for one in (self.model.encoder, self.wide) if one is not None and one.max_length]
        sequences = validation_sequences(
            batch,
            self._objective("encoder" if self._is_pretraining else self.learned[0]),
            max_length=min(longest, default=None),
            max_users=self.evaluation.max_validation_users,
            supervised=self.evaluation.supervised,
        )
        sequences = {key: value.to(self.device) for key, value in sequences.items()}
        losses = {name: loss.cpu() for name, loss in self._losses(sequences)}
        told = [name for name in losses if self._is_pretraining and isinstance(self._objective(name), CoLES)]
        return losses, {name: recall_at(self._represented(name, sequences), sequences["users"]) for name in told}

    def on_train_epoch_end(self) -> None:
        """Go back to the best epoch when encoders are done, before a checkpoint is written; see how banks drifted."""
        if self.current_epoch == self.encoder_epochs - 1:
            for name, (_, weights) in self._best.items():
                self._pretrained(name).load_state_dict(weights)
        if not self._is_pretraining and self.model.tune:
            drifts = {f"bank/{name}/drift": value for name, value in self.contexts.drifts().items()}
            self.log_dict(drifts, batch_size=1, sync_dist=True)

    # Test and prediction

    @torch.no_grad()
    def represent(self, events: Events, users: Tensor, times: Tensor, context_users: Tensor | None = None) -> Tensor:
        """Features of queries ``(Q, k)``: own states, of every branch where it is tuned, then contexts of aggregators.

        Where a combination is more than ``Concat``, what it gives for every aggregator comes last.
        A query reads events strictly before its time alone, of itself and of others: what an audit checks.

        Args:
            events: Flat.
            users: ``(Q,) int64``.
            times: ``(Q,) int64`` microseconds.
            context_users: Users others may see; None takes all.
        """
        encoded = self._encoded(events, context_users)
        own = {name: encoded.own(name, users, times).states for name in ["own", *self.model.aggregators]}
        kept = [*self.model.branches] if self.model.tune else ["own"]
        contexts = {name: encoded.context(name, own[name], users, times) for name in self.model.aggregators}
        combined = [self.model.combined(name, own[name], contexts[name]) for name in self.model.mixing]
        return torch.cat([*(own[name] for name in kept), *contexts.values(), *combined], dim=1)

    @torch.no_grad()
    def represent_context(
        self,
        own: Events,
        others: Events,
        users: Tensor,
        times: Tensor,
        context_times: Tensor,
        context_users: Tensor | None = None,
    ) -> Tensor:
        """The context vectors alone ``(Q, k)``, own history and others taken from tables of their own.

        Args:
            own: Flat events that own states at ``times`` are read from.
            others: Flat events of the same users that others are read from.
            users: ``(Q,) int64``.
            times: ``(Q,) int64`` microseconds.
            context_times: ``(Q,) int64`` moments at which others are looked up.
            context_users: Users others may see; None takes all.
        """
        mine, theirs = self._encoded(own, context_users), self._encoded(others, context_users)
        parts = [
            theirs.context(name, mine.own(name, users, times).states, users, context_times)
            for name in self.model.aggregators
        ]
        return torch.cat(parts, dim=1)

    def _encoded(self, events: Events, context_users: Tensor | None) -> Encoded:
        everybody = torch.arange(len(events["offsets"]) - 1)
        users = everybody if context_users is None else context_users
        return Encoded(self.model, events, users, self.contexts.bank_encoder)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> ContextStudy | None:  # type: ignore[override]
        """Probe every target with and without context; the report callback reads what is returned.

        Returns:
            The study; None in all processes but the first.
        """
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        settings: dict[str, Any] = {"wide": self.wide, "bank_encoder": self.contexts.bank_encoder, "seed": seed}
        return kept_by_first(lambda: evaluate(self.model, batch, self.evaluation, **settings))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Embeddings | None:
        """Embeddings at the test queries of the first target, with own state, context and who influenced it most.

        Returns:
            Them; None in all processes but the first.
        """
        bank_encoder = self.contexts.bank_encoder
        return kept_by_first(lambda: exported(self.model, batch, self.evaluation, bank_encoder=bank_encoder))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the contexts of the fit and the best encoders: tensors and plain values."""
        checkpoint["contexts"] = self.contexts.state_dict()
        checkpoint["best_encoders"] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up contexts, the best encoders, and where the policies of refreshing stood.

        Raises:
            ValueError: If the checkpoint is of another module or of other aggregators.
        """
        if "contexts" not in checkpoint:
            raise ValueError("checkpoint holds no contexts: it was not written by this KernelAttentionAggregator")
        self._start_over()
        self.contexts.load_state_dict(checkpoint["contexts"])
        self._best = dict(checkpoint["best_encoders"])

    def configure_optimizers(self) -> Any:
        """One optimiser for each encoder that is pre-trained, then one for each branch that learns."""
        found = []
        for name in self.pretraining if self.encoder_epochs else ():
            params = [*self._pretrained(name).parameters(), *self.pretraining[name].parameters()]
            found.append(self.encoder_optimizer(params))
        for name in self.learned:
            trained: list[nn.Module] = [self._branch(name), *([self._pretrained(name)] if name == "wide" else [])]
            params = [one for module in trained for one in module.parameters() if one.requires_grad]
            found.append(self.aggregator_optimizer(params))
        return found


def encoder_from(path: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Weights of the encoder in a checkpoint of :class:`KernelAttentionAggregator`, and what tells of its data.

    Returns:
        The weights by name; the other mappings of the checkpoint by key, without contexts and best encoders.

    Raises:
        ValueError: If the file holds none.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that is anything
        raise ValueError(f"encoder_weights: {path} is not a checkpoint, or not a whole one") from error
    weights = loaded.get("state_dict", {}) if isinstance(loaded, dict) else {}
    prefix = "model.encoder."
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"encoder_weights: no encoder in {path}, give a checkpoint of KernelAttentionAggregator")
    large = ("state_dict", "contexts", "best_encoders")
    return found, {name: one for name, one in loaded.items() if isinstance(one, dict) and name not in large}
