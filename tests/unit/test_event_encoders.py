"""Encoders of event sequences against loops, and the rules of padding, windows, chunks and memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.networks import EventEmbedding, RecurrentEncoder, StateSpaceEncoder, TransformerEncoder
from lightning_modules.networks import event_encoders as encoders
from lightning_modules.networks.event_encoders import MICROSECONDS_PER_DAY, encode_table

VOCABULARIES = [9, 5]
ENCODERS = {
    "gru": (RecurrentEncoder, {"cell": "gru", "d_model": 6}),
    "lstm": (RecurrentEncoder, {"cell": "lstm", "d_model": 6}),
    "transformer": (TransformerEncoder, {"d_model": 8, "max_length": 20}),
    "state_space": (StateSpaceEncoder, {"d_model": 8, "max_length": 20, "state_size": 4}),
}
WINDOWED = ("transformer", "state_space")
# float32 rounding of states of order 1 through products of another shape
ROUNDING = {"rtol": 0, "atol": 1e-5}


def build(name, *, time_gaps=True, **more):
    """A small encoder in evaluation mode whose normalisation and start are not the ones of construction."""
    torch.manual_seed(3)
    kind, sizes = ENCODERS[name]
    encoder = kind(vocabulary_sizes=VOCABULARIES, n_numeric=2, d_embedding=4, time_gaps=time_gaps, **sizes | more)
    with torch.no_grad():
        encoder.start.normal_()
        encoder.embedding.norm.running_mean.normal_()
        encoder.embedding.norm.running_var.uniform_(0.5, 2.0)
    return encoder.eval()


def events_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    times = [torch.randint(10**12, (length,), generator=generator).sort().values for length in lengths]
    return {
        "categorical": torch.stack([torch.randint(1, size, (n,), generator=generator) for size in VOCABULARIES], 1),
        "numeric": torch.randn(n, 2, generator=generator),
        "times": torch.cat(times) if times else torch.zeros(0, dtype=torch.int64),
        "offsets": torch.tensor([0, *np.cumsum(lengths)]),
    }


def padded(events, users, n_steps, fill=0):
    """One row a user, the padding filled with zeros or with what must not be read."""
    sequences = [slice(*events["offsets"][user : user + 2].tolist()) for user in users]
    mask = torch.zeros(len(users), n_steps, dtype=torch.bool)
    batch = {
        "categorical": torch.full((len(users), n_steps, len(VOCABULARIES)), 10**6 * fill),
        "numeric": torch.full((len(users), n_steps, 2), torch.nan if fill else 0.0),
        "times": torch.full((len(users), n_steps), -(10**15) * fill),
        "mask": mask,
    }
    for row, rows in enumerate(sequences):
        length = rows.stop - rows.start
        mask[row, :length] = True
        for name in ("categorical", "numeric", "times"):
            batch[name][row, :length] = events[name][rows]
    return batch


def states_of_each_user(encoder, events):
    """Every user encoded alone, whole."""
    users = [
        user for user in range(len(events["offsets"]) - 1) if events["offsets"][user] < events["offsets"][user + 1]
    ]
    with torch.no_grad():
        return torch.cat(
            [
                encoder.encode_steps(
                    padded(events, [user], int(events["offsets"][user + 1] - events["offsets"][user]))
                )[0]
                for user in users
            ]
        )


@pytest.mark.parametrize("training", [True, False])
def test_embedding_is_tables_and_normalised_numbers_side_by_side(training):
    torch.manual_seed(0)
    embedding = EventEmbedding(VOCABULARIES, 2, d_embedding=[4, 3], noise=0.0, time_gaps=True).double().train(training)
    events = events_of([5, 2, 3])
    batch = padded(events, [0, 1, 2], 6, fill=1)
    found = embedding(batch)
    assert found.shape == (3, 6, embedding.d_out)
    assert embedding.d_out == 4 + 3 + 3
    rows = []
    for user in range(3):
        first, stop = events["offsets"][user : user + 2].tolist()
        for row in range(first, stop):
            days = 0.0 if row == first else int(events["times"][row] - events["times"][row - 1]) / MICROSECONDS_PER_DAY
            rows.append([*events["numeric"][row].tolist(), np.log(1 + days)])
    numbers = np.array(rows)
    mean, variance = (numbers.mean(0), numbers.var(0)) if training else (0.0, 1.0)
    numbers = (numbers - mean) / np.sqrt(variance + embedding.norm.eps)
    tables = [
        table.weight.detach()[events["categorical"][:, feature]] for feature, table in enumerate(embedding.tables)
    ]
    if not training:  # no step of training was unknown
        tables = [table * (events["categorical"][:, [feature]] != 1) for feature, table in enumerate(tables)]
    expected = torch.cat([*tables, torch.from_numpy(numbers)], 1)
    # float64 sums of ten numbers of order 1
    torch.testing.assert_close(found.detach()[batch["mask"]], expected, rtol=0, atol=1e-12)
    assert not found[~batch["mask"]].any()


def test_an_unknown_category_is_zero_unless_training_met_one():
    torch.manual_seed(0)
    embedding = EventEmbedding([5, 4], 0, d_embedding=3, noise=0.0)
    unknown = {
        "categorical": torch.tensor([[[1, 1], [2, 3]]]),
        "numeric": torch.zeros(1, 2, 0),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    first = unknown | {"categorical": torch.tensor([[[1, 2], [2, 3]]])}
    embedding(unknown | {"categorical": torch.tensor([[[3, 2], [2, 3]]])})
    assert not embedding.eval()(unknown)[0, 0].any()
    drawn = [table.weight[1].clone() for table in embedding.tables]
    embedding.train()(first)  # unknown in the first column alone
    found = embedding.eval()(unknown)[0]
    assert torch.equal(found[0, :3], drawn[0])
    assert not found[0, 3:].any()
    assert torch.equal(found[1], torch.cat([embedding.tables[0].weight[2], embedding.tables[1].weight[3]]))
    embedding.eval()(unknown)
    assert embedding.met_unknown.tolist() == [True, False]
    padded_away = first | {"mask": torch.tensor([[True, False]]), "categorical": torch.tensor([[[2, 2], [1, 1]]])}
    embedding.train()(padded_away)
    assert embedding.met_unknown.tolist() == [True, False]


def test_weights_that_do_not_tell_whether_unknown_was_met_are_taken_as_they_are():
    torch.manual_seed(0)
    encoder = RecurrentEncoder(vocabulary_sizes=VOCABULARIES, n_numeric=2, d_model=6)
    weights = encoder.state_dict()
    twin = RecurrentEncoder(vocabulary_sizes=VOCABULARIES, n_numeric=2, d_model=6)
    twin.load_state_dict(weights)
    assert not twin.embedding.met_unknown.any()
    old = {name: value for name, value in weights.items() if not name.endswith("met_unknown")}
    assert len(old) == len(weights) - 1
    twin.load_state_dict(old)
    assert twin.embedding.met_unknown.all()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in old.items())


def test_noise_is_one_vector_a_batch_and_only_in_training():
    torch.manual_seed(0)
    embedding = EventEmbedding([9], 0, d_embedding=64, noise=0.1)
    batch = padded(events_of([4, 2]), [0, 1], 4)
    batch = batch | {"categorical": batch["categorical"][..., :1], "numeric": batch["numeric"][..., :0]}
    noisy = embedding.train()(batch)[batch["mask"]]
    exact = embedding.eval()(batch)[batch["mask"]]
    noise = (noisy - exact).detach()
    # float32 sums of numbers of order 1
    torch.testing.assert_close(noise, noise[:1].expand_as(noise), rtol=0, atol=1e-6)
    # the sample deviation of 64 normal draws has a relative standard error of 9 %: five of them
    assert 0.055 < float(noise[0].std()) < 0.145
    assert torch.equal(embedding(batch)[batch["mask"]], exact)
    assert not torch.equal(embedding.train()(batch)[batch["mask"]], noisy), "drawn anew"


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_states_are_those_of_the_equations(cell):
    encoder = build(cell).double()
    batch = padded(events_of([4]), [0], 4)
    vectors = encoder.embedding(batch)[0].detach().numpy()
    weights = {name: value.detach().numpy() for name, value in encoder.recurrent.named_parameters()}

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    state, memory, expected = np.tanh(encoder.start.detach().numpy()), np.zeros(6), []
    for x in vectors:
        from_input = weights["weight_ih_l0"] @ x + weights["bias_ih_l0"]
        from_state = weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]
        if cell == "gru":
            reset, update = (sigmoid(from_input[at : at + 6] + from_state[at : at + 6]) for at in (0, 6))
            state = (1 - update) * np.tanh(from_input[12:] + reset * from_state[12:]) + update * state
        else:
            gates = from_input + from_state
            memory = sigmoid(gates[6:12]) * memory + sigmoid(gates[:6]) * np.tanh(gates[12:18])
            state = sigmoid(gates[18:]) * np.tanh(memory)
        expected.append(state)
    found = encoder.encode_steps(batch)[0].detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)  # float64, four steps of sums of 17 numbers


def test_state_space_block_is_the_sum_over_the_past():
    block = build("state_space").double().blocks[0]
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    u, kernel = block.norm(x), block.kernel()
    y = torch.stack(
        [
            sum(kernel[:, step - past] * u[:, past] for past in range(step + 1)) + block.skip * u[:, step]
            for step in range(7)
        ],
        1,
    )
    gate = block.gate(torch.nn.functional.gelu(y))
    expected = x + gate[..., :8] * torch.sigmoid(gate[..., 8:])
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)  # float64 sums of 7 numbers of order 1


@pytest.mark.parametrize("name", ENCODERS)
def test_steps_last_and_prefixes_agree_whatever_the_padding(name):
    encoder = build(name)
    events = events_of([11, 1, 6])
    clean = padded(events, [0, 1, 2], 11)
    steps = encoder.encode_steps(clean)
    assert steps.shape == (3, 11, encoder.d_model)
    assert not steps[~clean["mask"]].any()
    assert steps[0].std(0).min() > 1e-3, "states must depend on the events, far above rounding"
    torch.testing.assert_close(encoder.encode_last(clean), steps[[0, 1, 2], [10, 0, 5]], **ROUNDING)
    torch.testing.assert_close(encoder.encode_steps(padded(events, [0, 1, 2], 15, fill=1))[:, :11], steps, **ROUNDING)
    for row, length in ((0, 3), (2, 4)):
        prefix = {key: value[row : row + 1, :length] for key, value in clean.items()}
        torch.testing.assert_close(encoder.encode_last(prefix)[0], steps[row, length - 1], **ROUNDING)


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_reaches_neither_gradients_nor_statistics(name):
    gradients = []
    for fill in (0, 1):
        encoder = build(name, noise=0.0, **({"dropout": 0.0} if name in WINDOWED else {})).train()
        last = encoder.encode_last(padded(events_of([7, 3]), [0, 1], 9, fill))
        (last * torch.linspace(-1, 1, encoder.d_model)).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
        assert encoder.start.grad.abs().max() > 1e-6, "the start is learned"
        gradients.append([p.grad for p in encoder.parameters()] + list(encoder.embedding.norm.buffers()))
    for clean, poisoned in zip(*gradients, strict=True):
        assert torch.equal(clean, poisoned)


def after_a_step(name, batch, n_rows):
    """Gradients of the states of the first rows, and statistics, after a step in training without noise."""
    encoder = build(name, noise=0.0, **({"dropout": 0.0} if name in WINDOWED else {})).train()
    encoder.encode_last(batch)[:n_rows].square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in encoder.parameters()], list(encoder.buffers())


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_without_events_reach_neither_gradients_nor_statistics(name):
    batch = padded(events_of([6, 2, 4]), range(3), 6)
    empty = {key: torch.zeros_like(value[:2]) for key, value in batch.items()}
    filled = {key: torch.cat([value, empty[key]]) for key, value in batch.items()}
    # float32 sums over a batch of another shape
    torch.testing.assert_close(after_a_step(name, filled, 3), after_a_step(name, batch, 3), rtol=1e-5, atol=1e-5)
    gradients, buffers = after_a_step(name, empty, 2)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(torch.equal(*pair) for pair in zip(buffers, build(name).buffers(), strict=True))


@pytest.mark.parametrize("name", ENCODERS)
def test_later_events_leave_states_bit_for_bit(name):
    encoder = build(name)
    batch = padded(events_of([12, 12]), [0, 1], 12)
    before = encoder.encode_steps(batch)
    perturbed = {key: value.clone() for key, value in batch.items()}
    perturbed["numeric"][:, 5:] += 100.0
    perturbed["categorical"][:, 5:] = 1
    perturbed["times"][:, 5:] += 10**12
    after = encoder.encode_steps(perturbed)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 5], before[:, 5])
    perturbed["numeric"][0, 5:] = torch.nan
    after = encoder.encode_steps(perturbed)
    assert torch.equal(after[:, :5], before[:, :5])
    assert after[0, 5:].isnan().all(), "a lost number is not hidden"
    assert after[1].isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
def test_initial_state_is_what_the_first_event_meets(name):
    encoder = build(name)
    initial = encoder.initial_state()
    assert initial.shape == (encoder.d_model,)
    batch = padded(events_of([3]), [0], 3)
    states = encoder.encode_steps(batch)
    with torch.no_grad():
        encoder.start.mul_(-1)
    assert not torch.allclose(encoder.initial_state(), initial, atol=1e-3)
    assert not torch.allclose(encoder.encode_steps(batch), states, atol=1e-3)
    if name not in WINDOWED:
        assert torch.equal(encoder.initial_state(), encoder.start.tanh())


@pytest.mark.parametrize(
    ("sizes", "n_weights"),
    [
        ({"cell": "lstm", "d_model": 1024, "d_embedding": 24}, 345 * 24 + 2 + 1024 + 4 * 1024 * (25 + 1024 + 2)),
        ({"cell": "gru", "d_model": 800, "d_embedding": 16}, 345 * 16 + 2 + 800 + 3 * 800 * (17 + 800 + 2)),
    ],
)
def test_published_sizes(sizes, n_weights):
    with torch.device("meta"):
        encoder = RecurrentEncoder(vocabulary_sizes=[345], n_numeric=1, **sizes)
    assert sum(p.numel() for p in encoder.parameters()) == n_weights
    assert f"{n_weights:,} weights" in RecurrentEncoder.__doc__


@pytest.mark.parametrize("name", ["gru", "lstm"])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=7),
    max_tokens=st.integers(1, 60),
    chunk_steps=st.integers(1, 9),
)
def test_chunks_that_hand_on_memory_equal_whole_sequences(name, lengths, max_tokens, chunk_steps):
    encoder, events = build(name), events_of([*lengths, 2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "CHUNK_STEPS", chunk_steps)
        found = encode_table(encoder, events, max_tokens=max_tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, states_of_each_user(encoder, events), **ROUNDING)


@pytest.mark.parametrize(("name", "settings"), [("gru", {}), ("transformer", {"max_length": 4}), ("lstm", {})])
@pytest.mark.parametrize("window", [None, 3])
def test_parts_add_up_to_the_whole_table_bit_for_bit(name, settings, window):
    encoder, events = build(name, **settings), events_of([17, 0, 4, 5, 1, 9, 2])
    whole = encode_table(encoder, events, max_tokens=9, window=window)
    parts = [encode_table(encoder, events, max_tokens=9, window=window, part=(i, 3)) for i in range(3)]
    assert torch.equal(sum(parts), whole)
    filled = torch.stack([(part != 0).any(1) for part in parts])
    assert (filled.sum(0) == 1).all(), "a row in two parts or none"
    assert filled.any(1).all(), "a part without rows"


def segment_of(row, first, longest):
    """First row that the state of ``row`` is read from, by walking the segments of a history."""
    begin, end = first, first + longest
    while row >= end:
        begin = end - longest // 2
        end = begin + longest
    return begin


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("longest", [1, 4, 5])
def test_windowed_encoders_read_overlapping_segments(name, longest):
    encoder, events = build(name, max_length=longest), events_of([17, 0, 4, 5, 1])
    found = encode_table(encoder, events, max_tokens=23)
    for user in range(5):
        first, stop = events["offsets"][user : user + 2].tolist()
        for row in range(first, stop):
            begin = segment_of(row, first, longest)
            assert min(row - first, longest // 2) < row - begin + 1 <= longest
            piece = {key: events[key][None, begin : row + 1] for key in ("categorical", "numeric", "times")}
            piece["mask"] = torch.ones(1, row + 1 - begin, dtype=torch.bool)
            torch.testing.assert_close(found[row], encoder.encode_last(piece)[0], **ROUNDING)


@pytest.mark.parametrize("name", ENCODERS)
def test_window_encodes_every_state_anew(name):
    encoder, events = build(name), events_of([9, 0, 2])
    found = encode_table(encoder, events, max_tokens=11, window=3)
    for user in range(3):
        first, stop = events["offsets"][user : user + 2].tolist()
        for row in range(first, stop):
            begin = max(first, row - 2)
            piece = {key: events[key][None, begin : row + 1] for key in ("categorical", "numeric", "times")}
            piece["mask"] = torch.ones(1, row + 1 - begin, dtype=torch.bool)
            torch.testing.assert_close(found[row], encoder.encode_last(piece)[0], **ROUNDING)
    assert not torch.allclose(found, encode_table(encoder, events), atol=1e-3)


def test_table_leaves_the_encoder_as_it_was():
    encoder, events = build("gru", noise=0.5).train(), events_of([5, 3])
    encoder.embedding.norm.eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = encode_table(encoder, events)
    assert not found.requires_grad
    assert torch.equal(found, encode_table(encoder, events))
    assert encoder.training
    assert encoder.recurrent.training
    assert not encoder.embedding.norm.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with pytest.raises(ValueError, match="offsets must end at the 8 events, got 9"):
        encode_table(encoder, events | {"offsets": torch.tensor([0, 5, 9])})
    assert encoder.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary_sizes": [1], "n_numeric": 0}, r"vocabulary_sizes must be at least 2 .*, got \[1\]"),
        ({"vocabulary_sizes": [], "n_numeric": 0}, "events need a categorical or numeric feature"),
        ({"vocabulary_sizes": [5], "n_numeric": 1, "d_embedding": [4, 4]}, r"d_embedding must be .* got \[4, 4\]"),
        ({"vocabulary_sizes": [5], "n_numeric": 1, "d_embedding": 0}, "d_embedding must be .* got 0"),
        ({"vocabulary_sizes": [5], "n_numeric": 1, "noise": -1.0}, "noise must be at least 0 and finite, got -1.0"),
        ({"vocabulary_sizes": [5], "n_numeric": 1, "d_model": 0}, "d_model must be at least 1, got 0"),
        ({"vocabulary_sizes": [5], "n_numeric": 1, "cell": "rnn"}, "cell must be 'gru' or 'lstm', got 'rnn'"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecurrentEncoder(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("transformer", {"max_length": 0}, "max_length must be at least 1, got 0"),
        ("transformer", {"n_blocks": 0}, "n_blocks must be at least 1, got 0"),
        ("transformer", {"n_heads": 3}, "n_heads must be a positive divisor"),
        ("state_space", {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ("state_space", {"state_size": 3}, "state_size must be even and at least 2, got 3"),
    ],
)
def test_windowed_sizes_out_of_range_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(name, **arguments)


def test_events_that_do_not_fit_are_refused():
    encoder = build("transformer")
    batch = padded(events_of([4]), [0], 4)
    with pytest.raises(ValueError, match="2 categorical and 2 numeric features, got 2 and 1"):
        encoder.encode_steps(batch | {"numeric": batch["numeric"][..., :1]})
    for wrong in (5, -1):
        categorical = batch["categorical"].clone()
        categorical[0, 2, 1] = wrong
        with pytest.raises(ValueError, match=rf"ids of categorical feature 1 must be in 0\.\.4, got {wrong}"):
            encoder.encode_steps(batch | {"categorical": categorical})
    with pytest.raises(ValueError, match="at most max_length=20 events, got 21"):
        encoder.encode_last(padded(events_of([21]), [0], 21))
    for window in (0, 21):
        with pytest.raises(ValueError, match=f"at least 1 and at most the encoder's max_length=20, got {window}"):
            encode_table(encoder, events_of([3]), window=window)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        encode_table(build("gru"), events_of([3]), window=0)
