"""One rank of a group of gloo processes: compares what the group computes with what one process does.

`python -m tests.reference.context_parallel_worker RANK WORLD_SIZE FOLDER` meets the other ranks in FOLDER and writes
there what failed. A rank goes on after a failure: the others would wait for it.
"""

import inspect
import json
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from protlm.ops import context_parallel, favor, favor_attention, favor_cpp, favor_torch, favor_triton, local_bounds
from protlm.ops.inputs import AttentionInputs
from tests import process_groups
from tests.conftest import LOOSER, TOLERANCE
from tests.reference.cases import MAPS, NAMES, Case, backends_of, differentiate, draw, found_of

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


def part_of(arguments, split):
    """Returns this rank's part of the arguments of a case."""
    *tensors, projection, options = arguments
    start, stop = split[dist.get_rank()], split[dist.get_rank() + 1]
    options = dict(options)
    if "token_mask" in options:
        options["token_mask"] = options["token_mask"][:, start:stop]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = local_bounds(options["cu_seqlens"], start, stop)
    return *(tensor[:, :, start:stop] for tensor in tensors), projection, options


def found_by_group(arguments, split, backend="torch", attention=favor_attention):
    """Returns output and gradients of this rank's part."""
    *tensors, options = part_of(arguments, split)
    return differentiate(attention, *tensors, {**options, "backend": backend, "process_group": dist.group.WORLD})


def assert_equals_one_process(arguments, split, told, backend="torch"):
    found = found_by_group(arguments, split, backend)
    feature_map, dtype = arguments[-1]["feature_map"], arguments[0].dtype
    start, stop = split[dist.get_rank()], split[dist.get_rank() + 1]
    for name, part, whole in zip(NAMES, found, found_of(arguments, backend), strict=True):
        expected = whole[:, :, start:stop]
        expect((part.shape, part.dtype) == (expected.shape, expected.dtype), (name, told))
        # Relative to all of it: the part of a rank may hold only small numbers.
        bound = TOLERANCE[dtype] * LOOSER.get((feature_map, name), 1) * whole.abs().max()
        difference = (part - expected).abs().max() if part.numel() else torch.zeros(())
        expect(difference <= bound, (name, told, backend, split, difference.item(), bound.item()))


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


def check_the_kernels_for_cuda_equal_themselves_in_one_process():
    if favor_triton.why_not() is None:
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
    layout = Case(length=1, batch=3, heads=2, num_features=5, head_dim=4)
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
            arguments = drawn(layout, length=length, feature_map=feature_map, causal=causal)
            with Exchanged() as exchanged:
                found_by_group(arguments, splits(length)[0])
            expect(exchanged.numbers == numbers, (feature_map, causal, length, exchanged.numbers))


class Exchanged:
    """Counts the elements that this rank receives in each collective."""

    def __enter__(self):
        self.numbers = []
        self._originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(original))
        return self

    def _counting(self, original):
        def counted(results, *arguments):
            self.numbers.append(sum(x.numel() for x in (results if isinstance(results, list) else [results])))
            return original(results, *arguments)

        return counted

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)


def check_two_runs_give_the_same_bits():
    for causal in (False, True):
        for dtype in (torch.float32, torch.float64):
            arguments = drawn(LAYOUTS["masked segments"], dtype, causal=causal)
            split = splits(sum(SEGMENTS))[0]
            first, second = (found_by_group(arguments, split, "auto") for _ in range(2))
            expect(all(map(torch.equal, first, second)), (causal, dtype))


def check_all_ranks_have_the_same_merged_state():
    for backend in (favor_torch, favor_cpp) if favor_cpp.why_not() is None else (favor_torch,):
        q, k, v, _, projection, options = part_of(drawn(LAYOUTS["masked segments"], torch.float32), splits(203)[0])
        masks = options["token_mask"], options["cu_seqlens"]
        inputs = AttentionInputs(q, k, v, projection, *masks, group_name=dist.group.WORLD.group_name)
        states, references = context_parallel._merged_states(backend, inputs)
        merged = torch.cat((states.flatten(), references.flatten()))
        of_ranks = [torch.empty_like(merged) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, merged)
        expect(all(torch.equal(x, merged) for x in of_ranks), backend)
        expect(merged.isfinite().all(), backend)


def check_nothing_later_changes_a_bit_of_an_earlier_causal_output():
    rank, length, first = dist.get_rank(), 150, 120
    for feature_map in MAPS:
        arguments = drawn(Case(length=length, batch=1), torch.float32, feature_map=feature_map, causal=True)
        split = splits(length)[0]
        plain = found_by_group(arguments, split)[0]
        for content in (1e6, torch.nan):
            changed = [tensor.clone() for tensor in arguments[:3]]
            for tensor in changed:
                tensor[:, :, first:] *= content
            out = found_by_group((*changed, *arguments[3:]), split)[0]
            kept = max(0, min(first, split[rank + 1]) - split[rank])
            expect(torch.equal(out[:, :, :kept], plain[:, :, :kept]), (feature_map, content))
            expect(kept == out.shape[2] or not torch.equal(out[:, :, kept:], plain[:, :, kept:]), feature_map)


def check_a_key_that_is_not_a_number_reaches_every_rank():
    q, k, *rest = drawn(Case(length=20))
    k[0, :, -1] = torch.nan
    out = found_by_group((q, k, *rest), splits(20)[0])[0]
    expect(out[0].isnan().all() and out[1].isfinite().all())


def check_the_op_compiles_as_one_graph_in_a_group():
    if dist.get_world_size() > 2:
        return
    attention = torch.compile(inspect.unwrap(favor.favor_attention), fullgraph=True, backend="aot_eager")
    for case in (Case(length=20, feature_map="oprf"), Case(length=20, causal=True)):
        arguments = draw(case, torch.float64)
        compiled, plain = (found_by_group(arguments, splits(20)[0], attention=x) for x in (attention, favor_attention))
        expect(all(map(torch.equal, compiled, plain)), case)


def check_a_group_of_one_is_one_process_and_strangers_are_told():
    alone = dist.new_group([0])
    *tensors, options = drawn(LAYOUTS["rows"], torch.float32)
    if dist.get_rank() == 0:
        found = differentiate(favor_attention, *tensors, {**options, "process_group": alone})
        expect(all(map(torch.equal, found, found_of((*tensors, options)))))
        return
    told = told_by(lambda: favor_attention(*tensors[:3], tensors[4], **options, process_group=alone))
    expect(told.startswith("process_group: expected a torch.distributed.ProcessGroup that this process is in"), told)


def check_bounds_of_the_whole_row_are_refused_before_anything_is_exchanged():
    arguments = drawn(LAYOUTS["segments"])
    *tensors, projection, options = part_of(arguments, splits(sum(SEGMENTS))[0])
    options = {**options, "cu_seqlens": arguments[-1]["cu_seqlens"] + 0, "process_group": dist.group.WORLD}
    for changes in ({}, {"causal": True}, {"feature_map": "oprf"}):
        with Exchanged() as exchanged:
            told = told_by(lambda changes=changes: favor_attention(*tensors[:3], projection, **{**options, **changes}))
        expect(told.startswith("cu_seqlens: expected bounds that rise from 0 to the length "), told)
        expect(exchanged.numbers == [])


def told_by(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(rank, world_size, folder):
    process_groups.join(rank, world_size, folder)
    for name, check in globals().copy().items():
        if name.startswith("check_"):
            check()
    (folder / f"{rank}.json").write_text(json.dumps(FAILURES))
    process_groups.leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
