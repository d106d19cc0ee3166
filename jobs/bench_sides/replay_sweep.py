"""`python jobs/bench_sides/replay_sweep.py`: 256 trials on 64 devices, as a simulation from measured step costs.

The costs are those of `python jobs/bench.py sweep` on this machine: what a process needs before its first step, a step
of one trial alone, a step of a group. Everything else is assumed: devices like this machine, a step of a group that
grows evenly with its members, and losses that fall as 1 / step to a floor of their own. Both sides run the same trials
under the same ASHA; what differs is who shares a device. As in `ftray sweep`, no group takes what others could.
"""

import argparse
import heapq
import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ftray.sweep.search.schedulers import Arrival, Asha

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
TRIALS, DEVICES, SLOTS = 256, 64, 8
STEPS, EVALUATE_EVERY, REDUCTION = 240, 8, 3


@dataclass(frozen=True)
class Costs:
    start_s: float  # until the first step of a process group
    alone_s: float  # a step of one trial that has the device for itself
    group_s: float  # a step of SLOTS trials

    def step_s(self, members: int) -> float:
        """Measured at 1 and at SLOTS members, on a line between."""
        return self.alone_s + (self.group_s - self.alone_s) * (members - 1) / (SLOTS - 1)


@dataclass
class Trial:
    number: int
    floor: float
    step: int = 0

    def loss(self, chance: random.Random) -> float:
        return self.floor + 1 / self.step + chance.gauss(0, 0.01)


@dataclass
class Outcome:
    makespan_s: float = 0.0
    steps: int = 0
    finished: int = 0
    running: list[tuple[float, int]] = field(default_factory=list)  # (time, trials that train)


def replay(costs: Costs, *, slots: int, asha: bool, seed: int = 0) -> Outcome:
    """`slots`: trials that share a device; 1 starts a process for every trial."""
    chance = random.Random(seed)
    waiting = [Trial(number, chance.random()) for number in reversed(range(TRIALS))]
    scheduler = Asha(grace_steps=EVALUATE_EVERY, reduction_factor=REDUCTION)
    outcome = Outcome()
    members: list[list[Trial]] = [[] for _ in range(DEVICES)]
    events = [(costs.start_s, device) for device in range(DEVICES)]
    while events:
        now, device = heapq.heappop(events)
        group = members[device]
        for trial in group:  # a step of all of them ends here
            trial.step += 1
            outcome.steps += 1
            outcome.finished += trial.step == STEPS
        due = [trial for trial in group if asha and trial.step % EVALUATE_EVERY == 0]
        arrivals = {trial.number: Arrival(str(trial.number), trial.step, trial.loss(chance)) for trial in due}
        together = list(arrivals.values())
        stopped = [a.trial for a in together if not scheduler.goes_on(a, beside=[b for b in together if b is not a])]
        group[:] = [trial for trial in group if str(trial.number) not in stopped and trial.step < STEPS]
        started = 0
        while waiting and len(group) < slots:
            group.append(waiting.pop())
            started += 1
        # A group is there already when a trial joins it; a trial by itself starts its own processes.
        extra = costs.start_s if slots == 1 and started and now > costs.start_s else 0.0
        if group:
            heapq.heappush(events, (now + extra + costs.step_s(len(group)), device))
        outcome.makespan_s = max(outcome.makespan_s, now)
        outcome.running.append((now, sum(map(len, members))))
    return outcome


def measured(path: Path) -> Costs:
    sides = json.loads(path.read_text())["median"]
    alone, group = sides["sweep_tune_one"], sides["sweep_ftray"]
    return Costs(start_s=alone["start_s"], alone_s=alone["step_s"], group_s=group["step_s"] * SLOTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=BENCHMARKS / "sweep.json")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "sweep_replay.json")
    chosen = parser.parse_args()
    costs = measured(chosen.measured)
    found = {
        f"{'groups' if slots > 1 else 'apart'}{', asha' if asha else ''}": replay(costs, slots=slots, asha=asha)
        for asha in (False, True)
        for slots in (1, min(SLOTS, math.ceil(TRIALS / DEVICES)))
    }
    report = {
        "what": "a simulation from measured step costs, not a measurement",
        "trials": TRIALS,
        "devices": DEVICES,
        "steps of a whole trial": STEPS,
        "measured costs": asdict(costs),
        "makespan_s": {name: round(outcome.makespan_s, 1) for name, outcome in found.items()},
        "finished": {name: outcome.finished for name, outcome in found.items()},
        "steps": {name: outcome.steps for name, outcome in found.items()},
        "apart / groups": round(found["apart"].makespan_s / found["groups"].makespan_s, 2),
        "apart / groups, asha": round(found["apart, asha"].makespan_s / found["groups, asha"].makespan_s, 2),
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    chosen.out.with_suffix(".svg").write_text(plot(found))
    print(json.dumps(report, indent=1))


def plot(found: dict[str, Outcome]) -> str:
    from matplotlib.figure import Figure

    from ftray.tracking.curves import svg

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, outcome in found.items():
        axes.step([at / 60 for at, _ in outcome.running], [count for _, count in outcome.running], label=name, lw=1.4)
    axes.set_title(f"Simulation from measured step costs: {TRIALS} trials, {DEVICES} devices", fontsize=10)
    axes.set_xlabel("minutes")
    axes.set_ylabel("trials that train")
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


if __name__ == "__main__":
    main()
