"""Encoders of event sequences: embedding of mixed events, the encoders' contract, recurrent encoders, whole tables.

B sequences, L steps, F categorical features, M numeric features, E events of a flat table, U users, d width. A batch
is a dict of ``categorical (B, L, F) int64``, ``numeric (B, L, M) float``, ``times (B, L) int64`` microseconds and
``mask (B, L) bool``, true on the first steps of a row, at least one, and false on the padding behind them. Source:
specification of arXiv 2502.10205, section 2.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_modules.networks.series_network import MaskedBatchNorm, last_valid_step, require_at_least_one

MICROSECONDS_PER_DAY = 86_400e6
UNKNOWN = 1
"""Id of a category that training does not have; 0 is padding."""

CHUNK_STEPS = 128
"""Steps of a recurrent encoder between two looks at which users have ended, in :func:`encode_table`."""


class EventEmbedding(nn.Module):
    """Vector of an event: one table for each categorical feature, batch-normalised numeric features, concatenated.

        x = [table_1(c_1) + s eps_1; ...; table_F(c_F) + s eps_F; BN(m_1, ..., m_M)],    eps_f ~ N(0, I), in training

    One eps_f is drawn a forward pass and shared by the whole batch. Statistics of BN are those of unpadded steps;
    padded steps come out as 0, whatever stands there.

    A table in whose column no step of training was unknown never learned what that means: its row there is a draw of
    initialisation, and in evaluation unknown ids are embedded as 0. Weights of checkpoints that do not tell are taken
    as they are.

    Args:
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        d_embedding: Width of every table, or one for each; published 24, for Default 16.
        noise: s; published 3e-4, for Default 3e-3.
        time_gaps: Adds ln(1 + days since the previous event) to the numeric features. The first step has gap 0 unless
            the batch tells ``previous_times (B,) int64``. A departure from the publication, which sees no time.

    Attributes:
        d_out: Sum of the widths, plus M, plus 1 with ``time_gaps``.
        met_unknown: ``(F,) bool`` buffer, whether a forward pass in training met an unknown id.

    Raises:
        ValueError: If a size is out of range or there is no feature.

    Source: specification, section 2.1.
    """

    def __init__(
        self,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        *,
        d_embedding: int | Sequence[int] = 24,
        noise: float = 3e-4,
        time_gaps: bool = False,
    ) -> None:
        widths = [d_embedding] * len(vocabulary_sizes) if isinstance(d_embedding, int) else list(d_embedding)
        if len(widths) != len(vocabulary_sizes) or min(widths, default=1) < 1:
            raise ValueError(
                f"d_embedding must be a width of at least 1, or one for each of {len(vocabulary_sizes)} categorical "
                f"features, got {d_embedding}"
            )
        if min(vocabulary_sizes, default=2) < 2:
            raise ValueError(f"vocabulary_sizes must be at least 2 (padding and unknown), got {list(vocabulary_sizes)}")
        if n_numeric < 0 or not (len(vocabulary_sizes) or n_numeric):
            raise ValueError(
                f"events need a categorical or numeric feature, got vocabulary_sizes={list(vocabulary_sizes)} and "
                f"n_numeric={n_numeric}"
            )
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be at least 0 and finite, got {noise}")
        super().__init__()
        self.vocabulary_sizes = list(vocabulary_sizes)
        self.noise = noise
        self.time_gaps = time_gaps
        self.n_numeric = n_numeric
        self.tables = nn.ModuleList(
            nn.Embedding(n_ids, width, padding_idx=0) for n_ids, width in zip(vocabulary_sizes, widths, strict=True)
        )
        self.met_unknown: Tensor
        self.register_buffer("met_unknown", torch.zeros(len(widths), dtype=torch.bool))
        n_normed = n_numeric + time_gaps
        self.norm = MaskedBatchNorm(n_normed) if n_normed else None
        self.d_out = sum(widths) + n_normed

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Vectors ``(B, L, d_out)`` of the events of a batch.

        Raises:
            ValueError: If features are not those the tables were built for, or an id lies beyond its table.
        """
        padding = ~batch["mask"].unsqueeze(-1)
        categorical = batch["categorical"].masked_fill(padding, 0)
        self._check(categorical, batch["numeric"])
        unknown = categorical == UNKNOWN
        if self.training:
            self.met_unknown |= unknown.flatten(0, 1).any(0)
        parts = []
        for feature, table in enumerate(self.tables):
            embedded = table(categorical[..., feature])
            if not self.training:
                not_learned = unknown[..., feature] & ~self.met_unknown[feature]
                embedded = embedded.masked_fill(not_learned.unsqueeze(-1), 0.0)
            elif self.noise:
                embedded = embedded + self.noise * torch.randn_like(embedded[0, 0])
            parts.append(embedded)
        if self.norm is not None:
            numeric = batch["numeric"].to(self.norm.weight.dtype)
            if self.time_gaps:
                numeric = torch.cat([numeric, self._gaps(batch).to(numeric).unsqueeze(-1)], -1)
            numeric = numeric.masked_fill(padding, 0.0)
            parts.append(self.norm(numeric.transpose(1, 2), batch["mask"]).transpose(1, 2))
        return torch.cat(parts, -1).masked_fill(padding, 0.0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state_dict.setdefault(f"{prefix}met_unknown", torch.ones_like(self.met_unknown))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @staticmethod
    def _gaps(batch: Mapping[str, Tensor]) -> Tensor:
        times = batch["times"].masked_fill(~batch["mask"], 0)
        before = batch.get("previous_times", times[:, 0]).unsqueeze(1)
        gaps = times - torch.cat([before, times[:, :-1]], 1)
        return gaps.masked_fill(~batch["mask"], 0).double().div(MICROSECONDS_PER_DAY).log1p()

    def _check(self, categorical: Tensor, numeric: Tensor) -> None:
        received = categorical.shape[-1], numeric.shape[-1]
        if received != (len(self.tables), self.n_numeric):
            raise ValueError(
                f"events must have {len(self.tables)} categorical and {self.n_numeric} numeric features, got "
                f"{received[0]} and {received[1]}"
            )
        if not len(self.tables):
            return
        least, most = categorical.flatten(0, 1).aminmax(dim=0)
        for feature, (low, high, n_ids) in enumerate(
            zip(least.tolist(), most.tolist(), self.vocabulary_sizes, strict=True)
        ):
            if low < 0 or high >= n_ids:
                raise ValueError(
                    f"ids of categorical feature {feature} must be in 0..{n_ids - 1}, got {low if low < 0 else high}"
                )


class EventEncoder(nn.Module, ABC):
    """States of users after each of their events.

    In evaluation a state reads no later step: not its values, and not whether there is one; in training statistics of
    the batch are shared. What stands in the padding, NaN included, reaches no state, and a NaN in an event reaches no
    earlier one.

    Args:
        embedding: Of the events.
        d_model: d.
        max_length: Longest sequence the network takes; ``None`` for one with unlimited memory.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, embedding: EventEmbedding, *, d_model: int, max_length: int | None = None) -> None:
        require_at_least_one(d_model=d_model, max_length=1 if max_length is None else max_length)
        super().__init__()
        self.embedding = embedding
        self.d_model = d_model
        self.max_length = max_length

    def encode_steps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``(B, L, d)`` states after each event, 0 at padding.

        Raises:
            ValueError: If sequences are longer than ``max_length``, or hold features the encoder was not built for.
        """
        return self.advance(batch, None)[0]

    def encode_last(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``(B, d)`` states after the last valid event of each sequence; raises as :meth:`encode_steps`."""
        steps = self.encode_steps(batch)
        return steps[torch.arange(len(steps), device=steps.device), last_valid_step(batch["mask"])]

    def advance(self, batch: Mapping[str, Tensor], memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """States of sequences that go on from ``memory``, and the memory after their last step.

        Args:
            batch: Sequences.
            memory: ``(n, B, d)`` of an encoder without ``max_length``; ``None`` at the start of a sequence.

        Returns:
            ``(B, L, d)``, 0 at padding, and the memory, which means nothing for rows that end in padding.
        """
        mask = batch["mask"]
        if self.max_length is not None and mask.shape[1] > self.max_length:
            raise ValueError(
                f"{type(self).__name__} takes sequences of at most max_length={self.max_length} events, got "
                f"{mask.shape[1]}"
            )
        states, memory = self.unroll(self.embedding(batch), memory)
        return states.masked_fill(~mask.unsqueeze(-1), 0.0), memory

    @abstractmethod
    def unroll(self, vectors: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """States ``(B, L, d)`` of event vectors ``(B, L, d_in)`` that are 0 at padding, and the memory behind them."""

    @abstractmethod
    def initial_state(self) -> Tensor:
        """``(d,)`` state of a user without events."""


class EncoderFactory(Protocol):
    """Builds an encoder from the facts of a data set; YAML gives it by ``class_path`` with every other argument."""

    def __call__(self, *, vocabulary_sizes: Sequence[int], n_numeric: int) -> EventEncoder:
        """The encoder."""
        ...


class RecurrentEncoder(EventEncoder):
    """One recurrent layer over the events: the encoder of the publication.

        h_l = cell(x_l, h_{l-1}),    h_0 = tanh(w), w learned; the cell state of an LSTM starts at 0

    Published: an LSTM with d = 1024 on Churn, 4,314,202 weights with 345 codes embedded in 24 numbers and one amount;
    a GRU with d = 800 on Default, 1,971,922 weights with 345 codes embedded in 16.

    Args:
        vocabulary_sizes: Ids of each categorical feature, 0 (padding) and 1 (unknown) included.
        n_numeric: M.
        cell: ``"gru"`` or ``"lstm"``.
        d_model: d.
        d_embedding: Width of the tables; this and the next two as in :class:`EventEmbedding`.
        noise: Standard deviation, in training.
        time_gaps: Whether the encoder sees the time since the previous event.

    Raises:
        ValueError: If a size is out of range or the cell unknown.

    Source: specification, section 2.2.
    """

    def __init__(
        self,
        *,
        vocabulary_sizes: Sequence[int],
        n_numeric: int,
        cell: Literal["gru", "lstm"] = "gru",
        d_model: int = 256,
        d_embedding: int | Sequence[int] = 24,
        noise: float = 3e-4,
        time_gaps: bool = False,
    ) -> None:
        if cell not in ("gru", "lstm"):
            raise ValueError(f"cell must be 'gru' or 'lstm', got {cell!r}")
        embedding = EventEmbedding(
            vocabulary_sizes, n_numeric, d_embedding=d_embedding, noise=noise, time_gaps=time_gaps
        )
        super().__init__(embedding, d_model=d_model)
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.recurrent = kind(embedding.d_out, d_model, batch_first=True)
        self.start = nn.Parameter(torch.zeros(d_model))

    def unroll(self, vectors: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """States of vectors, and the hidden state ``(1, B, d)``, of an LSTM hidden and cell state ``(2, B, d)``."""
        is_lstm = isinstance(self.recurrent, nn.LSTM)
        if memory is None:
            hidden = self.start.tanh().expand(1, len(vectors), -1)
            memory = torch.cat([hidden, torch.zeros_like(hidden)]) if is_lstm else hidden
        if is_lstm:
            states, (hidden, cell) = self.recurrent(vectors, (memory[:1].contiguous(), memory[1:].contiguous()))
            return states, torch.cat([hidden, cell])
        return self.recurrent(vectors, memory.contiguous())

    def initial_state(self) -> Tensor:
        """``(d,)``, tanh of the learned start."""
        return self.start.tanh()


@torch.no_grad()
def encode_table(
    encoder: EventEncoder,
    events: Mapping[str, Tensor],
    *,
    max_tokens: int = 65536,
    window: int | None = None,
    part: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Tensor:
    """States after every event of every user, in evaluation mode and without gradient.

    An encoder without ``max_length`` reads each user once, in chunks that hand on its memory. One with
    ``max_length`` = W reads segments that overlap by W // 2 events, so that a state has seen all of its user's events
    where they are at most W, else the last W // 2 + 1 to W. With ``window`` every state is encoded anew from the last
    ``window`` events alone, at ``window`` times the cost.

    Args:
        encoder: Its modules are as they were afterwards, in training or not.
        events: Flat: ``categorical (E, F)``, ``numeric (E, M)``, ``times (E,)`` and ``offsets (U + 1,)``; the events
            of user u are rows ``offsets[u]`` to ``offsets[u + 1]``.
        max_tokens: Most steps of a padded batch.
        window: Events a state may see; ``None`` for all.
        part: ``(i, n)``: of the padded batches only each n-th is encoded, beginning with the i-th; other rows are 0, so
            that the n tables add up to the whole one, bit for bit.
        progress: Whether to show a bar.

    Returns:
        ``(E, d) float32`` on the device of the events, rows in their order.

    Raises:
        ValueError: If offsets do not end at E, or ``window`` is not what the encoder takes.
    """
    offsets, n_events = events["offsets"], len(events["times"])
    if int(offsets[-1]) != n_events:
        raise ValueError(f"offsets must end at the {n_events} events, got {int(offsets[-1])}")
    require_at_least_one(max_tokens=max_tokens)
    if window is not None and not 1 <= window <= (encoder.max_length or window):
        most = "" if encoder.max_length is None else f" and at most the encoder's max_length={encoder.max_length}"
        raise ValueError(f"window must be at least 1{most}, got {window}")
    table = torch.zeros(n_events, encoder.d_model, device=offsets.device)
    were_training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with tqdm(total=n_events, desc="encoding", unit="event", disable=not progress) as bar:
            pieces = (
                _unrolled(encoder, events, max_tokens, part)
                if window is None and encoder.max_length is None
                else _segmented(encoder, events, max_tokens, window, part)
            )
            for rows, states in pieces:
                table[rows] = states.to(table)
                bar.update(len(rows))
    finally:
        for module, was_training in were_training.items():
            module.training = was_training
    return table


def _unrolled(
    encoder: EventEncoder, events: Mapping[str, Tensor], max_tokens: int, part: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and states of users side by side, longest first: those who still have events are always the first ones."""
    lengths, users = events["offsets"].diff().sort(descending=True, stable=True)
    begin, n_users, turns = 0, int((lengths > 0).sum()), _turns(part)
    while begin < n_users:
        n_steps = min(int(lengths[begin]), CHUNK_STEPS, max_tokens)
        block = slice(begin, min(n_users, begin + max_tokens // n_steps))
        first, left = events["offsets"][users[block]], lengths[block]
        begin = block.stop
        if not next(turns):
            continue
        memory = None
        before = first
        while len(left):
            batch, rows = _padded(events, first, left.clamp(max=n_steps), encoder)
            batch["previous_times"] = events["times"][before].to(batch["times"].device)
            states, memory = encoder.advance(batch, memory)
            mask = batch["mask"]
            yield rows[mask.to(rows.device)], states[mask]
            n_active = int((left > n_steps).sum())
            first, left = first[:n_active] + n_steps, left[:n_active] - n_steps
            before = first - 1
            memory = None if memory is None else memory[:, :n_active]


def _segmented(
    encoder: EventEncoder, events: Mapping[str, Tensor], max_tokens: int, window: int | None, part: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and states of segments that are encoded each by itself; of a segment the steps from ``kept`` on count."""
    offsets = events["offsets"]
    lengths = offsets.diff()
    if window is None:
        assert encoder.max_length is not None  # others are unrolled
        longest, hop = encoder.max_length, encoder.max_length - encoder.max_length // 2
        n_segments = torch.where(lengths > 0, 1 + (lengths - longest).clamp(min=0).add(hop - 1) // hop, 0)
        users = torch.arange(len(lengths), device=offsets.device).repeat_interleave(n_segments)
        order = torch.arange(len(users), device=offsets.device) - (n_segments.cumsum(0) - n_segments)[users]
        first = offsets[users] + order * hop
        sizes = (offsets[users + 1] - first).clamp(max=longest)
        kept = torch.where(order > 0, longest - hop, 0)
    else:
        rows = torch.arange(len(events["times"]), device=offsets.device)
        first = torch.maximum(rows - window + 1, offsets[:-1].repeat_interleave(lengths))
        sizes = rows - first + 1
        kept = sizes - 1
    sizes, order = sizes.sort(descending=True, stable=True)
    first, kept = first[order], kept[order]
    begin, turns = 0, _turns(part)
    while begin < len(sizes):
        block = slice(begin, begin + max(1, max_tokens // int(sizes[begin])))
        begin = block.stop
        if not next(turns):
            continue
        batch, rows = _padded(events, first[block], sizes[block], encoder)
        counts = batch["mask"].to(rows.device) & (rows >= (first + kept)[block].unsqueeze(1))
        yield rows[counts], encoder.encode_steps(batch)[counts.to(batch["mask"].device)]


def _turns(part: tuple[int, int]) -> Iterator[bool]:
    """Whether each next block is one of the i-th of n parts."""
    return cycle(number == part[0] for number in range(part[1]))


def _padded(
    events: Mapping[str, Tensor], first: Tensor, lengths: Tensor, encoder: EventEncoder
) -> tuple[dict[str, Tensor], Tensor]:
    """Batch of rows ``first`` to ``first + lengths`` on the encoder's device, and the rows ``(B, L)`` themselves."""
    steps = torch.arange(int(lengths.max()), device=first.device)
    mask = steps < lengths.unsqueeze(1)
    rows = torch.where(mask, first.unsqueeze(1) + steps, 0)
    batch = {name: events[name][rows] for name in ("categorical", "numeric", "times")} | {"mask": mask}
    device = next(encoder.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}, rows
