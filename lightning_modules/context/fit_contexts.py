"""The contexts that branches train with: encoded when a policy says so, seen to drift, kept in the checkpoint.

U users, E events, d width. Source: spec of arXiv 2502.10205, sections 6.1 to 6.3.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_modules.collectives import n_processes, rank, same_everywhere, sum_in_place
from lightning_modules.context.as_of import sample_context_users
from lightning_modules.context.bank import ContextBank
from lightning_modules.context.enriched import EnrichedEncoder
from lightning_modules.context.fixed_sequences import gathered
from lightning_modules.context.refresh import Ema, Live, Refresh, drift
from lightning_modules.context.visible import FOREVER, Events
from lightning_modules.networks import EventEncoder, encode_table

SHARED = "shared"
"""Name of the bank of a frozen encoder, which all branches read."""

DRIFT_USERS = 64
"""Context users whose states are encoded anew to see how far those of a bank are behind."""


class FitContexts:
    """One bank for all branches of a frozen encoder, one for each branch whose encoder is tuned.

    Of several processes each encodes a part of the events by the same weights, and all read the whole.

    Args:
        model: Whose branches are trained.
        policy: When a bank is encoded anew; each bank follows a copy of it.

    Attributes:
        banks: By branch, or ``shared``; empty until training of aggregators begins.
        refreshes: By the same names.
        steps: Batches that aggregators were trained on. The steps of optimisers would count each branch.

    Raises:
        ValueError: If live states are asked of an encoder that does not read whole histories.
    """

    def __init__(self, model: EnrichedEncoder, policy: Refresh) -> None:
        if isinstance(policy, Live) and (model.encoder.max_length or model.rules.window):
            raise ValueError("Live encodes whole histories, not with an encoder's max_length or context.window")
        self._model = model
        self.banks: dict[str, ContextBank] = {}
        self.refreshes = {name: deepcopy(policy) for name in (model.aggregators if model.tune else [SHARED])}
        self.steps = 0
        self._events: Events = {}
        self._context_users = torch.zeros(0, dtype=torch.int64)
        self._stop = FOREVER

    def read(self, events: Events, context_users: Tensor, stop: int, device: torch.device) -> None:
        """Take the events that banks are built from.

        Args:
            events: Flat.
            context_users: ``(n,) int64``.
            stop: Microseconds; events at or after it are in no bank.
            device: Of the model, to which what came from a checkpoint is moved.

        Raises:
            ValueError: If the rules exclude groups and there are none.
        """
        if self._model.rules.exclude_group and "groups" not in events:
            raise ValueError("context.exclude_group needs events with groups (data.init_args.group_column), got none")
        self._events, self._context_users, self._stop = events, context_users, stop
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Move banks and momentum encoders to the model, which does not own them."""
        for bank in self.banks.values():
            bank.to(device)
        for refresh in self.refreshes.values():
            if isinstance(refresh, Ema) and refresh.momentum_encoder is not None:
                refresh.momentum_encoder.to(device)

    def bank(self, name: str) -> ContextBank | None:
        """The context a branch is trained with; None for the branch that has none."""
        return self.banks.get(name if self._model.tune else SHARED)

    def bank_encoder(self, name: str) -> EventEncoder:
        """What encodes the context that a branch of the fitted model is asked with."""
        refresh = self.refreshes[name if self._model.tune else SHARED]
        found: Any = refresh.for_test(self._model.encoder, self._model.encoder_of(name))
        return found

    def encode_due(self, epoch: int) -> None:
        """Encode anew, before a step, the banks whose policy asks for it."""
        for name, refresh in self.refreshes.items():
            if refresh.due(self.steps, epoch):
                source: Any = refresh.source(self._model.encoder_of(name))
                same_everywhere(source)  # statistics of its norms are those of each process' own batches
                part = rank(), n_processes()
                states = encode_table(source, self._events, window=self._model.rules.window, part=part)
                sum_in_place(states, next(source.parameters()).device)
                self.banks[name] = self._model.bank(states, self._events, self._context_users, self._stop)
                refresh.done(self.steps, epoch)

    def follow(self, name: str) -> None:
        """Tell a branch's policy that the branch took a step."""
        if name in self.refreshes:
            self.refreshes[name].follow(self._model.encoder_of(name))

    def live_states(self, name: str) -> Tensor | None:
        """``(E_C, d)`` states of a bank, those of some users encoded now, with gradient; None without such a policy."""
        refresh, bank = self.refreshes.get(name), self.bank(name)
        if not isinstance(refresh, Live) or bank is None or not torch.is_grad_enabled():
            return None
        users = _with_states(bank)
        if not len(users):
            return None
        batch, place, rows = self._histories(bank, refresh.users(users, self.steps))
        steps = self._model.encoder_of(name).encode_steps(batch)
        return bank.states.index_copy(0, rows, steps[batch["mask"]][place].to(bank.states))

    def ages(self) -> dict[str, float]:
        """Batches since each bank was encoded."""
        return {name: float(refresh.age_steps(self.steps)) for name, refresh in self.refreshes.items()}

    def drifts(self) -> dict[str, float]:
        """1 - cosine of the states of each bank and of those its branch's encoder gives now, over some users."""
        found = {}
        for name, bank in self.banks.items():
            users = _with_states(bank)
            if not len(users):
                found[name] = 0.0
                continue
            users = sample_context_users(users, DRIFT_USERS, 0)
            batch, place, rows = self._histories(bank, users)
            kept = batch["mask"]
            flat = {key: batch[key][kept] for key in ("categorical", "numeric", "times")}
            flat["offsets"] = torch.cat([kept.new_zeros(1).long(), kept.sum(1).cumsum(0)])
            fresh = encode_table(self._model.encoder_of(name), flat, window=self._model.rules.window)
            found[name] = drift(bank.states[rows], fresh[place])
        return found

    def _histories(self, bank: ContextBank, users: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Events of context users with states up to their last one in a bank: what lies behind is not in training.

        Returns:
            Them as sequences, and for each row of the bank, the third, its place among the valid steps, the second.
        """
        ranks = torch.searchsorted(bank.context_users, users)
        rows = bank.rows_of(users)
        users = users.cpu()
        starts = self._events["offsets"][users]
        stops = bank.event_rows[bank.offsets[ranks + 1] - 1].to(starts.device) + 1
        batch = {
            key: value.to(rows.device) for key, value in gathered(self._events, users, starts, stops - starts).items()
        }
        steps = torch.arange(batch["mask"].shape[1], device=rows.device)
        event_rows = (batch["starts"].unsqueeze(1) + steps)[batch["mask"]]
        # both rise, since users are in order
        return batch, torch.searchsorted(event_rows, bank.event_rows[rows]), rows

    def state_dict(self) -> dict[str, Any]:
        """Banks, policies and momentum encoders: tensors and plain values."""
        momentum = {
            name: refresh.momentum_encoder.state_dict()
            for name, refresh in self.refreshes.items()
            if isinstance(refresh, Ema) and refresh.momentum_encoder is not None
        }
        return {
            "banks": {name: bank.state_dict() for name, bank in self.banks.items()},
            "refreshes": {name: refresh.state_dict() for name, refresh in self.refreshes.items()},
            "momentum_encoders": momentum,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint stopped.

        Raises:
            ValueError: If it is of other branches.
        """
        if set(state["refreshes"]) != set(self.refreshes):
            raise ValueError(
                f"checkpoint holds the contexts of {sorted(state['refreshes'])}, the config here names "
                f"{sorted(self.refreshes)}"
            )
        self.banks = {name: ContextBank.from_state(bank) for name, bank in state["banks"].items()}
        for name, refresh in state["refreshes"].items():
            self.refreshes[name].load_state_dict(refresh)
        for name, weights in state["momentum_encoders"].items():
            copy = self.refreshes[name].source(self._model.encoder_of(name))
            copy.load_state_dict(weights)
        self.steps = state["steps"]


def _with_states(bank: ContextBank) -> Tensor:
    """Context users with rows in a bank: of those drawn some come later, and a draw among all would depend on them."""
    return bank.context_users[bank.offsets.diff() > 0]
