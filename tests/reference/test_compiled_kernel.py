"""The compiled kernel beyond its values under `auto`: its variants, threads, units and memory, what it shares."""

import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path

import pytest
import torch

from protlm.gpu_check.tolerances import NAMES
from protlm.ops import (
    backends,
    compiled,
    draw_projection,
    favor_attention,
    favor_cpp,
    favor_torch,
    operators,
    reference,
)
from protlm.ops.inputs import AttentionInputs
from tests.conftest import TOLERANCE, relative_error
from tests.reference.cases import (
    MIXED,
    Case,
    assert_equal,
    assert_op_equals_twin,
    computed_of,
    draw,
    expected_of,
    maps_on,
)

SOURCES = Path(favor_cpp.__file__).parent / "cpp"
COVERED = maps_on("cpp")
needs_kernel = pytest.mark.skipif(compiled.why_not() is not None, reason=str(compiled.why_not()))

RUNNABLE = {"avx512": ("portable", "avx2", "avx512"), "avx2": ("portable", "avx2"), "portable": ("portable",)}[
    compiled.best_kernel() if compiled.why_not() is None else "portable"
]
INSTRUCTION_SETS = {"portable": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx512dq", "-mfma"]}
LAYOUTS = {
    "rows": {"length": 100, "head_dim": 24},
    "long rows": {"length": 1000, "head_dim": 64, "num_features": 256, "batch": 1, "heads": 1},
    "padding": {"length": 257, "padding": "some", "head_dim": 60, "is_strided": True},
    "segments": {"segments": MIXED, "num_features": 130},
    "masked segments": {"segments": MIXED, "padding": "some", "head_dim": 17},
    "wide": {"length": 63, "head_dim": 256, "num_features": 33},
    "narrow": {"length": 63, "head_dim": 1, "num_features": 1},
    "many features": {"length": 70, "head_dim": 8, "num_features": 1000},
}


def assert_kernel_equals_twin(monkeypatch):
    unit_sizes = (favor_cpp._UNIT_TOKENS, 70)
    for options, feature_map, causal in product(LAYOUTS.values(), COVERED, (False, True)):
        case = Case(feature_map=feature_map, causal=causal, **options)
        arguments = draw(case, torch.float32)
        expected = expected_of(*arguments)
        for unit_tokens in unit_sizes:
            monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", unit_tokens)
            actual = computed_of(arguments, "cpp")
            told = f"{case}, units of {unit_tokens}"
            assert_equal(actual, expected, TOLERANCE[torch.float32], told, arguments[-1]["feature_map"])


@needs_kernel
@pytest.mark.parametrize("kernel", ["portable", "avx2", "avx512"])
def test_every_kernel_that_this_machine_can_run_equals_the_float64_twin(kernel, monkeypatch):
    if kernel not in RUNNABLE:
        pytest.skip(f"this machine cannot run the {kernel} kernel")
    monkeypatch.setattr(compiled, "best_kernel", lambda: kernel)
    assert_kernel_equals_twin(monkeypatch)


@pytest.fixture
def _looked_for_anew(monkeypatch):
    """Lets the test look for the library as a new process does; what was found before stays for the other tests."""
    monkeypatch.setattr(compiled, "_load", functools.cache(compiled._load.__wrapped__))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86-64")
@pytest.mark.usefixtures("_looked_for_anew")
def test_vectors_of_avx512_taken_apart_for_avx2_equal_the_float64_twin(tmp_path, monkeypatch):
    flags = ["-O2", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-mavx2", "-mfma", "-Wno-psabi"]
    library = tmp_path / "favor.so"
    sources = [str(SOURCES / name) for name in ("favor.cpp", "favor_avx512.cpp")]
    subprocess.run(["g++", *flags, *sources, "-o", str(library)], check=True)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(library)}))
    monkeypatch.setattr(compiled, "best_kernel", lambda: "avx512")
    monkeypatch.setattr(compiled, "functions", functools.cache(compiled.functions.__wrapped__))
    assert_kernel_equals_twin(monkeypatch)


@needs_kernel
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("feature_map", ["positive", "relu"])
def test_the_number_of_threads_changes_no_bit(feature_map, causal, monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 64)
    for options in ({"length": 700, "heads": 1, "batch": 1}, {"segments": MIXED, "heads": 3}):
        arguments = draw(Case(feature_map=feature_map, causal=causal, head_dim=16, **options), torch.float32)
        results = []
        for num_threads in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
            results.append(computed_of(arguments, "cpp"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_tokens_behind_a_causal_segment_change_no_bit_wherever_it_is_cut(monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 64)
    q, k, v, _, projection, options = draw(Case(length=400, batch=1, causal=True, head_dim=16), torch.float32)
    whole = favor_attention(q, k, v, projection, backend="cpp", **options)
    for length in (64, 65, 150, 399):
        part = favor_attention(*(x[:, :, :length] for x in (q, k, v)), projection, backend="cpp", **options)
        assert torch.equal(part, whole[:, :, :length]), length


@needs_kernel
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("rise", [50.0, 100.0, -100.0])
def test_exponents_far_from_every_guess_equal_the_float64_twin(rise, causal, monkeypatch):
    monkeypatch.setattr(favor_cpp, "_UNIT_TOKENS", 150)
    q, k, v, out_grad, projection, options = draw(Case(length=400, head_dim=16, causal=causal), torch.float32)
    # Keys along one row of the projection, the larger the later, or the other way round.
    direction = projection[:, 0] / projection[:, 0].norm(dim=-1, keepdim=True)
    sizes = torch.linspace(0, abs(rise), 400) if rise > 0 else torch.linspace(abs(rise), 0, 400)
    k = 0.1 * k + sizes.view(1, 1, -1, 1).sqrt() * direction.view(1, 2, 1, 16)
    q = q * 5
    arguments = (q, k, v, out_grad, projection, options)
    expected, torch_actual = expected_of(*arguments), computed_of(arguments, "torch")
    for name, actual, wanted, other in zip(NAMES, computed_of(arguments, "cpp"), expected, torch_actual, strict=True):
        assert relative_error(actual, wanted) <= max(TOLERANCE[torch.float32], 3 * relative_error(other, wanted)), name


@needs_kernel
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_causal_keys_and_queries_at_the_edge_of_both_ranges_equal_the_float64_twin(size):
    head_dim = 128
    projection = draw_projection(64, head_dim, generator=torch.Generator().manual_seed(0))
    direction = projection[0] / projection[0].norm()
    q, k = (length * direction.expand(1, 1, 64, head_dim).clone() for length in (15.2, 15.9))
    k[:, :, 0] = 0
    v, out_grad = (size * torch.randn(1, 1, 64, head_dim) for _ in range(2))
    arguments = (q, k, v, out_grad, projection, {"causal": True})
    actual, expected = computed_of(arguments, "cpp"), expected_of(*arguments)
    for index in (0, 3):
        assert relative_error(actual[index], expected[index]) < TOLERANCE[torch.float32]
    # All keys but one are the same: dq and dk are what is left of terms that cancel.
    assert all(gradient.isfinite().all() for gradient in actual[1:3])


@needs_kernel
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_rows_of_very_different_length_equal_the_float64_twin(causal):
    generator = torch.Generator().manual_seed(396315346)
    q, k, v, out_grad = (torch.randn(1, 2, 97, 16, generator=generator) for _ in range(4))
    projection = draw_projection(17, 16, num_heads=2, generator=generator)
    projection = projection * 10 ** (torch.rand(17, 1, generator=generator) * 4 - 2)
    arguments = (q, k, v, out_grad, projection, {"causal": causal})
    assert_equal(computed_of(arguments, "cpp"), expected_of(*arguments), 2 * TOLERANCE[torch.float32])


@needs_kernel
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_thousands_of_features_lose_no_digit(causal):
    case = Case(length=200, head_dim=64, num_features=4096, feature_map="hyperbolic", causal=causal, batch=1, heads=1)
    assert_op_equals_twin(case, torch.float32)


@needs_kernel
@pytest.mark.parametrize("feature_map", COVERED)
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_nan_in_a_real_token_reaches_its_own_gradient(feature_map, causal):
    for name in (0, 1):
        arguments = list(draw(Case(length=60, feature_map=feature_map, causal=causal), torch.float32))
        arguments[name][:, :, 40, 3] = torch.nan
        actual = computed_of(tuple(arguments), "cpp")
        assert actual[1 + name][:, :, 40].isnan().any()


@needs_kernel
def test_strided_inputs_are_read_where_they_lie():
    arguments = draw(Case(is_strided=True), torch.float32)
    inputs = AttentionInputs(*arguments[:3], arguments[4])
    assert not inputs.q.is_contiguous()
    call = favor_cpp._Run(inputs)._call
    for name in "qkv":
        assert getattr(call, name).data == getattr(inputs, name).data_ptr()
    transposed = torch.randn(2, 2, 8, 100).transpose(2, 3)
    actual = favor_attention(transposed, transposed, transposed, arguments[4], backend="cpp")
    expected = reference.favor_attention(*[transposed.double()] * 3, arguments[4])
    assert relative_error(actual, expected) < TOLERANCE[torch.float32]


@needs_kernel
def test_memory_beside_the_results_does_not_grow_with_short_sequences_and_hardly_with_long_ones(monkeypatch):
    sizes = []

    def remember(size, empty=torch.empty, **options):
        sizes.append(size)
        return empty(size, **options)

    for length in (256, 2048, 32768):
        q = torch.zeros(1, 1, length, 64)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", remember)
            favor_attention(q, q, q, torch.zeros(256, 64), backend="cpp")
    assert sizes[0] == sizes[1]
    # 16 states of (features, head_dim + 2) for 32,768 tokens: no features.
    assert sizes[2] - sizes[1] <= 17 * 256 * (64 + 2)


@needs_kernel
def test_denormal_numbers_stay_what_they_are():
    q = torch.randn(1, 1, 200, 16)
    favor_attention(q, q, q, draw_projection(16, 16), backend="cpp")
    tiny = torch.full((1000,), 1e-40)
    assert torch.equal(tiny * 1.0, tiny)
    assert (tiny * 0.5 > 0).all()
    assert float.fromhex("0x1p-1060") * 1.0 > 0


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")
def test_the_kernel_shares_the_openmp_of_torch():
    # In a process of its own: other packages bring an OpenMP too.
    program = "from protlm.ops import compiled; print(compiled.why_not()); print(open('/proc/self/maps').read())"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    mapped = {line.split()[-1] for line in shown.splitlines() if "libgomp" in line}
    assert any("_favor" in line for line in shown.splitlines())
    assert len(mapped) <= 1


@needs_kernel
def test_what_the_kernel_does_not_cover_is_left_to_torch():
    projection = draw_projection(16, 8)
    for dtype, feature_map in ((torch.float64, "positive"), (torch.bfloat16, "trig"), (torch.float32, "trig")):
        q, k, v = (torch.randn(1, 2, 20, 8).to(dtype) for _ in range(3))
        actual, expected = (
            favor_attention(q, k, v, projection, feature_map=feature_map, backend=name) for name in ("cpp", "torch")
        )
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("_looked_for_anew")
def test_a_kernel_that_was_not_built_is_told_and_left_out(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _: None)
    assert compiled.why_not().startswith("it was not built; install a C++17 compiler")
    assert backends()["cpp"].startswith("not available: it was not built")
    q = torch.randn(1, 2, 20, 8)
    projection = draw_projection(16, 8)
    actual = favor_attention(q, q, q, projection)
    assert torch.equal(actual, favor_attention(q, q, q, projection, backend="torch"))
    with pytest.raises(ValueError, match=r"^backend: expected one that was built, got 'cpp': it was not built"):
        favor_attention(q, q, q, projection, backend="cpp")


@pytest.mark.usefixtures("_looked_for_anew")
def test_a_library_that_cannot_be_loaded_is_told(monkeypatch, tmp_path):
    broken = tmp_path / f"_favor{sysconfig.get_config_var('EXT_SUFFIX')}"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda _: type("Spec", (), {"origin": str(broken)}))
    assert "cannot be loaded" in compiled.why_not()


class LongerCall(compiled.NearFarCall):
    _fields_ = (("added", compiled.Integer),)


@needs_kernel
@pytest.mark.usefixtures("_looked_for_anew")
@pytest.mark.parametrize("changed", ["version", "favor", "local", "near_far"])
def test_a_library_of_another_version_or_layout_is_refused(changed, monkeypatch):
    if changed == "version":
        monkeypatch.setattr(compiled, "_VERSION", -1)
    else:
        monkeypatch.setitem(compiled._CALLS, changed, LongerCall)
    assert compiled.why_not().endswith("is not of this version of protlm; install protlm again")


@needs_kernel
def test_auto_takes_the_kernel_for_float32_on_the_cpu():
    q = torch.zeros(1, 1, 4, 8)
    inputs = AttentionInputs(q, q, q, torch.zeros(4, 8))
    assert operators.backend_of("auto", inputs) is favor_cpp
    assert operators.backend_of("torch", inputs) is favor_torch
    doubles = AttentionInputs(q.double(), q.double(), q.double(), torch.zeros(4, 8))
    assert operators.backend_of("auto", doubles) is favor_torch


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", ["undefined", "address"])
@pytest.mark.parametrize("kernel", RUNNABLE)
def test_no_sanitizer_finds_a_fault_at_the_edges_of_the_range(kernel, sanitizer, tmp_path):
    flags = [
        *INSTRUCTION_SETS[kernel],
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-O1",
        "-g",
        "-std=c++17",
    ]
    library = tmp_path / "favor.so"
    sources = [str(SOURCES / name) for name in ("favor.cpp", f"favor_{kernel}.cpp")]
    build = ["g++", *flags, "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", *sources, "-o", str(library)]
    subprocess.run(build, check=True)
    # The address sanitizer has to be loaded before all else. Python keeps memory to its end, which is no leak of ours.
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    loaded = {"LD_PRELOAD": runtime.strip(), "ASAN_OPTIONS": "detect_leaks=0"} if sanitizer == "address" else {}
    program = [sys.executable, "-m", "tests.reference.sanitized_kernel", str(library), kernel]
    ended = subprocess.run(program, env=os.environ | loaded, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "no fault\n"), ended.stderr[-3000:]
