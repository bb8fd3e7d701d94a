"""The words of a portfolio report: one table, and sentences that say what the intervals allow to say and no more."""

import math
from typing import Any

from lightning_modules.portfolio.study import VOLATILITY_ONLY

Findings = dict[str, Any]
"""What :func:`lightning_modules.portfolio.findings.findings` returns."""


def _number(value: float | None, form: str = ".2f") -> str:
    return "not defined" if value is None else format(value, form)


def _interval(values: list[float | None], form: str = ".2f") -> str:
    middle, low, high = (_number(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def table(found: Findings) -> list[str]:
    """One row a method, in Markdown."""
    panel, cost, percent = found["panel"], f"{found['cost_bps']:g}", f"{100 * found['level']:g} %"
    first, last = panel["test"]
    lines = [
        f"# Test report: {panel['n_eligible']} stocks, {first} to {last}, mode {found['mode'].replace('_', ' ')}",
        "",
        f"| method | annual return | volatility | Sharpe at {cost} bps [{percent}] | Sharpe at 0 bps | max drawdown "
        f"| turnover a year | model minus this, Sharpe [{percent}] | Ledoit-Wolf p |",
        "|---" * 9 + "|",
    ]
    for name, arm in found["arms"].items():
        gap, net = arm["model_minus_this"], arm["at_cost"]
        cells = [
            name.replace("|", "\\|"),
            _number(net["annual_return"], ".1%"),
            _number(net["volatility"], ".1%"),
            _interval(arm["sharpe"]),
            _number(arm["at_0_bps"]["sharpe"]),
            _number(net["max_drawdown"], ".1%"),
            _number(arm["turnover_per_year"], ".1f"),
            "" if gap is None else _interval(gap["sharpe"], "+.2f"),
            "" if gap is None else _number(gap["ledoit_wolf_p"], ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sentences(found: Findings) -> list[str]:
    """What the numbers allow to say, one paragraph each, with blank lines between."""
    said = [*_hindsight(found), *_verdicts(found), *_by_lot(found), *_only_volatility(found), *_deflated(found)]
    said += [*_universe(found), *_flags(found)]
    seconds = found.get("seconds")
    spent = ""
    if seconds is not None:
        fit = "unknown" if seconds["fit"] is None else f"{seconds['fit']:.0f} s"
        spent = f"Fit {fit}, test {seconds['test']:.0f} s. "
    said.append(
        f"{spent}Seed {found['seed']}. Intervals: stationary bootstrap of days, mean block 10, {found['n_resamples']} "
        f"resamples, the same days for all methods; they hold the clusters fixed. Risk-free {found['risk_free']:.1%} a "
        f"year.{_index(found)}"
    )
    return [line for paragraph in said for line in (paragraph, "")][:-1]


def _index(found: Findings) -> str:
    if all(arm["kind"] != "index" for arm in found["arms"].values()):
        return ""
    said = " The index is not traded and pays no costs; "
    if not found["index_is_price"]:
        return f"{said}if its file is a price index (data.init_args.index_is_price), it also lacks dividends."
    return (
        f"{said}it is a price index, without dividends. Beside prices adjusted for dividends its return and Sharpe "
        "ratio are too low, and every alpha against it holds about the dividend yield of the market."
    )


def _hindsight(found: Findings) -> list[str]:
    if found["mode"] != "published":
        return []
    text = (
        "**Mode published looks ahead.** Stocks were selected with their returns in the test period itself, and "
        "weights were restored every day free of charge. Nobody could have had these numbers."
    )
    whole = _without_clusters(found)
    if found["random"] is not None and whole is not None:
        text += (
            f" Random clusters under the same rules have a mean Sharpe ratio of "
            f"{_number(found['random']['sharpe']['mean'])}; {whole}, which selects nothing, has "
            f"{_number(found['arms'][whole]['at_cost']['sharpe'])}. The gap between these two is owed to hindsight and "
            "weights, not to clusters."
        )
    return [text]


def _without_clusters(found: Findings) -> str | None:
    return next((name for name, arm in found["arms"].items() if arm["kind"] == "allocation"), None)


def _verdicts(found: Findings) -> list[str]:
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "open": [], "undefined": []}
    for name, arm in found["arms"].items():
        if arm["model_minus_this"] is not None:
            groups[_verdict(arm["model_minus_this"]["sharpe"])].append(name)
    percent = f"{100 * found['level']:g} %"
    model, undefined = found["model"], groups["undefined"]
    n_compared = sum(map(len, groups.values())) - len(undefined)
    said = []
    for verdict, words in (
        ("ahead", f"has a higher Sharpe ratio, the {percent} interval of the difference above zero, than"),
        ("behind", f"has a lower Sharpe ratio, the {percent} interval of the difference below zero, than"),
        ("open", f"cannot be told apart, the {percent} interval of the difference holding zero, from"),
    ):
        if n_compared:
            said.append(f"- *{model}* {words}: {'; '.join(groups[verdict]) or 'none of them'}.")
    if undefined:
        why = f"{found['panel']['n_test_days']} days are too few or a series is constant on most of them"
        said.append(f"- No interval, and so no verdict, as {why}, against: {'; '.join(undefined)}.")
    chance = (1 - found["level"]) * n_compared
    note = f"Of {n_compared} comparisons with nothing in them, {chance:.1f} would be called apart by chance."
    return [*(["\n".join(said)] if said else []), *([note] if n_compared else [])]


def _verdict(interval: list[float | None]) -> str:
    _, low, high = interval
    if low is None or high is None:
        return "undefined"
    # Two strategies that hold the same differ by rounding, on every resample to the same side.
    return "ahead" if low > 1e-9 else "behind" if high < -1e-9 else "open"


def _lot(what: str, drawn: Findings) -> str:
    """Clusters by lot in numbers: how they are called, and what they earn beside the model."""
    ratio, n = drawn["sharpe"], drawn["n"]
    if drawn["p_value"] is None:
        return f"{what} under the same rules ({n} seeds): a Sharpe ratio is not defined."
    low, high = (_number(ratio["quantiles"][share]) for share in ("0.05", "0.95"))
    return (
        f"{what} under the same rules ({n} seeds): Sharpe ratio {_number(ratio['mean'])} on average, sd "
        f"{_number(ratio['sd'])}, 5 to 95 % {low} to {high}. {drawn['n_at_least_model']} of {n} reach the model's"
    )


def _by_lot(found: Findings) -> list[str]:
    random, permuted = found["random"], found["permuted"]
    said = []
    if permuted is None:
        said.append("No permuted clusters were run: whether the model's clusters add anything is not answered here.")
    else:
        said.append(_lot("Permuted clusters, the model's with their stocks exchanged by lot,", permuted))
        if permuted["p_value"] is not None:
            said[-1] += f" (p = {permuted['p_value']:.3f}): {_lot_verdict(permuted, 1 - found['level'])}"
        whole, ours = _without_clusters(found), found["arms"][found["model"]]["at_cost"]["sharpe"]
        if whole is not None and None not in (ours, permuted["sharpe"]["mean"]):
            said[-1] += (
                f" From {whole} ({_number(found['arms'][whole]['at_cost']['sharpe'])}) to permuted clusters it is "
                "selection, weights and the sizes of clusters; what the model's clusters add to that is "
                f"{ours - permuted['sharpe']['mean']:+.2f}."
            )
    if random is not None:
        text = _lot("Random clusters, sizes about equal,", random)
        if random["p_value"] is not None:
            sizes = ", ".join(map(str, found["panel"]["cluster_sizes"]))
            text += f"; the model's have {sizes} stocks at first, so this also compares sizes."
        said.append(text)
    return said


def _lot_verdict(drawn: Findings, allowed: float) -> str:
    if drawn["p_value"] <= allowed:
        return (
            "on these very days the model's clusters earn more than clusters by lot of the same sizes; whether on "
            "others too, the interval against the median one says."
        )
    if drawn["n_at_least_model"] == 0 and 1 / (1 + drawn["n"]) > allowed:
        return f"too few seeds to tell, {math.ceil(1 / allowed) - 1} could."
    return "on these days the model's clusters do not stand out from clusters by lot of the same sizes."


def _only_volatility(found: Findings) -> list[str]:
    arms, random = found["arms"], found["random"]
    shares = [
        f"{name} {arm['volatility_explained']:.0%}"
        for name, arm in arms.items()
        if arm["volatility_explained"] is not None and not name.startswith(("random clusters", "permuted clusters"))
    ]
    if random is not None and random["volatility_explained"]["mean"] is not None:
        shares.append(f"random clusters {random['volatility_explained']['mean']:.0%} on average")
    if not shares:
        return []
    said = "Is it only volatility? Of the variance of train volatility over stocks lie between clusters: "
    said += ", ".join(shares) + "."
    control = next((name for name in arms if name.startswith(VOLATILITY_ONLY)), None)
    if control is None:
        return [said]
    interval = arms[control]["model_minus_this"]["sharpe"]
    verdict = {
        "ahead": "The model earns more than clusters of volatility alone: it is not only volatility.",
        "behind": "Clusters of volatility alone earn more than the model.",
        "undefined": "There is no interval, and so no verdict.",
        "open": "Clusters of volatility alone cannot be told apart from the model: these days do not show that "
        "anything beyond volatility is of use.",
    }[_verdict(interval)]
    return [f"{said} {verdict} (Sharpe difference to {control}: {_interval(interval, '+.2f')}.)"]


def _deflated(found: Findings) -> list[str]:
    deflated = found["deflated_sharpe"]
    if deflated["probability"] is None:
        return []
    trials = deflated["n_trials"]
    bar = f"what the best of {trials} worthless trials would show" if trials > 1 else "0, this being the only trial"
    return [
        f"Deflated Sharpe ratio: {deflated['probability']:.2f} is the probability that the model's true ratio exceeds "
        f"{bar}." + (" It knows nothing of the look-ahead." if found["mode"] == "published" else "")
    ]


def _universe(found: Findings) -> list[str]:
    panel = found["panel"]
    said = (
        f"Universe: {panel['n_stocks']} stocks, {panel['n_eligible']} eligible at the first rebalance, train "
        f"{panel['train'][0]} to {panel['train'][1]}. "
    )
    prices = found.get("data", {}).get("prices")
    if prices:
        said += f"Prices: {', '.join(prices)}. "
    if panel["n_without_sector"]:
        said += (
            f"{panel['n_without_sector']} of the eligible have no sector and are in no cluster of sectors; a list of "
            "sectors that is younger than the test knows who was still there. "
        )
    if panel["n_left_in_test"]:
        left = f"Of the {panel['n_held']} stocks that some method held, {panel['n_left_in_test']} have their last price"
        return [f"{said}{left} inside the test."]
    return [
        f"{said}None of the {panel['n_held']} stocks that some method held leaves during the test, as in a list of "
        "survivors. Unless the list is of that time, what went under is missing for every method here: levels of "
        "return are too high, differences less so."
    ]


def _flags(found: Findings) -> list[str]:
    lines = [f"- {flag}" for flag in found["flags"]]
    for name, arm in found["arms"].items():
        kinds: dict[str, list[str]] = {}
        for flag, times in arm["flags"].items():
            kinds.setdefault(flag.split(":")[0], []).extend([flag] * times)
        lines += [
            f"- {name}, {len(flags)} of {arm['n_rebalances']} rebalances: {flags[0]}"
            + (" (and alike)" if len(set(flags)) > 1 else "")
            for flags in kinds.values()
        ]
    return ["\n".join(["Flags:", "", *lines])] if lines else []
