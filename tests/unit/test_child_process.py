"""A function in a process of its own: lines, result, errors; it ends when it is cancelled or dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from ftray.child_process import in_child_process
from ftray.config.data import DataConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.tokens import tokenize_source
from ftray.errors import FtrayError, UserError


def count_to(number, *, log, cancelled):
    for i in range(number):
        log(f"line {i}")
    return os.getpid(), number


def refuse(*, log, cancelled):
    raise UserError("key: value is refused")


def wait(*, log, cancelled):
    log("waits")
    assert cancelled.wait(60)
    raise CancelledError


def die(*, log, cancelled):
    os.kill(os.getpid(), signal.SIGKILL)


def test_it_logs_and_returns_from_another_process():
    lines: list[str] = []
    pid, number = in_child_process(count_to, 3, log=lines.append)
    assert (number, lines) == (3, ["line 0", "line 1", "line 2"])
    assert pid != os.getpid()


def test_its_error_is_raised_here():
    with pytest.raises(UserError, match="key: value is refused"):
        in_child_process(refuse, log=print)


def test_it_is_told_that_it_is_cancelled():
    cancelled = threading.Event()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        in_child_process(wait, log=lambda line: cancelled.set(), cancelled=cancelled)
    assert time.monotonic() - began < 30


def test_one_that_dies_is_said():
    with pytest.raises(FtrayError, match=r"the process that runs die ended with status -9"):
        in_child_process(die, log=print)


def test_a_kept_dataset_is_sent_by_its_directory(renderer, train_file, tmp_path):
    import pickle

    data = DataConfig(train=str(train_file))
    kept = tokenize_source("data.train", str(train_file), data, renderer, kept_in=tmp_path)
    sent = pickle.dumps(kept)
    assert len(sent) < 1000
    assert pickle.loads(sent).digest() == kept.digest()
    temporary = tokenize_source("data.train", str(train_file), data, renderer)
    back = pickle.loads(pickle.dumps(temporary))
    assert isinstance(back, TokenizedDataset)
    assert back.digest() == kept.digest()


@pytest.mark.parametrize(
    "module",
    ["ftray.train.launch", "ftray.sweep.launch", "ftray.pipeline.stages", "ftray.serve.app", "ftray.evaluate.scores"],
)
def test_drivers_ingress_and_ledger_do_without_torch(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
