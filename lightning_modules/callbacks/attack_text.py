"""The words of an attack report: three tables, and sentences that say what the intervals allow to say and no more."""

from typing import Any

from lightning_modules.attacks.findings import Findings, key
from lightning_modules.attacks.study_bootstrap import FALSE_ALARMS, joint_measure
from lightning_modules.attacks.thresholds import n_clean_required

HEADLINE = key(FALSE_ALARMS[0])
"""Rate of false alarms of the headline, as a key of the findings."""

_RATES = tuple(map(key, FALSE_ALARMS))
_JOINT = joint_measure(FALSE_ALARMS[0])
_CONTRADICTION = 0.25  # forms of concealability this far apart are told: a quarter of their range
_UPSIDE_DOWN = 0.2  # an AUC that is that of a valid judge once read upside down


def _number(value: float | None, form: str = ".2f") -> str:
    return "not defined" if value is None else format(value, form)


def _interval(values: list[float | None] | None, form: str = ".2f") -> str:
    if values is None or values[0] is None:
        return "not defined"
    middle, *ends = values[:3]
    told = ", ".join(_number(end, form) for end in ends)
    return f"{middle:{form}} [{'not resolvable by the bootstrap' if None in ends else told}]"


def _percent(key: str) -> str:
    return f"{100 * float(key):g} %"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _names(names: list[str]) -> str:
    return ", ".join(f"*{name}*" for name in names) or "none"


def not_resolvable(found: Findings, judges: list[str], rate: str) -> str | None:
    """Why none of these judges has a threshold at this rate of false alarms; None if one has."""
    limits = [found["judges"][name] for name in judges]
    if any(judge["thresholds"][rate]["false_alarms"] is not None for judge in limits):
        return None
    sizes = sorted({judge["n_calibration"] for judge in limits})
    return f"not resolvable (n = {', '.join(map(str, sizes)) or 0})"


def _joint(found: Findings, attack: dict[str, Any], rate: str) -> str:
    if not found["panel"]:
        return "no valid judge"
    reason = not_resolvable(found, found["panel"], rate)
    if reason is not None:
        return reason
    worst = attack["panel"]["joint_success"][rate]
    text = _interval(attack["intervals"][joint_measure(float(rate))])
    return text if worst is None else f"{text} ({worst['worst']:.2f})"


def _detected(found: Findings, attack: dict[str, Any], role: str) -> str:
    """Share seen at each rate off the ROC curve, which as a threshold needs that many clean series."""
    attacked = [judge for name, judge in attack["judges"].items() if found["judges"][name]["role"] == "attacked"]
    cells = []
    for rate in _RATES:
        summed_up = attack["panel"]["detection"][rate]
        if role == "attacked" and not attacked:
            return "no detector"
        if role == "panel" and summed_up is None:
            return "no valid judge"
        if found["n_series"] < n_clean_required(float(rate)):
            cells.append(f"not resolvable (n = {found['n_series']})")
        elif role == "attacked":
            cells.append(f"{max(judge['detection'][rate] for judge in attacked):.2f}")
        else:
            cells.append(f"{summed_up['mean']:.2f} ({summed_up['worst']:.2f})")
    return " / ".join(cells)


def table(found: Findings) -> list[str]:
    """One row an attack, in Markdown."""
    percent = f"{100 * found['level']:g} %"
    joint = [
        f"joint success against the panel at {_percent(rate)} false alarms: mean [{percent}] (worst judge)"
        for rate in _RATES
    ]
    detected = f"detected at {' / '.join(map(_percent, _RATES))} false alarms"
    name = found.get("data", {}).get("set")
    lines = [
        f"# Test report: {found['n_series']} series{f' of {name}' if name else ''}, {found['n_steps']} steps, "
        f"{found['n_channels']} channel{'s' * (found['n_channels'] > 1)}, {len(found['class_names'])} classes",
        "",
        "| attack | EFF | CONC / F against the attacked detector, F1 form | CONC / F, AUC two-sided | "
        f"F against the panel, AUC two-sided: mean (worst judge) | {' | '.join(joint)} | "
        f"{detected} by the attacked detector | {detected} by the panel: mean (worst judge) | accuracy | Linf | L2 |",
        "|---" * 12 + "|",
    ]
    for name, attack in found["attacks"].items():
        pooled = None if attack["attacked"] is None else attack["attacked"]["published"]
        pairs = [
            "no detector"
            if pooled is None
            else f"{_number(pooled['concealability'][form])} / {_number(pooled['success'][form])}"
            for form in ("f1", "auc_two_sided")
        ]
        panel = attack["panel"]["success"]["auc_two_sided"]
        cells = [
            name,
            _number(attack["effectiveness"]),
            *pairs,
            "no valid judge" if panel is None else f"{panel['mean']:.2f} ({panel['worst']:.2f})",
            *(_joint(found, attack, rate) for rate in _RATES),
            _detected(found, attack, "attacked"),
            _detected(found, attack, "panel"),
            _number(attack["accuracy"]),
            _number(attack["norms"]["linf"], ".3g"),
            _number(attack["norms"]["l2"], ".3g"),
        ]
        lines.append(_row(cells))
    return lines


def classifier_table(found: Findings) -> list[str]:
    """The victim on clean series, then one row an attack: how it decides and ranks, and what the attack took."""
    several = ", one-vs-rest" if len(found["class_names"]) > 2 else ""
    lines = [
        _row(
            [
                "victim on",
                "accuracy",
                "accuracy on those right when clean",
                "decisions changed",
                "F1",
                f"ROC-AUC{several}",
                f"PR-AUC{several}",
                "N, steps of the run",
                "bad gradients of N",
                "zero gradients of N",
                "ms a series for N",
            ]
        ),
        "|---" * 11 + "|",
    ]
    ranks = ("f1", "roc_auc", "average_precision")
    victim = found["victim"]
    ranked = [_number(victim[measure]) for measure in ranks]
    lines.append(_row(["clean series", _number(victim["accuracy"]), "", "", *ranked, "", "", "", ""]))
    for name, attack in found["attacks"].items():
        decided = [_number(attack[measure]) for measure in ("accuracy", "accuracy_on_correct", "fooling_rate", *ranks)]
        shares = [_number(attack[f"{kind}_gradients"], ".1%") for kind in ("bad", "zero")]
        spent = f"{1000 * attack['seconds_per_series']:.3g}"
        lines.append(_row([name, *decided, str(attack["n_steps"]), *shares, spent]))
    return lines


def judges_table(found: Findings) -> list[str]:
    """One row a judge: what it is, whether it sees vanilla attacks, and how its thresholds hold on clean series."""
    alarms = [f"false alarms at {_percent(key(rate))}" for rate in FALSE_ALARMS]
    if not found["judges"]:
        return []
    lines = [_row(["judge", "role", "made of", "AUC on vanilla", "AUC on own levels", "valid?", *alarms])]
    lines.append("|---" * 8 + "|")
    for name, judge in found["judges"].items():
        made_of = "; ".join(f"{words.replace('_', ' ')}: {value}" for words, value in judge["provenance"].items())
        aucs = [_number(judge["vanilla_auc"]), _own_levels(judge)]
        realised = [
            not_resolvable(found, [name], rate) or _interval(limit["false_alarms"], ".3f")
            for rate, limit in judge["thresholds"].items()
        ]
        verdict = "yes" if judge["valid"] else f"not a valid judge: {_invalid(judge)}"
        lines.append(_row([name, judge["role"].replace("_", " "), made_of, *aucs, verdict, *realised]))
    return lines


def _own_levels(judge: dict[str, Any]) -> str:
    """Mean AUC on the vanilla training attacks, and the smallest and largest of them."""
    own = [level["auc"] for level in judge["levels"] if not level["concealed"]]
    return f"{judge['trained_auc']:.2f} ({min(own):.2f} to {max(own):.2f})" if own else "trained on none"


def _invalid(judge: dict[str, Any]) -> str:
    """The figure for which a judge is not valid."""
    if judge["trained_auc"] is not None:
        return f"its mean AUC on the attacks it was trained against is {judge['trained_auc']:.2f} on validation"
    if judge["vanilla_auc"] is None:
        return "no vanilla attack was run to judge it by"
    return f"its AUC on vanilla attacks is {judge['vanilla_auc']:.2f}"


def sentences(found: Findings) -> list[str]:
    """What the numbers allow to say, one paragraph each, with blank lines between."""
    said = [*_headline(found), *_pays(found), *_survives(found), *_caught(found), *_forms(found), *_degenerate(found)]
    said += [*_unresolvable(found), *_alarms(found), *_victim(found), *_costs(found)]
    several = sum(judge["role"] == "attacked" for judge in found["judges"].values()) > 1
    rule = (
        "Several attacked detectors are pooled as published, the largest score of a clean and the smallest of an "
        "adversarial series, which favours the attacker; metrics.json has the largest of both beside it. "
    )
    seconds = found.get("seconds")
    spent = "" if seconds is None else f"Test {seconds['test']:.0f} s. "
    said.append(
        f"{rule if several else ''}{spent}Seed {found['seed']}. Intervals: bootstrap of series, {found['n_resamples']} "
        "resamples, the same for all attacks; they hold networks, thresholds and configurations fixed. That of mean "
        "joint success also covers an exact one, the mean over judges of simultaneous Clopper-Pearson intervals; where "
        "all resamples agree, a difference of joint successes has the exact interval of paired series, and other "
        "measures have none. Configurations and iterations were chosen on validation by one rule for all attacks; "
        "pareto.csv has EFF, CONC, F, strengths and iteration of those that no other beats in both EFF and CONC. The "
        "panel is the valid held-out judges, without those that stand beside it; of each, its worst is the judge that "
        "is worst for the attack. EFF counts clean errors, joint success only series that were called rightly when "
        "clean."
    )
    return [line for paragraph in said for line in (paragraph, "")][:-1]


def _headline(found: Findings) -> list[str]:
    name = found["headline"]
    if name is None:
        return ["No concealed attack was run: whether one can hide is not answered here."]
    attack, rate = found["attacks"][name], _percent(HEADLINE)
    if not found["panel"]:
        return [f"**Joint success at {rate} false alarms has no answer: no held-out judge is valid.**"]
    worst = attack["panel"]["joint_success"][HEADLINE]
    if worst is None:
        reason = not_resolvable(found, found["panel"], HEADLINE) or "not defined, no series is called rightly"
        return [f"**Joint success at {rate} false alarms against held-out judges: {reason}.**"]
    text = (
        f"**Joint success at {rate} false alarms against held-out judges: {_interval(attack['intervals'][_JOINT])}** "
        f"for *{name}*, the best concealed attack on validation, as the mean over {len(found['panel'])} valid judges "
        f"({_names(found['panel'])}); {worst['worst']:.2f} against *{worst['judge']}*, the worst for it."
    )
    if attack["baseline"] is not None:
        baseline = found["attacks"][attack["baseline"]]
        text += (
            f" Vanilla *{attack['baseline']}* reaches {_interval(baseline['intervals'][_JOINT])}, so concealment adds "
            f"{_interval(attack['minus_vanilla'][_JOINT], '+.3f')}."
        )
    for other in _RATES[1:]:
        text += f" At {_percent(other)} false alarms, mean (worst judge): {_joint(found, attack, other)}."
    return [text]


def _gain(found: Findings, measure: str, asked: str, what: str) -> list[str]:
    """Which concealed attacks are ahead of the vanilla attack of their family, which behind, and which neither."""
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "open": [], "unresolved": [], "undefined": []}
    for name, attack in found["attacks"].items():
        if attack["minus_vanilla"] is None:
            continue
        interval = attack["minus_vanilla"][measure]
        if interval[0] is None:
            groups["undefined"].append(name)
            continue
        if None in interval:
            groups["unresolved"].append(f"{name} ({interval[0]:+.3f})")
            continue
        verdict = "ahead" if interval[1] > 0 else "behind" if interval[2] < 0 else "open"
        groups[verdict].append(f"{name} ({_interval(interval, '+.3f')})")
    undefined, unresolved = groups.pop("undefined"), groups.pop("unresolved")
    percent = f"{100 * found['level']:g} %"
    words = {
        "ahead": f"Concealment adds to {what}, the {percent} interval of the difference above zero",
        "behind": "It takes away, the interval below zero",
        "open": "It cannot be told apart from the vanilla attack of the family, the interval holding zero",
    }
    lines = [f"- {words[verdict]}: {'; '.join(names) or 'none of them'}." for verdict, names in groups.items()]
    if not any(groups.values()):
        lines = []
    if unresolved:
        lines.append(
            f"- The bootstrap cannot resolve the difference, the same in all resamples: {'; '.join(unresolved)}."
        )
    if undefined:
        lines.append(f"- The difference is not defined for: {'; '.join(undefined)}.")
    return ["\n".join([asked, "", *lines])] if lines else []


def _pays(found: Findings) -> list[str]:
    if not any(judge["role"] == "attacked" for judge in found["judges"].values()):
        return []
    if not found["victim"]["n_correct"]:
        return [
            "**The victim calls no clean series rightly: nothing here says what an attack does or whether it hides. "
            f"Are its logits in the order of the classes ({', '.join(found['class_names'])}), and does it take series "
            "as the data gives them?**"
        ]
    asked = "Does concealment pay against the attacked detector? F in the F1 form, concealed minus vanilla:"
    return ["\n".join([said, *_but(found)]) for said in _gain(found, "success", asked, "F")]


def _but(found: Findings) -> list[str]:
    """What takes the meaning from an F against the attacked detector, however large."""
    blind = {
        name: judge for name, judge in found["judges"].items() if judge["role"] == "attacked" and not judge["valid"]
    }
    lines = [
        f"- But *{name}* is not a valid judge ({_invalid(judge)}): to hide from it shows nothing, so these differences "
        "do not say that concealment pays."
        for name, judge in blind.items()
    ]
    for name, attack in found["attacks"].items():
        if attack["minus_vanilla"] is not None and not attack["success_on_correct"]:
            n_correct = found["victim"]["n_correct"]
            lines.append(
                f"- But *{name}* fools none of the {n_correct} series that were called rightly: its EFF is the "
                "victim's own errors, its F no success."
            )
    return lines


def _survives(found: Findings) -> list[str]:
    if not_resolvable(found, found["panel"], HEADLINE) is not None:
        return []
    asked = (
        f"Does it survive judges it never saw? Mean joint success at {_percent(HEADLINE)} false alarms against the "
        "panel, concealed minus vanilla:"
    )
    return _gain(found, _JOINT, asked, "joint success")


def _caught(found: Findings) -> list[str]:
    lines = []
    for name, attack in found["attacks"].items():
        worst = attack["panel"]["detection"][HEADLINE]
        if not attack["concealed"] or worst is None:
            continue
        own = [
            before["detection"][HEADLINE]
            for judge, before in attack["judges"].items()
            if found["judges"][judge]["role"] == "attacked"
        ]
        ours = f"; the attacked detector sees {max(own):.0%}" if own else ""
        lines.append(f"- *{name}*: *{worst['judge']}* sees {worst['worst']:.0%}, the panel {worst['mean']:.0%}{ours}.")
    if not lines:
        return []
    asked = (
        f"Which held-out judge catches it? (Share detected at {_percent(HEADLINE)} false alarms on the test series.)"
    )
    return ["\n".join([asked, "", *lines])]


def _forms(found: Findings) -> list[str]:
    apart, turned = [], []
    for name, attack in found["attacks"].items():
        if attack["attacked"] is not None:
            forms = attack["attacked"]["published"]["concealability"]
            if forms["f1"] is not None and abs(forms["f1"] - forms["auc_two_sided"]) > _CONTRADICTION:
                apart.append(f"*{name}* {forms['f1']:.2f} and {forms['auc_two_sided']:.2f}")
        turned += [
            f"*{judge}* before *{name}* (AUC {before['auc']:.2f})"
            for judge, before in attack["judges"].items()
            if before["auc"] <= _UPSIDE_DOWN
        ]
    said = []
    if apart:
        said.append(
            "The two forms of concealability from the attacked detector contradict each other (F1 form, then AUC "
            f"two-sided): {'; '.join(apart)}. Hidden in one and not in the other is not hidden."
        )
    if turned:
        said.append(f"Read upside down, these judges detect: {'; '.join(turned)}. Evasion has overshot.")
    return said


def _degenerate(found: Findings) -> list[str]:
    lines = []
    for name, judge in found["judges"].items():
        if not judge["valid"]:
            weight = (
                "that a concealed attack passes it says nothing"
                if judge["role"] == "attacked"
                else "it is left out of the panel"
            )
            lines.append(f"- *{name}* is not a valid judge: {_invalid(judge)}, at least 0.80 is asked for; {weight}.")
        if judge["one_answer"] is not None:
            conc = "CONC in the F1 form is 1" if judge["one_answer"] == "clean" else "CONC in the F1 form is 1/3"
            lines.append(
                f"- *{name}* calls every series {judge['one_answer']}: {conc} against it, whatever the attack."
            )
    if found["victim"]["one_class"]:
        lines.append("- The victim gives all clean series one class: EFF says nothing of attacks.")
    for name, attack in found["attacks"].items():
        if attack["concealed"] and attack["chosen"]["alpha"] == 0:
            lines.append(f"- *{name}*: validation gave concealment the weight 0, so it does not hide.")
        if attack["largest_linf"] == 0:
            lines.append(f"- *{name}* moves no series: it is hidden because it does not attack.")
        elif attack["one_class"] and not found["victim"]["one_class"]:
            lines.append(
                f"- Under *{name}* the victim gives every series one class: EFF {attack['effectiveness']:.2f} at "
                f"accuracy {attack['accuracy']:.2f} is that of a constant answer."
            )
    return ["Degenerate cases:\n\n" + "\n".join(lines)] if lines else []


def _unresolvable(found: Findings) -> list[str]:
    said = []
    for rate in map(key, FALSE_ALARMS):
        few = [name for name, judge in found["judges"].items() if judge["thresholds"][rate]["false_alarms"] is None]
        if few:
            sizes = sorted({found["judges"][name]["n_calibration"] for name in few})
            needed = found["judges"][few[0]]["thresholds"][rate]["n_required"]
            said.append(
                f"At {_percent(rate)} false alarms not resolvable (n = {', '.join(map(str, sizes))}): {_names(few)}; a "
                f"threshold needs {needed} clean calibration series."
            )
    return said


def _alarms(found: Findings) -> list[str]:
    lines = []
    for name, judge in found["judges"].items():
        for rate, limit in judge["thresholds"].items():
            share, expected = limit["false_alarms"], limit["expected_false_alarms"]
            if share is None or expected[0] <= share[0] <= expected[1]:
                continue
            words = (
                "more, so joint success is too low"
                if share[0] > expected[1]
                else "fewer, as a conformal bound allows: the threshold is conservative, and joint success at exactly "
                "this rate would be lower"
            )
            lines.append(
                f"- *{name}* promised {_percent(rate)}: {_interval(share, '.3f')}, where calibration leaves "
                f"{expected[0]:.3f} to {expected[1]:.3f} to chance; {words}."
            )
    if not lines:
        return []
    asked = (
        "False alarms on clean test series that the promised rate does not explain (outside the central "
        f"{100 * found['level']:g} % of their beta-binomial distribution, all thresholds taken together):"
    )
    return ["\n".join([asked, "", *lines])]


def _victim(found: Findings) -> list[str]:
    victim = found["victim"]
    said = [
        f"The victim calls {victim['accuracy']:.1%} of clean series rightly ({victim['n_correct']} of "
        f"{found['n_series']}); EFF of no attack at all is {_number(victim['effectiveness'])}."
    ]
    if victim["saturated"]:
        said.append(
            f"**The victim is saturated** (median |logit| {victim['saturation']:.1f}, above 17): gradients of "
            "cross-entropy vanish in float32, so attacks that climb it may show robustness that is not there; the "
            "logit margin does not."
        )
    return said


def _costs(found: Findings) -> list[str]:
    lines = []
    for name, attack in found["attacks"].items():
        chosen = {words: f"{value:g}" for words, value in attack["chosen"].items() if value is not None}
        chosen["iteration"] += f" of {attack['n_steps']}"
        settings = ", ".join(f"{words} {value}" for words, value in chosen.items())
        if attack["transferred"]:
            settings += ", gradients of a surrogate"
        flips = attack["steps_to_flip"]
        flipped = f", half of the flips by step {flips['median']:g}" if flips["median"] is not None else ""
        line = (
            f"- *{name}*: {settings}, the best of {attack['n_configurations']} configurations; "
            f"fools {_number(attack['success_on_correct'], '.0%')} of those called rightly{flipped}; L2 "
            f"{_number(attack['norms']['l2_relative'], '.1%')} of the series, roughness times "
            f"{_number(attack['roughness_ratio'])}, DTW {attack['dtw']['mean']:.3g}."
        )
        lines.append(line)
    return ["Attacks:\n\n" + "\n".join(lines)]
