import os
import sys
import time

import pytest

from protlm.workflows.prep import mmseqs
from protlm.workflows.prep.mmseqs import _watched

PROGRAM = "import os, sys, time; print(os.getpid()); print('two', file=sys.stderr); time.sleep({}); sys.exit(3)"


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(mmseqs, "_SECONDS_BETWEEN_LOOKS", 0.05)


def test_a_program_reports_that_it_is_at_work_and_its_status_and_words_are_returned():
    reports = []
    status, told, errors = _watched([sys.executable, "-c", PROGRAM.format(0.3)], reports.append)
    assert (status, errors) == (3, "two\n")
    assert told.strip().isdecimal()
    assert len(reports) > 1
    assert set(reports) == {0}


def test_the_program_ends_with_the_command(tmp_path):
    def interrupt(_):
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    words = f"import os; open('{tmp_path}/pid', 'w').write(str(os.getpid())); import time; time.sleep(100)"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _watched([sys.executable, "-c", words], interrupt)
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
