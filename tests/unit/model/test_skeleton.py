import subprocess
import sys

import torch

from protlm.config import ModelConfig
from protlm.model.performer import Performer
from protlm.model.skeleton import skeleton


def test_a_skeleton_has_the_names_and_shapes_of_the_network_and_no_memory():
    config = ModelConfig(num_layers=2, model_dim=16, num_heads=2, positions="learned", norm="rms", tied_head=False)
    bones, whole = skeleton(config).state_dict(), Performer(config).state_dict()
    assert {name: (x.shape, x.dtype) for name, x in bones.items()} == {
        name: (x.shape, x.dtype) for name, x in whole.items()
    }
    assert all(tensor.is_meta for tensor in bones.values())


def test_a_skeleton_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    skeleton(ModelConfig(num_layers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_skeleton_does_not_load_the_compiler():
    code = (
        "import sys; from protlm.config import ModelConfig; from protlm.model.skeleton import skeleton;"
        "skeleton(ModelConfig(num_layers=1)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
