"""Attacks on a time-series classifier that also fool a trained detector, and judges that the attack never saw.

Source: arXiv 2502.20948; the roles of judges, replay, rounds, calibration and the selection rule are ours.
"""

import importlib.util
import os
from copy import deepcopy
from dataclasses import asdict
from typing import Any, get_args

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules.attacks.campaign import (
    choose,
    cross_fitted,
    fit_panel,
    fresh_panel,
    judged,
    require_same_attacks,
    run_chosen,
    seen_levels,
)
from lightning_modules.attacks.class_losses import cross_entropy, decisions
from lightning_modules.attacks.discriminators import AdversarialBank, AttackPlan, DiscriminatorPlan, detection_loss
from lightning_modules.attacks.frozen_networks import call, confidence, logits_of, taken_mask, takes_mask
from lightning_modules.attacks.judges import NEEDS_SCIKIT_LEARN, FittedJudge, Judge, NetworkJudge, check_disjoint
from lightning_modules.attacks.series_batches import whole_split, without_padding
from lightning_modules.attacks.study import AdversarialSeries, AttackStudy, Role, SeenLevel
from lightning_modules.attacks.victims import check_logits, load_victim
from lightning_modules.collectives import from_first, gather_rows, share
from lightning_modules.many_devices import require_replicas
from lightning_modules.metrics import EpochMean
from lightning_modules.metrics.attack_functional import detector_auc
from lightning_modules.networks import NetworkFactory, ResCNN

_FACTS = ("n_channels", "n_classes", "n_steps")


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


class ConcealedAttacker(LightningModule):
    """Train a classifier and discriminators of its attacks, choose attacks on validation, and judge them on test.

    ``fit`` trains the classifier (unless a victim is given) and keeps its epoch of least ``val/loss``, then every
    discriminator by its plan against the frozen classifier. In its last epoch it runs the grid of every attack on the
    validation series and chooses one configuration and iteration for each: the largest harmonic mean of effectiveness
    and concealability (F1 form, attacked discriminators), ties to the smaller step. ``test`` runs the chosen attacks
    and has them judged; ``predict`` writes adversarial series of one of them. Batches are those of
    ``TimeSeriesDataModule``.

    Thresholds of detectors are calibrated on clean series of train and validation, each scored by a detector that was
    trained without it: validation series by the detector itself, training series by copies (``n_folds`` of them, each
    trained without one fold). Validation series did choose attacks, but no detector: a clean score, and with it the
    rate of false alarms, is a function of detector and series alone, the same whatever attack is chosen and whichever
    series choose it. So scores of validation and test series are exchangeable, up to the epoch of the classifier, which
    validation chose (with a ``victim`` exactly; judges that are no networks do not depend on it); those of training
    series as far as copies agree with the detector. With ``n_folds`` 0 validation series alone calibrate.

    A discriminator is a valid judge if it sees the vanilla attacks that it was trained against on validation series:
    mean AUC over these attacks and their levels, without rounds, of at least 0.8.

    A checkpoint of an unfinished fit holds all adversarial series so far (one array as large as the split for each
    level and attack), so that a fit resumed after any step equals an unbroken one, given
    :class:`~lightning_modules.callbacks.RandomState` among the callbacks, as the command has it.

    Of several processes each takes its part of a batch, and gradients are those of the joined batch; adversarial series
    are made by the process that needs them first, and given to all. Attacks are chosen, and judges fitted, by the first
    for all. Batch normalisation (:class:`~lightning_modules.networks.ResCNN`) has the statistics of each process' part.

    Logged: ``train/loss``, ``val/loss`` of what is being trained; ``val/accuracy`` of the classifier;
    ``val/<discriminator>/auc`` of all validation series against those of its present level; ``val/<attack>/success`` in
    the last epoch.

    Args:
        n_channels: C of the data, linked by the CLI as the next three.
        n_classes: K.
        n_steps: T.
        class_names: Names of the classes.
        z_norm_ddof: n - ``z_norm_ddof`` is in the std of series that are z-normed one by one, None where they are not:
            the two-statistics judge reads it.
        classifier: Factory of the attacked network.
        victim: Arguments of :func:`lightning_modules.attacks.load_victim` in place of a classifier trained here.
        classifier_epochs: Epochs of the classifier, 0 with a victim.
        discriminators: At least one with role ``"attacked"``.
        attacks: Attacks of the test, at least one.
        predict_attack: Name of the attack of ``predict``; by default the last.
        n_folds: Copies of each discriminator for calibration, 0 or at least 2; with 0 validation alone calibrates.
        fitted_judges: Whether statistics, nearest neighbour and one-class judges join the held-out panel; that of two
            statistics is always in it where series are z-normed.
        classifier_optimizer: Called with the classifier's parameters.
        discriminator_optimizer: Called with the parameters of each discriminator.
        classifier_scheduler: Called with the classifier's optimiser, stepped after each epoch of the classifier.
        discriminator_scheduler: Called with the optimiser of each discriminator and copy, stepped after each epoch in
            which it trains. It goes on from level to level and into rounds, as weights and optimiser do.
        max_rows: Series times configurations of a grid in memory at a time.
        keep_iterates: Whether ``predict`` hands on every iterate of the run, N + 1 times the memory of the series.

    Raises:
        ValueError: If a fact of the data was not linked, names repeat, no discriminator is attacked, a held-out one
            shares seed, architecture or training attacks with an attacked one, or a number is out of range; where
            training begins, if a schedule waits for a plateau of a metric.
    """

    def __init__(
        self,
        *,
        n_channels: int,
        n_classes: int,
        n_steps: int,
        class_names: Any = None,
        z_norm_ddof: int | None = None,
        discriminators: list[DiscriminatorPlan],
        attacks: list[AttackPlan],
        classifier: NetworkFactory = ResCNN,
        victim: dict[str, Any] | None = None,
        classifier_epochs: int = 30,
        predict_attack: str | None = None,
        n_folds: int = 2,
        fitted_judges: bool = True,
        classifier_optimizer: OptimizerCallable = _adam,
        discriminator_optimizer: OptimizerCallable = _adam,
        classifier_scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        max_rows: int = 4096,
        keep_iterates: bool = False,
    ) -> None:
        facts = dict(zip(_FACTS, (n_channels, n_classes, n_steps), strict=True))
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must come from the data, got None")
        if not any(plan.role == "attacked" for plan in discriminators) or not attacks:
            raise ValueError("at least one discriminator with role 'attacked' and one attack are needed")
        names = [plan.name for plan in discriminators]
        chosen_names = [plan.name for plan in attacks]
        if len(set(names)) < len(names) or len(set(chosen_names)) < len(chosen_names):
            raise ValueError(f"names of discriminators and of attacks must differ, got {names} and {chosen_names}")
        taken = [judge.name for judge, _ in fresh_panel(z_norm_ddof=0) if judge.name in names]
        if taken:
            raise ValueError(f"a discriminator cannot be named {taken[0]!r}, as another judge is")
        if n_folds == 1 or n_folds < 0:
            raise ValueError(f"n_folds must be 0 or at least 2, got {n_folds}")
        if predict_attack is not None and predict_attack not in chosen_names:
            raise ValueError(f"predict_attack must be one of {chosen_names}, got {predict_attack!r}")
        if classifier_epochs < (0 if victim else 1):
            raise ValueError(f"classifier_epochs must be at least 1 without a victim, got {classifier_epochs}")
        super().__init__()
        self.automatic_optimization = False
        self.facts = facts
        self.n_classes = n_classes
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(n_classes)))
        self.z_norm_ddof = z_norm_ddof
        self.plans, self.attacks = list(discriminators), list(attacks)
        self.predict_attack = predict_attack or chosen_names[-1]
        self.classifier_epochs = 0 if victim else classifier_epochs
        self.n_folds, self.fitted_judges, self.max_rows = n_folds, fitted_judges, max_rows
        self.keep_iterates = keep_iterates
        self.classifier_optimizer, self.discriminator_optimizer = classifier_optimizer, discriminator_optimizer
        self.classifier_scheduler, self.discriminator_scheduler = classifier_scheduler, discriminator_scheduler
        self.classifier: nn.Module = classifier(**facts) if victim is None else self._loaded(victim, "the victim")
        self.surrogates = nn.ModuleList(
            self._loaded(plan.surrogate, f"the surrogate of attack {plan.name!r}")
            for plan in attacks
            if plan.surrogate is not None
        )
        # Copy 0 is the discriminator; copies 1..n_folds were trained without one fold each.
        self.copies = nn.ModuleList(
            nn.ModuleList(self._seeded(plan, copy) for copy in range(1 + n_folds)) for plan in self.plans
        )
        check_disjoint(self._network_judges("attacked"), self._network_judges("held_out"))
        self.train_loss, self.val_loss, self.val_accuracy = EpochMean(), EpochMean(), EpochMean()
        self._forget()

    def _forget(self) -> None:
        self._banks: dict[str, AdversarialBank] = {}
        self._clean: dict[str, dict[str, Tensor]] = {}
        self._snapshots: dict[str, list[nn.Module]] = {}
        self._validated: list[Tensor] = []
        self._scores: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._best_classifier: tuple[float, dict[str, Tensor]] | None = None
        # What the end of a fit finds: tensors, numbers, strings.
        self.found: dict[str, Any] | None = None

    def _loaded(self, arguments: dict[str, Any], role: str) -> nn.Module:
        """A classifier from elsewhere, of as many classes as the data has."""
        try:
            network = load_victim(**arguments)
            found = check_logits(network, torch.randn(2, self.facts["n_steps"], self.facts["n_channels"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{role}: {error}") from error
        if found != self.n_classes:
            raise ValueError(f"{role} tells {found} classes apart, the data has {self.n_classes}")
        return network

    def _surrogates(self) -> dict[str, nn.Module]:
        """What stands for the classifier, by the name of the attack."""
        names = [plan.name for plan in self.attacks if plan.surrogate is not None]
        return dict(zip(names, self.surrogates, strict=True))

    def _seeded(self, plan: DiscriminatorPlan, copy: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed + 1000 * copy)
            facts = self.facts | {"n_classes": 2}
            return plan.network(**facts)

    @property
    def discriminator_epochs(self) -> int:
        """Epochs of the longest plan."""
        return max(plan.n_epochs for plan in self.plans)

    def _copies(self, number: int) -> list[nn.Module]:
        """A discriminator and its copies."""
        group = self.copies[number]
        assert isinstance(group, nn.ModuleList)
        return list(group)

    def attacked_networks(self) -> list[nn.Module]:
        """The discriminators that attacks may read."""
        return [self._copies(number)[0] for number, plan in enumerate(self.plans) if plan.role == "attacked"]

    def _network_judges(self, role: str | None = None, copy: int = 0) -> list[NetworkJudge]:
        return [
            NetworkJudge(self._copies(number)[copy], plan.name, plan.provenance(self._copies(number)[0]))
            for number, plan in enumerate(self.plans)
            if role in (None, plan.role)
        ]

    def _fresh_panel(self) -> list[Judge]:
        return [judge for judge, _ in fresh_panel(self.z_norm_ddof, self.fitted_judges)]

    def forward(self, series: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the classifier.

        Raises:
            ValueError: If the classifier, or the network that a ``victim`` wraps, takes no mask and series are padded.
        """
        return call(self.classifier, series, mask)

    # Fit

    def setup(self, stage: str) -> None:
        """Forget an earlier fit; a checkpoint to resume from is read after this."""
        require_replicas(self.trainer)
        if stage == "fit":
            self._forget()

    def on_fit_start(self) -> None:
        """See that the trainer fits the plans, and that the judges can be fitted when it is done.

        Raises:
            ValueError: If epochs or validation do not suit.
            ImportError: Without scikit-learn, which a judge is fitted by.
        """
        for name, wanted in (("check_val_every_n_epoch", 1), ("val_check_interval", 1.0)):
            found = getattr(self.trainer, name)
            if type(found) is not type(wanted) or found != wanted:
                raise ValueError(f"{name} must be {wanted}, attacks are chosen after the last epoch, got {found}")
        if self.fitted_judges and importlib.util.find_spec("sklearn") is None:  # before hours are spent
            raise ImportError(NEEDS_SCIKIT_LEARN)
        wanted = self.classifier_epochs + self.discriminator_epochs
        if self.trainer.max_epochs != wanted and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"trainer.max_epochs must be {wanted}: {self.classifier_epochs} of the classifier and "
                f"{self.discriminator_epochs} of the longest discriminator plan, got {self.trainer.max_epochs}"
            )

    def on_train_start(self) -> None:
        """See that there are series to choose attacks by, and networks that take them; go on where a fit resumes.

        Raises:
            ValueError: If there are none, or series are padded and a network takes no mask.
        """
        if not self.trainer.val_dataloaders or not self.trainer.limit_val_batches:
            raise ValueError(
                "attacks are chosen on validation series, there are none (data.init_args.validation_fraction)"
            )
        networks = {"classifier": self.classifier}
        networks |= {f"surrogate of {name!r}": network for name, network in self._surrogates().items()}
        networks |= {f"discriminator {plan.name!r}": self._copies(number)[0] for number, plan in enumerate(self.plans)}
        for role, network in networks.items():
            if not takes_mask(network):  # else the splits need not be read yet
                for split in ("train", "validation"):
                    taken_mask(network, self._series(split)["mask"], role)
        if not self.classifier_epochs:
            self._check_victim()
        for snapshot in self._snapshots.values():
            for network in snapshot:
                network.to(self.device)
        # on_train_epoch_start is not called where a fit resumes amid an epoch.
        if self._discriminator_epoch >= 0:
            self.classifier.eval()

    def _check_victim(self) -> None:
        """Say how a victim from elsewhere decides on validation, before hours are spent on it."""
        clean = self._series("validation")
        logits = logits_of(self.classifier, clean["series"].to(self.device), clean["mask"].to(self.device))
        labels = clean["labels"]
        right = int((decisions(logits).cpu() == labels.cpu()).sum())
        said = f"the victim calls {right} of {len(labels)} clean validation series rightly"
        if right <= int(torch.bincount(labels).max()):
            said = (
                f"Warning: {said}, no more than whoever calls all of them the commonest class: are its logits in the "
                f"order of the classes ({', '.join(self.class_names)}), and does it take series as the data gives them "
                "(normalise of the data)?"
            )
        self.print(said)

    def on_train_epoch_start(self) -> None:
        """Freeze the classifier, statistics too, once discriminators train; remember them where a round begins."""
        self.train_loss.reset()
        epoch = self._discriminator_epoch
        if epoch < 0:
            return
        if epoch == 0 and self._best_classifier is not None:
            self.classifier.load_state_dict(self._best_classifier[1])
        self.classifier.eval()
        for number, plan in enumerate(self.plans):
            level = plan.level_at(epoch)
            if epoch == level * plan.epochs_per_level and plan.levels[level].concealed:
                # As they are when the level begins: the discriminators answer to what was made against them.
                self._snapshots[f"{number}/{level}"] = [deepcopy(network) for network in self.attacked_networks()]

    @property
    def _discriminator_epoch(self) -> int:
        return self.current_epoch - self.classifier_epochs

    def _series(self, split: str) -> dict[str, Tensor]:
        """The clean series of a split by row, all of them: levels, judges and calibration come back to them."""
        if split not in self._clean:
            loader: Any = self.trainer.train_dataloader if split == "train" else self.trainer.val_dataloaders
            # In the floats that batches come in.
            self._clean[split] = self.trainer.precision_plugin.convert_input(whole_split(loader))
        return self._clean[split]

    def _bank(self, split: str, number: int, n_series: int | None = None) -> AdversarialBank:
        key = f"{split}/{number}"
        if key not in self._banks:
            n_series = len(self._series(split)["labels"]) if n_series is None else n_series
            self._banks[key] = AdversarialBank(
                n_series, lambda level, attack, rows: self._made(split, number, level, attack, rows)
            )
        return self._banks[key]

    def _made(self, split: str, number: int, level: int, attack: int, rows: Tensor) -> Tensor:
        """Adversarial series of an attack of a level of a plan."""
        plan, clean = self.plans[number], self._series(split)
        stage = plan.levels[level].attacks[attack]
        result = stage.attack(
            self.classifier,
            clean["series"][rows].to(self.device),
            clean["labels"][rows].to(self.device),
            mask=clean["mask"][rows].to(self.device),
            index=rows.to(self.device),
            detectors=self._snapshots[f"{number}/{level}"] if plan.levels[level].concealed else [],
            generator=plan.seed,
            batch_size=None if stage.attack.couples_batch else 1024,
            step=stage.strength if stage.attack.projection is None else None,
            radius=stage.strength if stage.attack.projection is not None else None,
        )
        return result.x_adv

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the classifier, or of every discriminator and its copies; the same ones in every process."""
        optimizers: Any = self.optimizers(use_pl_optimizer=True)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        batch = without_padding(batch)
        n_series = len(batch["labels"])
        losses = []
        if self._discriminator_epoch < 0:
            if n_series:
                losses.append(cross_entropy(self(batch["series"], batch["mask"]), batch["labels"]).mean())
            self._step(optimizers[0], losses[0] if losses else None, n_series)
        else:
            first = 1 if self.classifier_epochs else 0  # a victim has no optimiser
            for number, plan in enumerate(self.plans):
                if self._discriminator_epoch >= plan.n_epochs:
                    continue
                adversarial = self._adversarial(number, batch)
                for copy, network in enumerate(self._copies(number)):
                    kept = batch["labels"] >= 0 if copy == 0 else self._folds(batch["index"]) != copy - 1
                    loss = None
                    if bool(kept.any()):
                        both = torch.cat([batch["series"][kept], adversarial[kept]])
                        loss = detection_loss(*call(network, both, batch["mask"][kept].repeat(2, 1)).chunk(2))
                        if copy == 0:
                            losses.append(loss.detach())
                    optimizer = optimizers[first + number * (1 + self.n_folds) + copy]
                    self._step(optimizer, loss, int(kept.sum()))
        if self.trainer.is_last_batch:
            self._step_schedules()
        self.train_loss.update(torch.stack(losses).mean() if losses else 0.0, n_series)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=n_series)

    def _adversarial(self, number: int, batch: dict[str, Tensor]) -> Tensor:
        """Training series of a batch as a discriminator is to see them now."""
        plan, bank = self.plans[number], self._bank("train", number)
        adversarial = batch["series"]  # of an empty batch there are none to make
        if len(adversarial):
            n_attacks = [len(one.attacks) for one in plan.levels]
            level = plan.level_at(self._discriminator_epoch)
            adversarial = bank.sample(level, batch["index"], plan.replay, n_attacks)
        bank.exchange(self.device)
        return adversarial

    def _step(self, optimizer: Any, loss: Tensor | None, n_series: int) -> None:
        """Step by the mean over the series of all processes; ``loss`` is that of ``n_series`` here, None of 0."""
        factor = share(n_series, device=self.device)
        optimizer.zero_grad()
        if loss is not None:
            self.manual_backward(loss * factor)
        optimizer.step()

    def _step_schedules(self) -> None:
        """After the last step of an epoch, as Lightning does it: a checkpoint of that step holds the new rates."""
        found: Any = self.lr_schedulers() or []
        schedules = list(found) if isinstance(found, list) else [found]
        n_of_classifier = int(bool(self.classifier_epochs and self.classifier_scheduler))
        if self._discriminator_epoch < 0:
            stepped = schedules[:n_of_classifier]
        else:
            of_plans = schedules[n_of_classifier:]
            stepped = [
                schedule
                for number, schedule in enumerate(of_plans)
                if self._discriminator_epoch < self.plans[number // (1 + self.n_folds)].n_epochs
            ]
        for schedule in stepped:
            schedule.step()

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        if self.trainer.state.fn == TrainerFn.VALIDATING and self._discriminator_epoch < 0:
            self.print("`validate` shows the classifier alone: discriminators and attacks are judged by `test`")
        self._validated, self._scores = [], {}
        self.val_loss.reset()
        self.val_accuracy.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of the classifier, or how well each discriminator sees its level."""
        if self.trainer.sanity_checking:
            return
        labels, n_series = batch["labels"], len(batch["labels"])
        self._validated.append(batch["index"])
        if self._discriminator_epoch < 0:
            loss = accuracy = torch.zeros(())
            if n_series:
                logits = self(batch["series"], batch["mask"])
                loss = cross_entropy(logits, labels).mean()
                accuracy = (decisions(logits) == labels).float().mean()
            self.val_accuracy.update(accuracy, n_series)
            self._log_mean("val/accuracy", self.val_accuracy, n_series)
        else:
            losses = [self._detected(number, batch) for number in range(len(self.plans))]
            loss = torch.stack(losses).mean()
        self.val_loss.update(loss, n_series)
        self._log_mean("val/loss", self.val_loss, n_series)

    def _log_mean(self, key: str, mean: EpochMean, n_series: int) -> None:
        self.log(key, mean, on_step=False, on_epoch=True, batch_size=n_series)

    def _detected(self, number: int, batch: dict[str, Tensor]) -> Tensor:
        """Loss of a discriminator on validation series and on those of its present level; keeps the logits of both."""
        plan, bank = self.plans[number], self._bank("validation", number)
        level = plan.level_at(self._discriminator_epoch)
        loss, scores = torch.zeros((), device=self.device), (torch.zeros(0, device=self.device),) * 2
        if len(batch["labels"]):
            network, attacks = self._copies(number)[0], range(len(plan.levels[level].attacks))
            seen = call(network, batch["series"], batch["mask"])
            hidden = torch.cat(
                [call(network, bank.get(level, batch["index"], attack), batch["mask"]) for attack in attacks]
            )
            loss, scores = detection_loss(seen, hidden), (seen[:, 0], hidden[:, 0])
        bank.exchange(self.device)
        self._scores.setdefault(plan.name, []).append(scores)
        return loss

    @property
    def _is_last_epoch(self) -> bool:
        return self._discriminator_epoch == self.discriminator_epochs - 1

    def on_validation_epoch_end(self) -> None:
        """Keep the best classifier; in the last epoch choose the attacks, fit the judges, calibrate."""
        if not self._validated:
            return
        if self._discriminator_epoch < 0:
            loss = float(self.val_loss.compute())
            if self._best_classifier is None or loss < self._best_classifier[0]:
                self._best_classifier = (loss, deepcopy(self.classifier.state_dict()))
            return
        for name, scores in self._scores.items():
            seen, hidden = (gather_rows(torch.cat(parts).double())[0] for parts in zip(*scores, strict=True))
            # The same in every process already; sync_dist only says so to Lightning.
            self.log(f"val/{name}/auc", detector_auc(seen, hidden), sync_dist=True)
        if self._is_last_epoch and self.trainer.state.fn == TrainerFn.FITTING:
            rows = gather_rows(torch.cat(self._validated))[0].cpu().sort().values
            clean = {key: value[rows].to(self.device) for key, value in self._series("validation").items()}
            self.found = from_first(lambda: self._choices(clean))
            for name, choice in self.found["chosen"].items():
                self.log(f"val/{name}/success", choice["success"], sync_dist=True)

    def _choices(self, clean: dict[str, Tensor]) -> dict[str, Any]:
        """Attacks, judges and calibration, by validation series."""
        attacked = self._network_judges("attacked")
        chosen = {
            plan.name: choose(
                plan,
                self.classifier,
                attacked,
                clean,
                n_classes=self.n_classes,
                surrogate=self._surrogates().get(plan.name),
                seed=_seed(),
                max_rows=self.max_rows,
            )
            for plan in self.attacks
        }
        train = {key: value.to(self.device) for key, value in self._series("train").items()}
        panel = self._fresh_panel()
        fit_panel(panel, train["series"], train["mask"])
        logits = logits_of(self.classifier, clean["series"], clean["mask"])
        return {
            "chosen": chosen,
            "judges": {judge.name: judge.state() for judge in panel if isinstance(judge, FittedJudge)},
            "calibration": self._calibration(train, clean, panel),
            "levels": self._levels(clean),
            "saturation": float(confidence(logits).double().quantile(0.5)),
        }

    def _levels(self, clean: dict[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
        """What each discriminator sees of its training attacks, on validation series."""

        def seen(number: int, judge: Judge) -> list[SeenLevel]:
            bank = self._bank("validation", number)
            return seen_levels(
                self.plans[number], judge, clean, lambda level, attack: bank.get(level, clean["index"], attack)
            )

        return {
            judge.name: [asdict(level) for level in seen(number, judge)]
            for number, judge in enumerate(self._network_judges())
        }

    def _calibration(
        self, train: dict[str, Tensor], validation: dict[str, Tensor], panel: list[Judge]
    ) -> dict[str, Tensor]:
        """Scores of clean training, then validation series, by judges that were made without them."""
        judges = [*self._network_judges(), *panel]
        found = {judge.name: judge.score(validation["series"], validation["mask"]).cpu() for judge in judges}
        if self.n_folds == 0:
            return found
        folds = self._folds(torch.arange(len(train["labels"]), device=self.device))

        def without(fold: int) -> list[Judge]:
            fresh = self._fresh_panel()
            fit_panel(fresh, train["series"][folds != fold], train["mask"][folds != fold])
            return [*self._network_judges(copy=fold + 1), *fresh]

        trained = cross_fitted(without, train["series"], train["mask"], folds)
        return {name: torch.cat([trained[name], scores]) for name, scores in found.items()}

    def _folds(self, rows: Tensor) -> Tensor:
        """Fold of each training series; its copy of a discriminator is number fold + 1, and never sees it."""
        # By lot, the same in every epoch: a file may be in an order of its own.
        n_series = len(self._series("train")["labels"])
        shuffled = torch.randperm(n_series, generator=torch.Generator().manual_seed(0)).to(rows.device)
        return shuffled[rows] % self.n_folds

    # Test and predict

    def _fitted(self) -> dict[str, Any]:
        if self.found is None:
            raise ValueError("no attack was chosen: run `seqlit fit`, to its last epoch, before test or predict")
        return self.found

    def judges(self) -> list[tuple[Judge, Role]]:
        """All judges with their roles, as the fit left them."""
        found = self._fitted()
        judges: list[tuple[Judge, Role]] = []
        for role in get_args(Role):
            judges += [(judge, role) for judge in self._network_judges(role)]
        for judge, role in fresh_panel(self.z_norm_ddof, self.fitted_judges):
            if isinstance(judge, FittedJudge):
                judge.load_state(found["judges"][judge.name])
            judges.append((judge, role))
        return judges

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> AttackStudy | None:  # type: ignore[override]
        """Attack a batch with every chosen attack, and have it judged; the report callback joins the batches.

        None for an empty batch, where other processes have more series.
        """
        found = self._fitted()
        if len(batch["labels"]) == 0:
            return None
        with self._as_calibrated():
            return self._judged(batch, found)

    def _as_calibrated(self) -> torch.autocast:
        """Attacks were chosen and judges calibrated outside of any autocast: so are they run and read."""
        return torch.autocast(self.device.type, enabled=False)

    def _judged(self, batch: dict[str, Tensor], found: dict[str, Any]) -> AttackStudy:
        return judged(
            self.attacks,
            found["chosen"],
            self.classifier,
            self.attacked_networks(),
            self.judges(),
            found["calibration"],
            batch,
            levels={name: [SeenLevel(**level) for level in levels] for name, levels in found["levels"].items()},
            class_names=self.class_names,
            saturation=found["saturation"],
            surrogates=self._surrogates(),
            seed=_seed(),
            max_rows=self.max_rows,
        )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> AdversarialSeries:
        """Adversarial series of the attack ``predict_attack``, with their course."""
        (plan,) = [plan for plan in self.attacks if plan.name == self.predict_attack]
        choice, attacked = self._fitted()["chosen"][plan.name], self.attacked_networks()
        x_adv, n_iterates = batch["series"], plan.attack.n_steps + 1
        logits = x_adv.new_zeros(n_iterates, 0, 1 if self.n_classes == 2 else self.n_classes)
        detector_logits = x_adv.new_zeros(n_iterates, len(attacked), 0)
        iterates = x_adv.expand(n_iterates, *x_adv.shape) if self.keep_iterates else None
        if len(batch["labels"]):  # else other processes have more series
            with self._as_calibrated():
                result = run_chosen(
                    plan,
                    choice,
                    self.classifier,
                    attacked,
                    batch,
                    surrogate=self._surrogates().get(plan.name),
                    seed=_seed(),
                    max_rows=self.max_rows,
                    keep_iterates=self.keep_iterates,
                )
            x_adv, logits, detector_logits = result.x_adv, result.logits, result.detector_logits
            iterates = result.iterates
        return AdversarialSeries(
            attack=plan.name,
            index=batch["index"],
            labels=batch["labels"],
            mask=batch["mask"],
            series=batch["series"],
            x_adv=x_adv,
            logits=logits,
            detector_logits=detector_logits,
            detectors=tuple(judge.name for judge in self._network_judges("attacked")),
            iteration=choice["iteration"],
            iterates=iterates,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the fit found, or what an unfinished one goes on with: tensors, numbers, strings."""
        checkpoint["series_facts"], checkpoint["found"] = self.facts, self.found
        checkpoint["plans"] = self._names()
        checkpoint["unfinished"] = None
        if self.found is None:
            checkpoint["unfinished"] = {
                "best_classifier": self._best_classifier,
                "snapshots": {
                    key: [network.state_dict() for network in networks] for key, networks in self._snapshots.items()
                },
                "banks": {key: bank.state() for key, bank in self._banks.items()},
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what a fit found.

        Raises:
            ValueError: If it was trained on series of other channels, classes or steps, with other plans, or chose of
                other attacks.
        """
        trained = checkpoint.get("series_facts", self.facts)
        for name, value in self.facts.items():
            if trained[name] != value:
                raise ValueError(f"checkpoint was trained with {name} {trained[name]}, the data here has {value}")
        if checkpoint.get("plans", self._names()) != self._names():
            raise ValueError(f"checkpoint holds {checkpoint['plans']}, the config here names {self._names()}")
        self.found = checkpoint.get("found")
        if self.found is not None:
            require_same_attacks(self.attacks, self.found["chosen"])
        unfinished = checkpoint.get("unfinished")
        if unfinished is None:
            return
        self._best_classifier = unfinished["best_classifier"]
        for key, states in unfinished["snapshots"].items():
            self._snapshots[key] = [deepcopy(network) for network in self.attacked_networks()]
            for network, state in zip(self._snapshots[key], states, strict=True):
                network.load_state_dict(state)
        for key, state in unfinished["banks"].items():
            split, number = key.split("/")
            n_series = max(len(kept["known"]) for kept in state.values())
            self._bank(split, int(number), n_series).load_state(state)

    def _names(self) -> dict[str, list[str]]:
        return {"discriminators": [plan.name for plan in self.plans], "attacks": [plan.name for plan in self.attacks]}

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The classifier's optimiser unless it is a victim, then one for each discriminator and copy; their schedules.

        Raises:
            ValueError: If a schedule waits for a plateau of a metric.
        """
        copies = [network for number in range(len(self.plans)) for network in self._copies(number)]
        of_classifier = [self.classifier_optimizer(self.classifier.parameters())] if self.classifier_epochs else []
        of_copies = [self.discriminator_optimizer(network.parameters()) for network in copies]
        schedules: list[Any] = []
        for name, schedule, optimizers in (
            ("classifier_scheduler", self.classifier_scheduler, of_classifier),
            ("discriminator_scheduler", self.discriminator_scheduler, of_copies),
        ):
            made = [schedule(optimizer) for optimizer in optimizers] if schedule is not None else []
            if any(isinstance(one, torch.optim.lr_scheduler.ReduceLROnPlateau) for one in made):
                raise ValueError(f"{name} must step by epochs, got ReduceLROnPlateau, which waits for a metric")
            schedules += made
        return of_classifier + of_copies, schedules


def _seed() -> int:
    """What ``seed_everything`` was called with."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
