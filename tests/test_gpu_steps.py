"""The steps of tests/gpu in their small form, on a CPU, and what they are made of."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from tests import digits
from tests.gpu import cases
from tests.gpu.check import CASES, SMALL
from tests.gpu.step import FORMS, find_largest

RUN = Path(__file__).parent / "gpu" / "run.sh"


def run(*words, out):
    """(exit status, what was said) of tests/gpu/run.sh."""
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    done = subprocess.run([RUN, *words], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def rows(table):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]


def test_check_passes_on_a_cpu_and_has_every_case(tmp_path):
    status, said = run("--small", "check", out=tmp_path)
    table = (tmp_path / "check.md").read_text()
    found = rows(table)[2:]
    assert status == 0, said
    assert {row[0] for row in found} == set(SMALL) <= set(CASES)
    passed = [row for row in found if row[-1]]
    assert len(passed) > 30 and {row[-1] for row in passed} == {"PASS"}
    assert table.endswith(f"\n{len(passed)} PASS, 0 FAIL.\n") and table in said
    (resumed,) = (row for row in found if row[1].startswith("resumed"))
    assert float(resumed[2]) == 0


def test_step_times_each_form_and_names_the_fastest(tmp_path):
    status, said = run("--small", "step", out=tmp_path)
    assert status == 0, said
    tables = (tmp_path / "step.md").read_text().split("\n## ")[1:]
    assert [table.split("\n")[0].rpartition(", ")[2] for table in tables] == [
        "TF32",
        "amp_bf16",
        "The fastest",
    ]
    for table in tables[:2]:
        variants = {row[0]: row for row in rows(table)[2:]}
        assert list(variants) == ["open_clip", *FORMS, "images alone"]
        assert all(row[1].endswith(" ms") and row[3].endswith(" ms") for row in variants.values())
        assert variants["open_clip"][6] == "13" and "\nFastest: " in table
    assert [row[0] for row in rows(tables[2])[2:]] == list(
        FORMS
    ) and "The fastest form over all is: " in tables[2]


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 1000])
def test_the_largest_batch_is_found_to_a_tenth(limit):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = find_largest(fits, 8)
    assert found <= limit <= found + max(1, found // 10) and len(tried) < 16


def test_a_case_that_fails_or_is_not_a_number_fails_alone(tmp_path):
    def broken(case):
        case.check("a figure", float("nan"), 1)
        raise RuntimeError("a bug")

    def good(case):
        case.check("a figure", 1, 1)

    (tmp_path / f"{cases.MODEL}.json").write_text(json.dumps(digits.MODEL))
    cases.do({"broken": broken, "good": good}, Namespace(work=tmp_path, device="cpu", small=True))
    verdicts = {
        name: [json.loads(line)[-1] for line in (tmp_path / f"{name}.rows").read_text().splitlines()]
        for name in ("broken", "good")
    }
    assert verdicts == {"broken": ["FAIL", "FAIL", ""], "good": ["PASS", ""]}


def test_an_unknown_step_is_named_and_gives_status_1(tmp_path):
    status, said = run("--small", "nothing", out=tmp_path)
    assert status == 1 and "nothing ended with status 1" in said
    status, said = run(out=tmp_path)
    assert status == 2 and "STEP" in said
