import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_modules.attacks.selection import (
    Candidates,
    Choice,
    fold_average,
    pareto_area,
    pareto_front,
    select,
)

EXAMPLES = settings(max_examples=50, deadline=None)
# few distinct values, so that ties abound
COARSE = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@st.composite
def candidates(draw):
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    success = draw(arrays(np.float64, shape, elements=st.sampled_from([0.1, 0.5, 0.9, np.nan])))
    success[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = 0.5
    step = draw(arrays(np.float64, shape[0], elements=st.sampled_from([0.005, 0.01, 0.05])))
    alpha = draw(arrays(np.float64, shape[0], elements=st.sampled_from([0.0, 0.1, 1.0])))
    n_steps = np.array(draw(st.permutations(range(shape[1]))), dtype=np.int64)
    radius = draw(st.none() | arrays(np.float64, shape[0], elements=st.sampled_from([0.1, 0.5])))
    return Candidates(success, step, alpha, n_steps, radius)


@EXAMPLES
@given(offered=candidates())
def test_choice_is_the_first_of_all_in_the_order_of_the_rule(offered):
    best = None
    for row in range(len(offered.step)):
        for column in range(len(offered.n_steps)):
            if not np.isnan(offered.success[row, column]):
                radius = 0.0 if offered.radius is None else offered.radius[row]
                place = (offered.step[row], radius, offered.alpha[row], offered.n_steps[column], row)
                key = (-offered.success[row, column], *place)
                best = min(best, (key, (row, column))) if best else (key, (row, column))
    assert select(offered) == best[1]


@EXAMPLES
@given(offered=candidates(), data=st.data())
def test_order_of_configurations_and_columns_does_not_matter(offered, data):
    rows = np.array(data.draw(st.permutations(range(len(offered.step)))))
    columns = np.array(data.draw(st.permutations(range(len(offered.n_steps)))))
    shuffled = Candidates(
        offered.success[np.ix_(rows, columns)],
        offered.step[rows],
        offered.alpha[rows],
        offered.n_steps[columns],
        None if offered.radius is None else offered.radius[rows],
    )

    def facts(of, choice):
        row, column = choice
        radius = None if of.radius is None else of.radius[row]
        return of.success[row, column], of.step[row], radius, of.alpha[row], of.n_steps[column]

    assert facts(offered, select(offered)) == facts(shuffled, select(shuffled))


def test_rounding_of_an_average_is_a_tie():
    success = np.array([[0.1 + 0.2], [0.3]])
    offered = Candidates(success, np.array([0.05, 0.01]), np.zeros(2), np.array([1]))
    assert success[0, 0] > success[1, 0]
    assert select(offered) == Choice(1, 0)


POINTS = st.lists(st.tuples(COARSE, COARSE), max_size=12)


@EXAMPLES
@given(points=POINTS)
def test_front_is_what_nothing_dominates(points):
    eff, conc = np.array(points).reshape(-1, 2).T
    front = pareto_front(eff, conc)
    expected = {
        point for point in points if not any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)
    }
    assert [(eff[i], conc[i]) for i in front] == sorted(expected)
    assert all(i == points.index(points[i]) for i in front)


@EXAMPLES
@given(points=POINTS)
def test_area_is_that_of_the_union_of_boxes(points):
    eff, conc = np.array(points).reshape(-1, 2).T
    # the coordinates are quarters: the union is a number of whole cells of 1/4 by 1/4
    corners = np.arange(1, 5) / 4
    covered = np.zeros((4, 4), bool)
    for a, b in points:
        covered |= (corners[:, None] <= a) & (corners[None, :] <= b)
    assert pareto_area(eff, conc) == covered.sum() / 16


@EXAMPLES
@given(points=POINTS, one=st.tuples(COARSE, COARSE))
def test_another_candidate_never_shrinks_the_area(points, one):
    eff, conc = np.array([*points, one]).T
    assert pareto_area(eff, conc) >= pareto_area(eff[:-1], conc[:-1])
    assert pareto_area(eff, conc) >= one[0] * one[1]


def test_candidates_without_a_value_are_left_out():
    eff, conc = [np.nan, 0.5, 1.0], [1.0, 0.5, np.nan]
    assert pareto_front(eff, conc).tolist() == [1]
    assert pareto_area(eff, conc) == 0.25
    assert pareto_area([], []) == 0


@EXAMPLES
@given(
    values=arrays(np.float64, (3, 2, 4), elements=st.floats(0, 1)),
    sizes=arrays(np.int64, 3, elements=st.integers(1, 50)),
)
def test_fold_average_is_the_mean_over_series(values, sizes):
    series = np.repeat(values, sizes, axis=0)
    # sums of at most 150 numbers below 1 in another order
    np.testing.assert_allclose(fold_average(values, sizes), series.mean(0), rtol=0, atol=1e-13)


def test_a_fold_without_a_value_keeps_a_candidate_from_winning():
    average = fold_average([[[0.9], [0.2]], [[np.nan], [0.4]]], [10, 10])
    assert select(Candidates(average, np.array([1.0, 2.0]), np.zeros(2), np.array([1]))) == (1, 0)


ONE = np.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Candidates(np.ones(3), ONE, ONE, ONE), r"success must be \(P, I\) .* got shape \(3,\)"),
        (lambda: Candidates(np.ones((1, 0)), ONE, ONE, np.ones(0)), "at least one candidate"),
        (
            lambda: Candidates(np.ones((2, 1)), ONE, np.ones(2), ONE),
            r"step must be \(2,\) without NaN, got shape \(1,\)",
        ),
        (lambda: Candidates(np.ones((1, 1)), ONE, ONE * np.nan, ONE), "alpha must be .* without NaN"),
        (lambda: Candidates(np.ones((1, 1)), ONE, ONE, ONE, np.ones(2)), r"radius must be \(1,\) without NaN"),
        (lambda: select(Candidates(np.full((1, 2), np.nan), ONE, ONE, np.arange(2))), "got NaN for all 2"),
        (lambda: fold_average([[1.0]], [0]), "at least 1"),
        (lambda: fold_average([], []), "at least 1"),
        (lambda: pareto_front([1.0], [1.0, 2.0]), "same candidates, got 1 and 2"),
    ],
)
def test_bad_input_ends_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
