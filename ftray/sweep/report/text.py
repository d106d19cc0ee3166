"""A study in words."""

from collections import Counter

from ftray.config.space import point_text
from ftray.sweep.study import Study
from ftray.sweep.trials import SweepRun


def describe_plan(study: Study) -> str:
    search = study.config.search
    count = "as many trials as the budget allows" if study.num_planned is None else f"{study.num_planned} trials"
    seeds = f" of {len(study.config.seeds)} seeds" if len(study.config.seeds) > 1 else ""
    return f"{count}{seeds}, {search.algorithm} search, scheduler {search.scheduler}"


def describe_end(study: Study, run: SweepRun) -> str:
    if run.outcome is None and study.until_step is not None:
        return f"{run.name}  step {run.last.step if run.last is not None else 0}, a generation's end"
    value = "" if run.value is None else f"  {study.config.search.metric} {run.value:.4f}"
    return f"{run.name}  {run.outcome or 'interrupted'}{value}{f'  {run.message}' if run.message else ''}"


def describe_moves(study: Study, name: str) -> str | None:
    """The way of a population's weights into this member."""
    if not (moves := study.history(name)):
        return None
    return "whose weights come by " + ", then ".join(
        f"{move.run} from {move.source} at step {move.step}, on with learning rate {move.rate:.4g}" for move in moves
    )


def describe_state(study: Study) -> str:
    counts = Counter(trial.status for trial in study.trials)
    return ", ".join(f"{count} {status}" for status, count in counts.items()) or "no trial had begun"


def conclusion(study: Study) -> str:
    """The choice and how sure it is, in a sentence."""
    best, metric = study.best, study.config.search.metric
    if best is None:
        return f"no trial has finished yet ({describe_state(study)})"
    choice = point_text(best.latest)
    text = f"best: {best.name} ({choice}), {metric} {best.mean:.4f}"
    if (history := describe_moves(study, best.runs[0].name)) is not None:
        text += f", {history}"
    others = [trial for trial in study.ranked[1:] if trial.is_finished]
    if not others:
        return f"{text}; it is the only one that finished"
    next_best = others[0]
    assert best.mean is not None
    assert next_best.mean is not None
    gap = abs(next_best.mean - best.mean)
    text += f", {gap:.4f} ahead of {next_best.name} ({point_text(next_best.latest)})"
    if study.config.search.scheduler == "pbt":
        return f"{text}; members of one population are no repeats of each other, so that is no measure of chance"
    if best.half_interval is None or next_best.half_interval is None:
        return f"{text}; with one seed it is not known whether that is more than chance: give `seeds: 3`"
    sure = gap > best.half_interval + next_best.half_interval
    noise = "more" if sure else "not more"
    return f"{text}, which is {noise} than their 95% intervals over {len(study.config.seeds)} seeds"
