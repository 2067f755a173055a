"""Compiled layers give what uncompiled ones give, for rows of all lengths, without compiling again and again."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# In a process of its own: type checks at run time, which tests switch on, cannot be compiled, and warnings of the
# compiler about itself are no errors there.
PROGRAM = """
import functools, json, sys
import torch
from torch._dynamo.utils import counters
from protlm.config import ModelConfig
from protlm.model.health import attention_health
from protlm.model.performer import Performer

torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend=sys.argv[1])
kinds = tuple(sys.argv[2].split(","))
model = Performer(ModelConfig(attention=kinds, num_layers=2, model_dim=32, num_heads=2, ffn_dim=48, num_features=24))
model.reset(0)

def row(*sizes):
    tokens = torch.randint(4, 24, (sum(sizes),), generator=torch.Generator().manual_seed(sum(sizes)))
    return tokens, torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)

def results(tokens, cu_seqlens):
    model.zero_grad()
    logits = model(tokens, cu_seqlens)
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

rows = [row(3, 20, 7), row(41, 5), row(9, 8, 7, 100)]
expected = [results(*each) for each in rows]
health = attention_health(model, *rows[0])
names = list(model.state_dict())
model.compile_layers()
errors = [
    ((a - b).abs().max() / b.abs().max()).item()
    for each, wanted in zip(rows, expected)
    for a, b in zip(results(*each), wanted)
]
print(json.dumps({
    "largest_error": max(errors),
    "num_graphs": counters["stats"]["unique_graphs"],
    "same_names": names == list(model.state_dict()),
    "same_health": health == attention_health(model, *rows[0]),
}))
"""


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")


# What is ours is the graph: its breaks, its guards, its backward. The code that inductor makes of it takes a minute.
# Exact kinds are left out of the graphs, which then have two parts a layer.
@pytest.mark.parametrize(("kinds", "most_graphs"), [("positive", 2), ("positive,local,softmax", 8)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=(pytest.mark.slow, needs_compiler))])
def test_compiled_layers_give_the_same_logits_and_gradients_for_rows_of_all_lengths(
    backend, kinds, most_graphs, tmp_path
):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, backend, kinds]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    actual = json.loads(run.stdout.splitlines()[-1])
    assert actual["largest_error"] < 1e-4
    assert 1 <= actual["num_graphs"] <= most_graphs
    assert actual["same_names"]
    assert actual["same_health"]
