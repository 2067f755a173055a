"""The machine code of every kernel, compiled for GPUs that need not be there."""

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled")

from tests.machine_code import cases, faulty_cases
from tests.machine_code.compile import BUDGETS_PATH, compiled_elsewhere
from tests.machine_code.compiler import MachineCode
from tests.machine_code.expectations import problems
from tests.machine_code.gpus import GPUS


def wrong_with(capability, compiled):
    """Returns what is wrong with compiled kernels, by name; nothing where all is well."""
    counted = json.loads(BUDGETS_PATH.read_text(encoding="utf-8"))[str(capability)]
    expected = cases.cases(capability)
    wrong = {}
    for name, content in compiled.items():
        lines = [content["error"]] if "error" in content else []
        if not lines:
            lines = problems(MachineCode.from_json(content), expected[name], counted[name])
        # The interpreter, whose largest of two numbers is NaN if one is, cannot tell whether a GPU's is.
        if name in ("fold_keys-relu-64", "read_state-relu-64") and content.get("nan_hiding"):
            lines.append(f"{content['nan_hiding']} maxima lose NaN")
        if lines:
            wrong[name] = lines
    return wrong


@pytest.mark.parametrize("capability", GPUS)
def test_every_kernel_has_a_case_and_every_case_a_budget(capability):
    counted = json.loads(BUDGETS_PATH.read_text(encoding="utf-8"))[str(capability)]
    names = set(cases.cases(capability))
    assert names == set(counted)
    assert {name.partition("-")[0] for name in names} == set(cases.PRODUCTS)


def test_one_kernel_is_as_it_should_be():
    """The share of the next test, which takes over a minute, that is always run."""
    compiled = compiled_elsewhere(90, names=["read_state-relu-64"])
    assert list(compiled) == ["read_state-relu-64"]
    wrong = wrong_with(90, compiled)
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.cuda
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", GPUS)
def test_every_kernel_is_as_it_should_be(capability):
    compiled = compiled_elsewhere(capability)
    assert set(compiled) == set(cases.cases(capability))
    wrong = wrong_with(capability, compiled)
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.cuda
@pytest.mark.parametrize("capability", [80])
def test_each_fault_is_told_by_its_name(capability):
    compiled = compiled_elsewhere(capability, "tests.machine_code.faulty_cases")
    expected = faulty_cases.cases(capability)
    told = {name: problems(MachineCode.from_json(content), expected[name], None) for name, content in compiled.items()}
    words = {
        "spills": "of stack",
        "too much shared memory": "bytes of shared memory",
        "atomics": "atomic instructions",
        "no tensor cores": "tensor-core instructions",
        "not pipelined": "copied asynchronously",
    }
    assert not told["sound"]
    for name, word in words.items():
        assert any(word in line for line in told[name]), (name, told[name])


@pytest.mark.cuda
def test_longer_code_and_other_tensor_work_are_told():
    ((name, content),) = compiled_elsewhere(80, names=["merge_states-positive-64"]).items()
    code, case = MachineCode.from_json(content), cases.cases(80)[name]
    counted = {"tensor_instructions": 1, "hot_loop": 1, "instructions": 1}
    assert len(problems(code, case, counted)) == 3
