"""A session of Ray's of our own, on a machine that is too busy to start it in Ray's time."""

import pytest

from ftray.cluster import session
from ftray.errors import UserError

BUSY = Exception("The current node timed out during startup. This could happen because some of the raylet failed ...")


@pytest.fixture
def tries(monkeypatch) -> list[str]:
    made = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "shutdown", lambda: made.append("shutdown"))
    return made


def answering(monkeypatch, tries, *answers):
    waiting = list(answers)

    def init(**_):
        tries.append("init")
        if (answer := waiting.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(session.ray, "init", init)


def test_it_is_tried_once_more(monkeypatch, tries):
    answering(monkeypatch, tries, BUSY, None)
    assert session.start_ray() is False
    assert tries == ["init", "shutdown", "init"]


def test_then_the_machine_is_said_to_be_busy(monkeypatch, tries):
    answering(monkeypatch, tries, BUSY, BUSY)
    with pytest.raises(UserError, match=r"not start within 30 s, twice: this machine is busy \(load \d+ on \d+ cores"):
        session.start_ray()


def test_another_failure_is_not_tried_again(monkeypatch, tries):
    answering(monkeypatch, tries, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        session.start_ray()
    assert tries == ["init"]


def test_of_a_message_of_rays_the_first_sentence_is_shown(capsys):
    paragraph = (
        "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the "
        "problem, check the logs for the dead worker. RayTask ID: 1f. Worker ID: 2a.\n"
    )
    session.print_message_of_ray({"lines": [paragraph], "pid": "raylet", "is_err": False})
    out, err = capsys.readouterr()
    assert out == ""  # no line of a table, nor of what `--json` prints
    assert err == "Ray: A worker died or was killed while executing a task by an unexpected system error.\n"
