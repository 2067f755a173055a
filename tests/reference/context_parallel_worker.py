"""One rank of a group of gloo processes: compares what the group computes with what one process does.

`main` runs in each process and writes what failed into a folder. A rank goes on after a failure: the others would wait
for it.
"""

import contextlib
import inspect
import json
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist

from protlm.gpu_check.tolerances import LOOSER_IN_TESTS, NAMES
from protlm.ops import (
    compiled,
    context_parallel,
    draw_projection,
    favor,
    favor_attention,
    favor_cpp,
    favor_torch,
    local_bounds,
)
from protlm.ops.inputs import AttentionInputs
from tests import process_groups
from tests.conftest import TOLERANCE
from tests.reference.cases import MAPS, Case, backends_of, computed_of, differentiate, draw

SEGMENTS = (0, 1, 3, 20, 21, 0, 60, 22, 1, 75, 0)
LAYOUTS = {
    "rows": Case(length=157, batch=3, padding="row"),
    "shared projection": Case(length=61, per_head=False, head_dim=5),
    "segments": Case(segments=SEGMENTS),
    "masked segments": Case(segments=SEGMENTS, padding="some", is_strided=True),
}


FAILURES = []


def expect(holds, told=""):
    """Notes the check that called, unless something holds."""
    if not holds:
        check = next(frame.function for frame in inspect.stack() if frame.function.startswith("check_"))
        FAILURES.append(f"rank {dist.get_rank()}: {check}: {told}")


def splits(length):
    """Returns ways to share out a length, as bounds of the ranks' parts; some ranks get nothing."""
    if dist.get_world_size() == 2:
        return [(0, length * 3 // 7, length), (0, 0, length)]
    return [(0, length // 5, length // 5, length), (0, 1, length * 2 // 3, length)]


def part_of(arguments, split, rank=None):
    """Returns a rank's part of the arguments of a case, by default that of this one."""
    *tensors, projection, options = arguments
    rank = dist.get_rank() if rank is None else rank
    start, stop = split[rank], split[rank + 1]
    options = dict(options)
    if "token_mask" in options:
        options["token_mask"] = options["token_mask"][:, start:stop]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = local_bounds(options["cu_seqlens"], start, stop)
    return *(tensor[:, :, start:stop] for tensor in tensors), projection, options


def computed_by_group(arguments, split, backend="torch", attention=favor_attention):
    """Returns output and gradients of this rank's part."""
    *tensors, options = part_of(arguments, split)
    return differentiate(attention, *tensors, {**options, "backend": backend, "process_group": dist.group.WORLD})


def assert_equals_one_process(arguments, split, told, backend="torch"):
    actual = computed_by_group(arguments, split, backend)
    bounds = split[dist.get_rank() : dist.get_rank() + 2]
    expect_part(actual, computed_of(arguments, backend), bounds, arguments[-1]["feature_map"], (told, backend, split))


def expect_part(actual, all_of_it, bounds, feature_map, told):
    """Expects output and gradients of one process between these tokens."""
    start, stop = bounds
    for name, part, whole in zip(NAMES, actual, all_of_it, strict=True):
        expected = whole[:, :, start:stop]
        expect((part.shape, part.dtype) == (expected.shape, expected.dtype), (name, told))
        # Relative to all of it: the part of a rank may hold only small numbers.
        bound = TOLERANCE[whole.dtype] * LOOSER_IN_TESTS.get((feature_map, name), 1) * whole.abs().max()
        difference = (part - expected).abs().max() if part.numel() else torch.zeros(())
        expect(difference <= bound, (name, told, difference.item(), bound.item()))


def drawn(case, dtype=torch.float64, **changes):
    return draw(Case(**{**vars(case), **changes}), dtype)


def check_output_and_gradients_equal_one_process():
    for number, (name, feature_map, causal) in enumerate(product(LAYOUTS, MAPS, (False, True))):
        arguments = drawn(LAYOUTS[name], feature_map=feature_map, causal=causal)
        # Each map meets either way to split, bidirectional and causal, in one layout or another.
        split = splits(arguments[0].shape[2])[number // 2 % 2]
        assert_equals_one_process(arguments, split, (name, feature_map, causal))


def check_every_backend_equals_itself_in_one_process():
    for number, (name, feature_map) in enumerate(product(LAYOUTS, MAPS)):
        arguments = drawn(LAYOUTS[name], torch.float32, feature_map=feature_map)
        split = splits(arguments[0].shape[2])[0]
        for backend in backends_of(feature_map, torch.float32):
            # Every other map cuts its segments into many units.
            with mock.patch.object(favor_cpp, "_UNIT_TOKENS", (17, favor_cpp._UNIT_TOKENS)[number % 2]):
                assert_equals_one_process(arguments, split, (name, feature_map), backend)


def check_cuda_kernels_equal_themselves_in_one_process():
    for feature_map in ("positive", "relu"):
        arguments = drawn(LAYOUTS["masked segments"], torch.float32, feature_map=feature_map)
        assert_equals_one_process(arguments, splits(sum(SEGMENTS))[0], feature_map, "triton")


def check_short_floats_equal_one_process():
    for causal in (False, True):
        arguments = drawn(LAYOUTS["rows"], torch.bfloat16, causal=causal)
        assert_equals_one_process(arguments, splits(157)[0], causal)


def check_a_part_that_is_all_padding_changes_nothing():
    for hidden in range(dist.get_world_size()):
        for causal in (False, True):
            for dtype, backend in ((torch.float64, "torch"), (torch.float32, "auto")):
                arguments = drawn(LAYOUTS["rows"], dtype, causal=causal)
                split = (0, 50, 100, 157) if dist.get_world_size() == 3 else (0, 50, 157)
                arguments[-1]["token_mask"][:, split[hidden] : split[hidden + 1]] = False
                assert_equals_one_process(arguments, split, ("hidden", hidden, causal), backend)


def check_keys_of_very_different_size_on_each_rank_equal_one_process():
    for feature_map in ("positive", "oprf", "relu"):
        for causal in (False, True):
            for factors in ((1e-3, 40.0, 8.0), (40.0, 8.0, 1e-3)):
                q, k, *rest = drawn(Case(length=90, a_axes="heads"), feature_map=feature_map, causal=causal)
                k = k * torch.tensor(factors, dtype=k.dtype).repeat_interleave(30).unsqueeze(-1)
                split = (0, 30, 60, 90) if dist.get_world_size() == 3 else (0, 30, 90)
                assert_equals_one_process((q, k, *rest), split, (feature_map, causal, factors))


def check_a_given_a_of_each_segment_is_used_across_ranks():
    for causal in (False, True):
        arguments = drawn(LAYOUTS["segments"], feature_map="oprf", a_axes="segments", causal=causal)
        assert_equals_one_process(arguments, splits(sum(SEGMENTS))[0], causal)


def check_what_is_exchanged_does_not_depend_on_the_length():
    rows = Case(length=1, batch=3, heads=2, num_features=5, head_dim=4)
    ranks = dist.get_world_size()
    state, references = 3 * 2 * 5 * (4 + 1), 3 * 2 * 5
    moments = 3 * 2 * (2 * 4 + 2)
    expected = {
        ("positive", False): [references, state, state],
        ("relu", False): [3 * 2, state, state],
        ("oprf", False): [moments, references, state, state],
        ("positive", True): [ranks * (state + references)] * 2,
        ("trig", True): [ranks * (3 * 2 * 10 * (4 + 1) + 3 * 2)] * 2,
    }
    for (feature_map, causal), numbers in expected.items():
        for length in (16, 333):
            case = replace(rows, length=length, feature_map=feature_map, causal=causal)
            expect_exchanged(case, splits(length)[0], numbers)


def check_what_is_exchanged_does_not_depend_on_the_number_of_segments():
    ranks = dist.get_world_size()
    segment, others = 2 * 5 * (4 + 1), ranks - 1
    edges, references, moments = 2 * ranks, 2 * 5, 2 * (2 * 4 + 2)
    expected = {
        ("positive", False): [edges, others * references, others * segment, edges, others * segment],
        ("oprf", False): [
            *(edges, others * moments), *(edges, others * references, others * segment), *(edges, others * segment),
        ],
        ("positive", True): [edges, ranks * (segment + references)] * 2,
    }  # fmt: skip
    for (feature_map, causal), numbers in expected.items():
        for segments in (SEGMENTS, SEGMENTS * 4):
            case = Case(
                segments=segments, heads=2, num_features=5, head_dim=4, feature_map=feature_map, causal=causal
            )  # fmt: skip
            expect_exchanged(case, splits(sum(segments))[0], numbers)


def expect_exchanged(case, split, numbers):
    arguments = draw(case, torch.float64)
    with Exchanged() as exchanged:
        computed_by_group(arguments, split)
    expect(exchanged.numbers == numbers, (case, exchanged.numbers, numbers))


class Exchanged:
    """Counts the elements that this rank receives in each collective; whatever it cannot count, it refuses."""

    COUNTED = ("allreduce", "allgather")
    OTHERS = (
        "broadcast", "reduce", "gather", "scatter", "alltoall", "alltoall_base", "reduce_scatter", "send", "recv",
        "recv_anysource", "allreduce_coalesced", "allgather_coalesced", "allgather_into_tensor_coalesced",
        "reduce_scatter_tensor_coalesced", "_allgather_base", "_reduce_scatter_base",
    )  # fmt: skip

    def __enter__(self):
        self.numbers = []
        self._patches = contextlib.ExitStack()
        for name in (*self.COUNTED, *self.OTHERS):
            original = getattr(dist.ProcessGroup, name)
            replaced = self._counting(original) if name in self.COUNTED else self._refusing(name)
            self._patches.enter_context(mock.patch.object(dist.ProcessGroup, name, replaced))
        return self

    def _counting(self, original):
        def counted(group, results, *arguments):
            flat = [x for result in results for x in (result if isinstance(result, list) else [result])]
            self.numbers.append(sum(x.numel() for x in flat))
            return original(group, results, *arguments)

        return counted

    def _refusing(self, name):
        def refused(*_):
            raise AssertionError(f"{name}: expected {self.COUNTED} only")

        return refused

    def __exit__(self, *_):
        self._patches.close()


def check_two_runs_give_the_same_bits():
    for causal in (False, True):
        for dtype in (torch.float32, torch.float64):
            arguments = drawn(LAYOUTS["masked segments"], dtype, causal=causal)
            split = splits(sum(SEGMENTS))[0]
            first, second = (computed_by_group(arguments, split, "auto") for _ in range(2))
            expect(all(map(torch.equal, first, second)), (causal, dtype))


def check_all_ranks_have_the_same_merged_state():
    for backend in (favor_torch, favor_cpp) if compiled.why_not() is None else (favor_torch,):
        q, k, v, _, projection, options = part_of(drawn(LAYOUTS["masked segments"], torch.float32), splits(203)[0])
        masks = options["token_mask"], options["cu_seqlens"]
        inputs = AttentionInputs(q, k, v, projection, *masks, group_name=dist.group.WORLD.group_name)
        states, references = context_parallel._merged_states(backend, inputs)
        # A segment that lies on one rank is that one's own affair.
        shared = context_parallel._edges(inputs)[:-1, 1]
        merged = torch.cat((states[shared].flatten(), references[shared].flatten()))
        of_ranks = [torch.empty_like(merged) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, merged)
        expect(all(torch.equal(x, merged) for x in of_ranks), backend)
        expect(merged.isfinite().all(), backend)


def check_nothing_later_changes_a_bit_of_an_earlier_causal_output():
    rank, length, first = dist.get_rank(), 150, 120
    for feature_map in MAPS:
        arguments = drawn(Case(length=length, batch=1), torch.float32, feature_map=feature_map, causal=True)
        split = splits(length)[0]
        plain = computed_by_group(arguments, split)[0]
        for content in (1e6, torch.nan):
            changed = [tensor.clone() for tensor in arguments[:3]]
            for tensor in changed:
                tensor[:, :, first:] *= content
            out = computed_by_group((*changed, *arguments[3:]), split)[0]
            kept = max(0, min(first, split[rank + 1]) - split[rank])
            expect(torch.equal(out[:, :, :kept], plain[:, :, :kept]), (feature_map, content))
            expect(kept == out.shape[2] or not torch.equal(out[:, :, kept:], plain[:, :, kept:]), feature_map)


def check_a_token_that_is_not_a_number_reaches_the_ranks_it_should():
    expect_nan_where_one_process_has_it("torch", torch.float64)
    if compiled.why_not() is None:
        expect_nan_where_one_process_has_it("cpp", torch.float32)


def check_cuda_a_token_that_is_not_a_number_reaches_the_ranks_it_should():
    expect_nan_where_one_process_has_it("triton", torch.float32)


def expect_nan_where_one_process_has_it(backend, dtype):
    for changed, causal in product("kv", (False, True)):
        arguments = list(draw(Case(length=20, causal=causal), dtype))
        place = "qkv".index(changed)
        arguments[place] = arguments[place].clone()
        arguments[place][0, :, 3] = torch.nan
        actual, whole = computed_by_group(arguments, splits(20)[0], backend)[0], computed_of(arguments, backend)[0]
        start, stop = splits(20)[0][dist.get_rank()], splits(20)[0][dist.get_rank() + 1]
        expect(torch.equal(actual.isnan(), whole[:, :, start:stop].isnan()), (backend, changed, causal))
        expect(
            actual[0, :, max(0, 3 - start) :].isnan().all() and actual[1].isfinite().all(), (backend, changed, causal)
        )


def check_compilers_leave_calls_in_a_group_alone():
    def loss(x):
        some = attention(x * 0.5, x.sin(), x, projection, process_group=dist.group.WORLD)
        return attention(some, x, x * 2, projection, process_group=dist.group.WORLD).square().sum()

    attention = inspect.unwrap(favor.favor_attention)
    projection = draw_projection(6, 4, generator=torch.Generator().manual_seed(0))
    # The second way to split leaves a rank without tokens, whose calls a compiler would leave out.
    for split in splits(20):
        start, stop = split[dist.get_rank()], split[dist.get_rank() + 1]
        whole = torch.randn(1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
        grads = []
        for function in (loss, torch.compile(loss, backend="aot_eager")):
            x = whole[:, :, start:stop].clone().requires_grad_()
            with Exchanged() as exchanged:
                function(x).backward()
            grads.append(x.grad)
            expect(len(exchanged.numbers) == 6, exchanged.numbers)
        expect(torch.allclose(*grads, rtol=1e-5, atol=1e-6), (split, grads))
    with contextlib.suppress(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(whole)
        expect(False, "a whole graph with a call in it")


def check_a_part_of_all_processes_is_a_group():
    if dist.get_world_size() > 2:
        group = dist.new_group([1, 2])
        for causal in (False, True):
            arguments = draw(Case(segments=SEGMENTS, causal=causal), torch.float64)
            rank = dist.get_rank() - 1
            if rank < 0:
                continue
            split = (0, 90, sum(SEGMENTS))
            *tensors, options = part_of(arguments, split, rank)
            options = {**options, "backend": "torch", "process_group": group}
            actual = differentiate(favor_attention, *tensors, options)
            expect_part(actual, computed_of(arguments, "torch"), split[rank : rank + 2], "positive", causal)


def check_ranks_may_take_different_backends():
    if compiled.why_not() is None:
        for feature_map in ("positive", "relu"):
            arguments = draw(Case(segments=SEGMENTS, padding="some", feature_map=feature_map), torch.float32)
            split = splits(sum(SEGMENTS))[0]
            actual = computed_by_group(arguments, split, ("cpp", "torch", "cpp")[dist.get_rank()])
            rank = dist.get_rank()
            expect_part(actual, computed_of(arguments, "torch"), split[rank : rank + 2], feature_map, "backends")


def check_a_group_of_one_is_one_process_and_strangers_are_told():
    alone = dist.new_group([0])
    *tensors, options = drawn(LAYOUTS["rows"], torch.float32)
    if dist.get_rank() == 0:
        actual = differentiate(favor_attention, *tensors, {**options, "process_group": alone})
        expect(all(map(torch.equal, actual, computed_of((*tensors, options)))))
        return
    told = told_by(lambda: favor_attention(*tensors[:3], tensors[4], **options, process_group=alone))
    expect(told.startswith("process_group: expected a torch.distributed.ProcessGroup that this process is in"), told)


def check_bounds_of_the_whole_row_are_refused_before_anything_is_exchanged():
    arguments = drawn(LAYOUTS["segments"])
    *tensors, projection, options = part_of(arguments, splits(sum(SEGMENTS))[0])
    options = {**options, "cu_seqlens": arguments[-1]["cu_seqlens"] + 0, "process_group": dist.group.WORLD}
    for changes in ({}, {"causal": True}, {"feature_map": "oprf"}, {"near_block": 4}):
        with Exchanged() as exchanged:
            told = told_by(lambda changes=changes: favor_attention(*tensors[:3], projection, **{**options, **changes}))
        expect(told.startswith("cu_seqlens: expected bounds that rise from 0 to the length "), told)
        expect(exchanged.numbers == [])


def check_a_feature_bias_equals_one_process():
    for feature_map, causal in product(("positive", "hyperbolic", "oprf"), (False, True)):
        arguments = drawn(LAYOUTS["masked segments"], feature_map=feature_map, causal=causal)
        generator = torch.Generator().manual_seed(1)
        arguments[-1]["feature_bias"] = torch.randn(arguments[4].shape[-2], generator=generator, dtype=torch.float64)
        assert_equals_one_process(arguments, splits(sum(SEGMENTS))[0], (feature_map, causal))


def check_near_far_attention_equals_one_process():
    for number, (name, feature_map, causal) in enumerate(product(LAYOUTS, ("positive", "oprf"), (False, True))):
        for dtype in (torch.float32, torch.float64):
            # With one head all ranks but one have none.
            heads = (1, 2, 5)[number % 3]
            arguments = drawn(
                LAYOUTS[name],
                dtype,
                feature_map=feature_map,
                causal=causal,
                heads=heads,
                a_axes="heads" if causal else "data",
            )
            arguments[-1]["near_block"] = 8
            split = splits(arguments[0].shape[2])[number % 2]
            assert_equals_one_process(arguments, split, (name, feature_map, causal, dtype), "auto")


def check_the_log_normaliser_of_near_far_attention_equals_one_process():
    arguments = drawn(LAYOUTS["masked segments"], torch.float32)
    split = splits(sum(SEGMENTS))[0]
    start, stop = split[dist.get_rank() : dist.get_rank() + 2]

    def computed(tensors, projection, options, part):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        options = {**options, "near_block": 8, "return_log_normaliser": True}
        _, logs = favor_attention(*leaves, projection, **options)
        weights = torch.arange(sum(SEGMENTS), dtype=torch.float32)[part]
        return logs.detach(), *torch.autograd.grad((logs * weights).sum(), leaves[:2])

    *parts, _, projection, options = part_of(arguments, split)
    options = {**options, "process_group": dist.group.WORLD}
    actual = computed(parts, projection, options, slice(start, stop))
    whole = computed(arguments[:3], *arguments[4:], slice(None))
    for mine, all_of_it in zip(actual, whole, strict=True):
        expect(torch.allclose(mine, all_of_it[:, :, start:stop], rtol=1e-5, atol=1e-6))


def check_what_a_group_does_not_compute_is_refused_before_anything_is_exchanged():
    *tensors, projection, options = part_of(drawn(LAYOUTS["rows"]), splits(157)[0])
    options = {**options, "process_group": dist.group.WORLD}
    expected = {
        "process_group: expected None with return_log_normaliser and no near_block": (
            projection,
            {"return_log_normaliser": True},
        ),
        "projection: expected a tensor that requires no gradient": (projection.clone().requires_grad_(), {}),
    }
    for message, (rows, changes) in expected.items():
        with Exchanged() as exchanged:
            told = told_by(
                lambda rows=rows, changes=changes: favor_attention(*tensors[:3], rows, **{**options, **changes})
            )
        expect(told.startswith(message), told)
        expect(not exchanged.numbers, exchanged.numbers)


def told_by(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(rank, world_size, folder, checks):
    """Runs the checks of the kernels for CUDA, which are interpreted, if `checks` is "cuda", else the others."""
    process_groups.join(rank, world_size, folder)
    for name, check in globals().copy().items():
        if name.startswith("check_") and name.startswith("check_cuda_") == (checks == "cuda"):
            check()
    (folder / f"{rank}.json").write_text(json.dumps(FAILURES))
    process_groups.leave()
