"""From the trials of a run to what can be said about each arm, and the answer at the top of the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

from visattn.compare.reading import Arm, Run
from visattn.compare.statistics import LEVEL, Interval, mean_interval, paired_differences
from visattn.compare.verdicts import join_words, signed, verdict
from visattn.tasks import CLASSIFICATION, Task

__all__ = ["Summary", "answer", "limits", "summarise"]


@dataclass(frozen=True)
class Summary:
    """One arm in numbers and words; scores are in percent, differences in points."""

    arm: Arm
    score: Interval
    plain: Interval | None
    control: Interval | None
    verdict: str
    seconds: float
    problems: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """What the difference to plain says, in one or two words; empty for the plain arm."""
        if self.plain is None:
            return ""
        words = {"better": "better than plain", "worse": "worse than plain", "unclear": "not distinguishable"}
        if self.plain.outcome == "identical" and abs(self.plain.mean) < 1e-9:
            return "not distinguishable"
        return words.get(self.plain.outcome, "no verdict")


def summarise(run: Run) -> list[Summary]:
    """One summary per arm, in the order of the run."""
    plain = next(arm for arm in run.arms if arm.kind == "plain")
    control = next((arm for arm in run.arms if arm.kind == "control"), None)
    return [_summarise(arm, plain, control, run.seeds, run.task) for arm in run.arms]


def _summarise(arm: Arm, plain: Arm, control: Arm | None, seeds: tuple[int, ...], task: Task) -> Summary:
    scores = _scores(arm)
    to_plain = None if arm is plain else mean_interval(paired_differences(scores, _scores(plain)))
    to_control = None
    if control is not None and arm.kind == "mechanism":
        to_control = mean_interval(paired_differences(scores, _scores(control)))
    text = "the arm all others are compared with"
    if to_plain is not None:
        text = verdict(to_plain, to_control, planned=len(seeds), control_name=_control_name(arm, control, task))
    times = [trial.seconds for trial in arm.trials.values() if math.isfinite(trial.seconds)]
    return Summary(
        arm=arm,
        score=mean_interval([scores[seed] for seed in sorted(scores)]),
        plain=to_plain,
        control=to_control,
        verdict=text,
        seconds=math.fsum(times) / len(times) if times else math.nan,
        problems=tuple(_problems(arm, seeds, task)),
    )


def _scores(arm: Arm) -> dict[int, float]:
    return {seed: 100 * trial.score for seed, trial in arm.trials.items()}


def _control_name(arm: Arm, control: Arm | None, task: Task) -> str:
    """The control is as large as the largest arm; beside a smaller arm it is not called the same size."""
    if control is None or control.cost is None or arm.cost is None:
        return f"the {task.control}"
    ours, other = arm.cost.added_parameters, control.cost.added_parameters
    if not (ours > 0 and other > 0):
        return f"the {task.control}"
    if abs(other / ours - 1) <= 0.1:
        return f"the {task.control} of the same size"
    return f"the {'larger' if other > ours else 'smaller'} {task.control}"


def _problems(arm: Arm, seeds: tuple[int, ...], task: Task) -> list[str]:
    missing = [str(seed) for seed in seeds if seed not in arm.trials and seed not in arm.failures]
    lines = [f"seed {seed} failed: {' '.join(reason.split())}" for seed, reason in sorted(arm.failures.items())]
    if missing:
        lines.append(f"seed{'s' if len(missing) > 1 else ''} {join_words(missing)} not finished")
    for seed, trial in sorted(arm.trials.items()):
        if not math.isfinite(trial.score):
            lines.append(f"seed {seed}: its {task.score} is not a number and is left out")
    if arm.cost is None:
        lines.append("costs not measured")
    elif arm.cost.failed:
        lines.append(f"costs could not be measured: {' '.join(arm.cost.failed.split())}")
    return lines


def answer(run: Run, summaries: list[Summary]) -> list[str]:
    """The plain answer: which mechanism helps here and what it costs, in a few sentences that the data bear out."""
    plain = next(summary for summary in summaries if summary.arm.kind == "plain")
    mechanisms = [summary for summary in summaries if summary.arm.kind == "mechanism"]
    judged = [summary for summary in mechanisms if summary.outcome != "no verdict"]
    if plain.score.count == 0:
        return ["No answer: the plain network has no finished trial, so there is nothing to compare with."]
    judged.sort(key=lambda summary: -summary.plain.mean if summary.plain else 0.0)
    sentences = _lead(mechanisms, judged)
    worse = [summary for summary in judged if summary.outcome == "worse than plain"]
    if worse:
        sentences.append(f"Worse than plain: {join_words([_with_difference(summary) for summary in worse])}.")
    better = [summary for summary in judged if summary.outcome == "better than plain"]
    if better and any(arm.kind == "control" for arm in run.arms):
        sentences.append(_capacity(better, run.task))
    control = next((summary for summary in summaries if summary.arm.kind == "control"), None)
    if not better and control is not None and control.outcome == "better than plain":
        sentences.append(
            f"The {run.task.control} was better: {_with_difference(control)}, so capacity alone helps here."
        )
    sentences.extend(filter(None, (_price(summary.arm, plain.arm) for summary in better[:3])))
    finished = sum(summary.score.count for summary in summaries)
    planned = len(summaries) * len(run.seeds)
    if finished < planned:
        sentences.append(f"Only {finished} of the {planned} planned trials count here; the table says what is missing.")
    return sentences


def _lead(mechanisms: list[Summary], judged: list[Summary]) -> list[str]:
    better = [summary for summary in judged if summary.outcome == "better than plain"]
    if better:
        names = join_words([_with_difference(summary) for summary in better])
        return [f"Better than the plain network here: {names}."]
    compared = [summary for summary in mechanisms if summary.plain is not None and summary.plain.count > 0]
    best = max(compared, key=lambda summary: summary.plain.mean if summary.plain else -math.inf, default=None)
    if best is None:
        return ["No answer: no mechanism has a finished trial that can be compared with the plain network."]
    if not judged:
        pairs = max(summary.plain.count for summary in compared if summary.plain is not None)
        why = "one paired seed gives no interval" if pairs == 1 else "the paired differences have no spread"
        return [
            f"No answer yet: {why}, so no mechanism can be called better or worse than the plain network.",
            f"The best mechanism was {_with_difference(best)}; another seed may reverse it.",
        ]
    lead = "No mechanism could be shown to be better than the plain network here."
    if best.plain is not None and best.plain.mean > 0 and best in judged:
        return [lead, f"The best mechanism was {_with_difference(best)}; its interval includes zero."]
    return [lead]


def _capacity(better: list[Summary], task: Task) -> str:
    beyond = [summary for summary in better if summary.control is not None and summary.control.outcome == "better"]
    if not beyond:
        return (
            f"None of these could be shown to be better than the {task.control}, so more capacity alone may explain it."
        )
    if len(beyond) == len(better):
        return f"The {task.control} was beaten as well, so more capacity alone does not explain it."
    names = join_words([summary.arm.title for summary in beyond])
    return f"Of these only {names} also beat the {task.control}; for the others more capacity alone may explain it."


def _price(arm: Arm, plain: Arm) -> str:
    if arm.cost is None or plain.cost is None:
        return ""
    parts = []
    growth = arm.cost.parameters / plain.cost.parameters - 1 if plain.cost.parameters else math.nan
    if math.isfinite(growth):
        share = f"{abs(100 * growth):.0f}%" if abs(growth) >= 0.01 else "less than 1%"
        parts.append(f"{share} {'more' if growth >= 0 else 'fewer'} parameters")
    ours, other = (cost.latency_ms.get("1", (math.nan, math.nan))[0] for cost in (arm.cost, plain.cost))
    if math.isfinite(ours) and math.isfinite(other) and other > 0:
        parts.append(f"{ours / other:.1f} times the plain latency at batch 1")
    return f"{arm.title} costs {' and '.join(parts)}." if parts else ""


def _with_difference(summary: Summary) -> str:
    return f"{summary.arm.title} ({signed(summary.plain.mean)} points)" if summary.plain else summary.arm.title


def limits(run: Run, summaries: list[Summary]) -> list[str]:
    """What this run cannot tell."""
    lines = []
    count = len(run.seeds)
    if count == 1:
        lines.append("One seed: nothing here separates an effect from the luck of one initialisation and data order.")
    else:
        lines.append(
            f"{count} seeds: each interval rests on at most {count} paired differences, assumes they are roughly "
            f"normal, and is wide for that reason; a small true effect will often go unseen."
        )
    comparisons = sum(
        interval is not None and interval.low is not None
        for summary in summaries
        for interval in (summary.plain, summary.control)
    )
    if comparisons > 1:
        chance = 100 * (1 - LEVEL**comparisons)
        lines.append(
            f"{comparisons} intervals at {100 * LEVEL:.0f}% each, without correction: if no arm differed from another "
            f"and the intervals were independent, at least one would still exclude zero with a chance of {chance:.0f}%."
        )
    settings = run.settings
    shared = [f"one data set ({run.dataset.get('name', 'unnamed')})"]
    shared += [f"one {word} ({settings[key]})" for key, word in _SHARED if settings.get(key) is not None]
    lines.append(
        f"{join_words(shared)[:1].upper()}{join_words(shared)[1:]}: nothing was tuned per arm; another setting "
        f"may order the arms differently."
    )
    lines.append(
        "All arms train from random weights by one recipe: AdamW, weight decay 0.05 on weights, a warm-up over a tenth "
        "of the steps, then a cosine; gates and other single numbers learn ten times as fast."
    )
    images, step = run.dataset.get("val"), ""
    if isinstance(images, int) and images and run.task is CLASSIFICATION:
        step = f" One of the {images} images is {100 / images:.2g} points."
    lines.append(
        f"The {run.task.score} is that of the last epoch on the validation images; no separate test set was held "
        f"out.{step}"
    )
    lines.append(
        "Seeds vary initialisation, data order and augmentation. The same validation images serve every seed, so the "
        "intervals do not cover the choice of images."
    )
    if any(summary.arm.cost is not None for summary in summaries):
        lines.append("Latency and memory were measured on the hardware named here and do not carry over to another.")
    return lines


_SHARED = (("backbone", "backbone"), ("lr", "learning rate"), ("epochs", "number of epochs"))
