"""The audit of somebody else's embeddings: what a table alone can show, and what truncated events prove."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import rankdata

from lightning_modules.context.audit_association import explained
from lightning_modules.context.audit_findings import exit_code
from lightning_modules.context.audit_outcomes import (
    EmbeddingTable,
    EventTable,
    future_outcomes,
    moment_outcomes,
    past_features,
)
from lightning_modules.context.audit_table import audit_table
from lightning_modules.context.audit_truncated import compare_truncated

DAY = 86_400_000_000
N_USERS = 60
NAMES = [f"u{user:02d}" for user in range(N_USERS)]


def make_events(seed=0):
    """Days of events, many shared between users; an amount that remembers itself."""
    random = np.random.default_rng(seed)
    users, times, amounts = [], [], []
    for user in range(N_USERS):
        n_events = random.integers(15, 40)
        days = np.sort(random.integers(0, 200, n_events))
        amount = np.zeros(n_events)
        for row in range(1, n_events):
            amount[row] = 0.5 * amount[row - 1] + random.normal()
        users += [user] * n_events
        times += (days * DAY).tolist()
        amounts += amount.tolist()
    return EventTable(np.array(users), np.array(times), {"amount": np.array(amounts)})


def make_queries(n_rows=1200, seed=1):
    random = np.random.default_rng(seed)
    return random.integers(0, N_USERS, n_rows), random.integers(20, 195, n_rows) * DAY


def embed(events, users, times, extra=None, seed=2):
    """Sums of the own past, one query at a time, five columns of noise, and perhaps a column that must not be there."""
    random = np.random.default_rng(seed)
    vectors = []
    for user, time in zip(users, times, strict=True):
        past = events.values["amount"][(events.users == user) & (events.times < time)]
        vectors.append([len(past), past.sum(), past[-1] if len(past) else 0.0])
    vectors = np.concatenate([np.array(vectors), random.normal(size=(len(users), 5))], axis=1)
    if extra is not None:
        vectors = np.column_stack([vectors, extra])
    return EmbeddingTable(users, times, vectors, NAMES)


def next_amount(events, users, times):
    found = []
    for user, time in zip(users, times, strict=True):
        later = events.values["amount"][(events.users == user) & (events.times >= time)]
        found.append(later[0] if len(later) else 0.0)
    return np.array(found)


def amounts_of_others_now(events, users, times):
    return np.array(
        [
            events.values["amount"][(events.users != user) & (events.times == time)].sum()
            for user, time in zip(users, times, strict=True)
        ]
    )


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


def before(events, cut):
    kept = events.times < cut
    return EventTable(events.users[kept], events.times[kept], {"amount": events.values["amount"][kept]})


def test_embeddings_of_the_past_are_no_leak():
    events, (users, times) = make_events(), make_queries()
    findings = audit_table(embed(events, users, times), events)
    found = statuses(findings)
    assert exit_code(findings) == 0
    assert found["truncated events"] == "not checked"
    assert "--write-truncated" in findings[0].words
    assert found["same moment"] == "clean"


def test_noise_tells_nothing():
    events, (users, times) = make_events(), make_queries()
    table = EmbeddingTable(users, times, np.random.default_rng(5).normal(size=(len(users), 6)), NAMES)
    found = statuses(audit_table(table, events))
    assert (found["own future"], found["same moment"]) == ("clean", "clean")


@pytest.mark.parametrize(
    ("extra", "leaks", "outcome"),
    [
        (next_amount, ["own future", "own event at t"], "amount of the own event at or after t"),
        (amounts_of_others_now, ["same moment"], "amount of others at the moment"),
    ],
)
def test_the_future_in_an_embedding_is_found(extra, leaks, outcome):
    events, (users, times) = make_events(), make_queries()
    findings = audit_table(embed(events, users, times, extra(events, users, times)), events)
    found = [finding for finding in findings if finding.status == "leak"]
    assert [finding.name for finding in found] == leaks
    finding = found[0]
    assert finding.example.startswith(outcome)
    assert finding.worst > 0.5
    assert exit_code(findings) == 1


def test_truncated_events_decide():
    events, (users, times) = make_events(), make_queries()
    cut = 120 * DAY
    kept = before(events, cut)
    whole, part = embed(events, users, times), embed(kept, users, times)
    assert statuses(audit_table(whole, events, truncated=part, cut=cut))["truncated events"] == "clean"

    leaky = [embed(some, users, times, next_amount(some, users, times)) for some in (events, kept)]
    findings = audit_table(leaky[0], events, truncated=leaky[1], cut=cut)
    assert findings[0].status == "leak"
    assert "with all events" in findings[0].example
    # Only queries whose next event lies behind the cut can differ: within the longest gap of a user.
    asked = times <= cut
    differ = (np.abs(leaky[0].vectors - leaky[1].vectors) > 1e-5).any(1)
    assert findings[0].words.startswith(f"{(differ & asked).sum()} of {asked.sum()} embeddings until the cut")


def test_a_clean_exact_check_overrules_the_statistical_one():
    """Here the next amount is known from the past: a nearly deterministic process."""
    events, (users, times) = make_events(), make_queries()
    # Truncated events decide only where no own event stands at the very moment, or in the tick that it lies in.
    times = times + DAY // 2
    events.times[-1] += 1
    known = events.values["amount"].copy()
    last = np.zeros(N_USERS)
    for row, user in enumerate(events.users):
        last[user] = (1.7 * last[user] + user / N_USERS + 0.3) % 1
        known[row] = last[user]
    events = EventTable(events.users, events.times, {"amount": known})

    def forecast(some):
        found = []
        for user, time in zip(users, times, strict=True):
            past = some.values["amount"][(some.users == user) & (some.times < time)]
            found.append((1.7 * (past[-1] if len(past) else 0.0) + user / N_USERS + 0.3) % 1)
        return EmbeddingTable(users, times, np.array(found)[:, None], NAMES)

    cut = 150 * DAY
    table, truncated = forecast(events), forecast(before(events, cut))
    assert statuses(audit_table(table, events))["own future"] == "leak"
    findings = audit_table(table, events, truncated=truncated, cut=cut)
    assert statuses(findings)["own future"] == "information"
    assert exit_code(findings) == 0
    # A cut behind nearly all events takes no row's next event away: it proves nothing.
    late = audit_table(table, events, truncated=forecast(before(events, 199 * DAY)), cut=199 * DAY)
    assert statuses(late) == statuses(findings) | {"own future": "leak"}


def test_a_query_at_the_cut_is_compared_and_rows_are_matched_by_name():
    whole = EmbeddingTable(np.array([0, 1, 1]), np.array([5, 9, 12]), np.array([[1.0], [2.0], [3.0]]), ["a", "b"])
    part = EmbeddingTable(np.array([0, 1]), np.array([9, 5]), np.array([[2.5], [1.0]]), ["b", "a"])
    finding = compare_truncated(whole, part, 9, 0.0)
    assert (finding.status, finding.worst) == ("leak", 0.5)
    assert finding.words.startswith("1 of 2 embeddings")
    assert "user b" in finding.example
    assert compare_truncated(whole, part, 8, 0.0).status == "clean"
    # Of the spread: half the distance of 1.32 and 2.68, the quantiles 0.16 and 0.84 of 1, 2 and 3.
    assert compare_truncated(whole, part, 9, 0.73).status == "leak"
    assert compare_truncated(whole, part, 9, 0.74).status == "clean"
    assert "1 rows until the cut have no counterpart" in compare_truncated(whole, part, 12, 0.74).words
    with pytest.raises(ValueError, match=r"no row until the cut .* is in both tables: 0 and 0 are there"):
        compare_truncated(whole, part, 4, 0.0)
    with pytest.raises(ValueError, match="must be as wide as the others, 1, got 2"):
        compare_truncated(whole, dataclasses.replace(part, vectors=np.ones((2, 2))), 9, 0.0)


def test_features_of_the_past_know_nothing_else():
    events, (users, times) = make_events(), make_queries(200)
    table = EmbeddingTable(users, times, np.zeros((200, 1)), NAMES)
    cut = 100 * DAY
    asked = table.take(times <= cut)
    found = past_features(asked, events, [DAY, 10 * DAY])
    np.testing.assert_array_equal(found, past_features(asked, before(events, cut), [DAY, 10 * DAY]))
    counts = [
        np.log1p(((events.users == user) & (events.times < time) & (events.times >= time - 10 * DAY)).sum())
        for user, time in zip(asked.users, asked.times, strict=True)
    ]
    # logarithms of the same integers
    np.testing.assert_allclose(found[:, 7], counts, rtol=0, atol=1e-12)


def test_outcomes_equal_loops():
    events, (users, times) = make_events(), make_queries(150)
    table = EmbeddingTable(users, times, np.zeros((150, 1)), NAMES)
    own, others = future_outcomes(table, events, [10 * DAY]), moment_outcomes(table, events)
    amount, sums = events.values["amount"], []
    for row, (user, time) in enumerate(zip(users, times, strict=True)):
        mine, now = events.users == user, events.times == time
        within = mine & (events.times >= time) & (events.times <= time + 10 * DAY)
        # logarithms of the same integers
        # What comes within 10 days of a row is not known where the log ends before.
        count = np.log1p(within.sum()) if time + 10 * DAY <= events.times.max() else np.nan
        assert own["own events within 10 days"][row] == pytest.approx(count, abs=1e-12, nan_ok=True)
        assert others["events of others at the moment"][row] == pytest.approx(np.log1p((now & ~mine).sum()), abs=1e-12)
        sums.append(amount[now & ~mine].sum())
        assert np.isnan(own["days to the own event at or after t"][row]) == (not (mine & (events.times >= time)).any())
    # ranks of sums that are the same up to rounding, and tie where users ask at one moment
    np.testing.assert_allclose(others["amount of others at the moment"], rankdata(sums) / 150, rtol=0, atol=1e-12)


def test_dependent_rows_without_association_do_not_stand_out():
    """Both the outcome and the embedding wander slowly along a user's rows: rows are far from independent."""
    z_scores = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        users = np.repeat(np.arange(25), 20)
        walks = random.normal(size=(25, 20, 4)).cumsum(1).reshape(500, 4)
        table = EmbeddingTable(users, np.tile(np.arange(20), 25) * DAY, walks[:, 1:], NAMES)
        z_scores.append(explained(table, np.ones((500, 1)), walks[:, 0], random)[1])
    # Under the null a z-score exceeds 2.5 in about 1 of 160 cases; 3 of 20 has a probability below 1 in 2,000.
    assert sum(z > 2.5 for z in z_scores) <= 2


def test_rows_before_the_first_event_and_repeated_rows():
    events = EventTable(np.array([0, 1]), np.array([10, 12]), {"amount": np.ones(2)})
    alike = EmbeddingTable(np.array([0, 1, 1]), np.array([5, 5, 30]), np.array([[1.0], [1.0], [2.0]]), ["a", "b"])
    found = statuses(audit_table(alike, events))
    assert (found["before the first event"], found["repeated rows"]) == ("clean", "clean")
    assert found["own future"] == "not checked"
    apart = dataclasses.replace(alike, vectors=np.array([[1.0], [3.0], [2.0]]), times=np.array([5, 5, 5]))
    findings = {finding.name: finding for finding in audit_table(apart, events)}
    assert findings["before the first event"].status == "information"
    assert findings["before the first event"].worst == 2.0
    assert "1 rows repeat" in findings["repeated rows"].words
    assert "with other numbers" in findings["repeated rows"].words


def test_wrong_arguments():
    events, (users, times) = make_events(), make_queries(10)
    table = embed(events, users, times)
    with pytest.raises(ValueError, match="cut must be given with a table of truncated events, got None"):
        audit_table(table, events, truncated=table)
    with pytest.raises(ValueError, match="implausible must lie strictly between 0 and 1, got 1"):
        audit_table(table, events, implausible=1)
    with pytest.raises(ValueError, match="ties must be 'strict' or 'inclusive', got 'loose'"):
        audit_table(table, events, ties="loose")
