"""`jobs/gpu_check.py`: the order of worth, the time given, what is kept, and going on later."""

import json

import pytest
from jobs_modules import job

gpu_check = job("gpu_check")
Record = gpu_check.Record
RECORDS = [
    Record("first", "worth most", 60, ["first.py"]),
    Record("long", "takes long", 300, ["long.py"]),
    Record("short", "worth least", 30, ["short.py"], tiny=["short.py", "tiny"]),
]


class Machine:
    """Programs take what their record says; those in `failing` fail."""

    def __init__(self, *failing: str):
        self.failing = set(failing)
        self.ran: list[list[str]] = []
        self.limits: list[float] = []
        self.clock = 0.0

    def run(self, command: list[str], seconds: float) -> tuple[int, str]:
        self.ran.append(command[1:])
        self.limits.append(seconds)
        self.clock += next(record.seconds for record in RECORDS if record.name == command[1].removesuffix(".py"))
        failed = command[1] in self.failing
        return (1, "Traceback: broken") if failed else (0, 'loading\n{"tokens_per_s": 7.0}')

    def now(self) -> float:
        return self.clock


def go(machine: Machine, path, *, seconds: float = 480, dry_run: bool = False) -> dict:
    how = {"dry_run": dry_run, "path": path, "run": machine.run, "now": machine.now}
    return gpu_check.run_records(RECORDS, seconds=seconds, **how)


def test_what_does_not_end_in_time_is_left_for_later(tmp_path):
    machine, path = Machine(), tmp_path / "gpu.json"
    assert list(go(machine, path, seconds=200)) == ["first", "short"]
    assert machine.ran == [["first.py"], ["short.py"]]
    assert machine.limits[1] == 60  # twice what it needs, while there is so much
    kept = json.loads(path.read_text())
    assert kept["records"]["first"]["figure"] == {"tokens_per_s": 7.0}
    assert {"hardware", "versions", "date"} <= kept.keys()


def test_a_later_call_goes_on_with_what_is_missing_or_failed(tmp_path):
    path = tmp_path / "gpu.json"
    first = go(Machine("first.py"), path, seconds=200)
    assert first["first"]["status"] == "failed"
    assert "broken" in first["first"]["output"]
    machine = Machine()
    assert {r["status"] for r in go(machine, path).values()} == {"passed"}
    assert machine.ran == [["first.py"], ["long.py"]]


def test_a_dry_run_has_its_own_sizes_and_writes_nothing(tmp_path):
    machine = Machine()
    go(machine, None, dry_run=True)
    assert machine.ran == [["first.py"], ["long.py"], ["short.py", "tiny"]]
    assert list(tmp_path.iterdir()) == []


def test_a_test_that_was_skipped_did_not_pass():
    record = gpu_check.test("test_x", "something", 10)
    outcome = gpu_check.run_record(record, dry_run=False, run=lambda *_: (0, "1 skipped in 0.10s"), left=100)
    assert outcome["status"] == "skipped"
    outcome = gpu_check.run_record(record, dry_run=False, run=lambda *_: (0, "1 passed in 0.10s"), left=100)
    assert outcome["status"] == "passed"


def test_a_package_that_is_missing_is_told():
    record = Record("x", "something", 10, ["x.py"], needs=("no_such_package",))
    outcome = gpu_check.run_record(record, dry_run=False, run=lambda *_: pytest.fail("run"), left=100)
    assert (outcome["status"], outcome["why"]) == ("skipped", "needs no_such_package")


def test_all_records_fit_the_programs_and_tests_that_exist():
    for record in gpu_check.RECORDS:
        program, _, test = next(part for part in record.command if part.endswith(".py") or "::" in part).partition("::")
        text = (gpu_check.ROOT / program).read_text()
        assert not test or f"def {test}(" in text, record.name
    assert sum(record.seconds for record in gpu_check.RECORDS[:6]) < 8 * 60
