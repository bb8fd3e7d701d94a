"""The words of a context report: verdicts, one table a target, and what was not run, not seen and cannot be proved."""

from typing import Any

from lightning_modules.context.controls import Arm
from lightning_modules.context.findings import WORDS

Findings = dict[str, Any]
"""What :func:`lightning_modules.context.findings.findings` returns, with the facts of the data and the seconds."""

N_LABEL_CHECKS = 3
"""Features of a target whose label checks are shown, the most telling first; all are in the numbers."""

_CONTROLS = {
    "own+time": "time features",
    "gaussian": "Gaussian noise in place of context",
    "constant": "one constant context vector",
    "wide": "the parameter-matched encoder",
}


def _number(value: float | None, form: str = ".3f") -> str:
    return "not defined" if value is None else format(value, form)


def _interval(values: list[float | None], form: str = ".3f") -> str:
    middle, low, high = (_number(value, form) for value in values)
    return f"{middle} [{low}, {high}]" if values[1] is not None else middle


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _answer(judged: dict[str, Any]) -> str:
    if judged["helps"] is None:
        return "not judged"
    high = judged["adjusted_interval"][2]
    return "yes" if judged["helps"] else "no, worse" if high is not None and high < 0 else "no"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _percent(found: Findings) -> str:
    return f"{100 * found['level']:g} %"


def verdicts(found: Findings) -> list[str]:
    """One line a target: what is predicted, and what the judgements allow to say."""
    return [
        f"- **{name}** ({target['description']}; {target['scope']}"
        f"{', outcome-dependent' if target['outcome_dependent'] else ''}): {target['verdict']}"
        for name, target in found["targets"].items()
    ]


def table(found: Findings, name: str) -> list[str]:
    """One row an arm, in Markdown; the arm chosen on validation is bold, outcome-dependent targets are so in each row.

    Differences are of the measure that arms are judged by and signed so that more is better.
    """
    target, measure, percent = found["targets"][name], WORDS[found["measure"]], _percent(found)
    lines = [
        _row(
            [
                *("arm", "kind", f"ROC-AUC [{percent}]", "PR-AUC", "log-loss", "accuracy"),
                f"beyond own, {measure} [{percent}]",
                f"beyond own+time [{percent}]",
                f"beyond the best control [{percent} of all {found['n_comparisons']} together, Holm]",
                *("adjusted p", "helps?"),
            ]
        ),
        "|---" * 11 + "|",
    ]
    for name_of_arm, arm in target["arms"].items():
        measures, gains, judged = arm["measures"], arm["gains"] or {}, arm["judged"]
        shown = f"**{name_of_arm}**" if name_of_arm == target["chosen"] else name_of_arm
        over = [
            _interval(gains[control][found["measure"]], "+.4f") if control in gains else ""
            for control in ("own", "own+time")
        ]
        beyond = ["", "", ""]
        if judged:
            text = f"{_interval(judged['adjusted_interval'], '+.4f')} ({judged['control']})"
            beyond = [text, _p_value(judged["adjusted_p"]), _answer(judged)]
        cells = [
            shown + (" (outcome-dependent)" if arm["outcome_dependent"] else ""),
            arm["kind"],
            _interval(measures["roc_auc"]),
            *(_number(measures[one][0]) for one in ("pr_auc", "log_loss", "accuracy")),
            *over,
            *beyond,
        ]
        lines.append(_row(cells))
    return lines


def not_run(target: dict[str, Any]) -> list[str]:
    """The controls that a target was not read with, in words."""
    arms = [Arm.parse(name) for name in target["arms"]]
    missing = [words for name, words in _CONTROLS.items() if name not in target["arms"]]
    aggregators = list(dict.fromkeys(arm.source for arm in arms if arm.is_context))
    shuffled = {arm.source for arm in arms if arm.is_shuffled}
    unshuffled = [name for name in aggregators if name not in shuffled]
    moments = (
        f"context at shuffled moments of {', '.join(unshuffled)} (not asked for, or most queries share one moment)"
    )
    return missing + ([moments] if unshuffled else [])


def report(found: Findings) -> list[str]:
    """The whole report but for pictures, as lines of Markdown."""
    split = {"users": "users (those of the test were never seen)", "time": "time (the test is later than all training)"}
    said = [
        "# Test report: does it help to see what others were doing?",
        "",
        *verdicts(found),
        "",
        f"Split by {split[found['split']]}. Context counts as helping only where it beats, on the test, the best of "
        "own history, own history with time features, and both of these with the same context at shuffled moments; "
        f"Holm's correction runs over all {found['n_comparisons']} context arms of all targets. Differences are signed "
        "so that more is better.",
        "",
    ]
    for name, target in found["targets"].items():
        said += [f"## {name}: {target['description']}", "", *table(found, name), "", *_below(found, target), ""]
    said += ["## Where the context looked", "", _attention(found), ""]
    said += ["## The data", "", *_data(found)]
    return [*said, "", _closing(found)]


def _below(found: Findings, target: dict[str, Any]) -> list[str]:
    """What a table does not hold."""
    text = (
        f"{target['n_queries']} test queries of {target['n_users']} users, {target['n_positives']} outside the "
        f"commonest of {target['n_classes']} classes; {target['probe']}."
    )
    if target["chosen"]:
        text += f" Chosen on validation: **{target['chosen']}**."
    if target["smallest_detectable"] is not None:
        text += f" Gains of it below {target['smallest_detectable']:.4f} {WORDS[found['measure']]} could not be seen."
    if target["underpowered"]:
        text += " **Underpowered.**"
    said = [text]
    if target["outcome_dependent"]:
        said.append(
            "**Outcome-dependent: when a query is asked depends on its label, as in the published protocol. Nobody "
            "could have asked at that moment; no number of this table is a forecast.**"
        )
    missing = not_run(target)
    said.append(f"Controls that were not run: {'; '.join(missing) or 'none'}.")
    return [line for paragraph in said for line in (paragraph, "")][:-1]


def _attention(found: Findings) -> str:
    plain = {key: value for key, value in found["bank"].items() if not isinstance(value, dict)}
    bank = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items() if value is not None)
    context = f"Context: {bank}." if bank else ""
    for name, shares in found["bank"].get("share_without_context", {}).items():
        if any(shares.values()):
            told = ", ".join(f"{share:.2%} of {fold}" for fold, share in shares.items())
            context += f" Queries of {name} that see nobody: {told}."
    seen = found["attention"]
    if seen is None:
        return f"The aggregators have no weights to look at. {context}".strip()
    quartiles = "; ".join(
        f"{words} {' / '.join(format(value, form) for value in seen[key])}"
        for key, words, form in (
            ("n_visible", "users visible", ".0f"),
            ("effective_number", "effective number of users", ".3g"),
            ("entropy", "entropy of the weights (nats)", ".2f"),
            ("mean_age", "mean age of the states in days", ".3g"),
        )
        if seen[key] is not None
    )
    return (
        f"*{seen['aggregator']}*, test queries of the first target, quartiles: {quartiles}. "
        f"{seen['share_without_context']:.1%} of the queries saw nobody. {context}"
    ).strip()


def _data(found: Findings) -> list[str]:
    facts = found.get("data") or {}
    checks = {name: rows for name, rows in facts.get("label_checks", {}).items() if rows}
    said = []
    if facts.get("files"):
        said.append(f"Files: {', '.join(facts['files'])}.")
    if facts.get("counts"):
        said.append(_counts(facts["counts"]))
    if checks:
        said.append("How much single features tell of the label, two-sided AUC at the query and by age of the event:")
        said.append("\n".join(_checks(checks)))
    else:
        said.append("No label checks were made.")
    if facts.get("warnings"):
        said.append("\n".join(["**Warnings:**", "", *(f"- {line}" for line in facts["warnings"])]))
    elif any(row["worst"] is not None for rows in checks.values() for row in rows):
        said.append("No single feature was warned of.")
    unseen = [name for name, rows in checks.items() if all(row["worst"] is None for row in rows)]
    if unseen:
        said.append(
            f"**Not looked at: {', '.join(unseen)}.** Too few users of the rarer class for an AUC: a feature may tell "
            "the label there and not be warned of."
        )
    said.append(f"The absence of leaks cannot be proved. {facts.get('note', '')}".strip())
    return [line for paragraph in said for line in (paragraph, "")][:-1]


def _counts(counts: dict[str, Any]) -> str:
    return "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in counts.items()) + "."


def _checks(checks: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [_row(["target", "feature", "what of it", "AUC", "AUC by age", "worst"]), "|---" * 6 + "|"]
    for name, rows in checks.items():
        telling = sorted(rows, key=lambda row: -1.0 if row["worst"] is None else row["worst"], reverse=True)
        for row in telling[:N_LABEL_CHECKS]:
            by_age = " / ".join("-" if value is None else f"{value:.2f}" for value in row["auc_by_age"])
            lines.append(_row([name, row["feature"], row["what"], _number(row["auc"]), by_age, _number(row["worst"])]))
    return lines


def _closing(found: Findings) -> str:
    seconds, spent = found.get("seconds"), ""
    if seconds is not None:
        fit = "unknown" if seconds["fit"] is None else f"{seconds['fit']:.0f} s"
        spent = f"Fit {fit}, test {seconds['test']:.0f} s. "
    return (
        f"{spent}Seed {found['seed']}. Intervals: {_percent(found)}, bootstrap of users with all their queries, "
        f"{found['n_resamples']} resamples, the same users for all arms; they hold encoder and probes fixed, so that "
        "another seed may stray further."
    )
