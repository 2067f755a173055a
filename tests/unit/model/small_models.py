"""Small models and rows of proteins for the tests of the network."""

import torch

from protlm.config import ModelConfig
from protlm.model import attention as attention_module
from protlm.model.performer import Performer
from protlm.model.segments import Segments
from protlm.vocabulary import CLS, EOS, FIRST_RESIDUE

KINDS = ("positive", "hyperbolic", "regularised", "oprf", "relu", "near-far", "softmax", "local")
EXACT = ("softmax", "local")
# Three tokens are `<cls>`, one residue and `<eos>`.
SIZES = (3, 40, 3, 17, 90, 41, 3)


def build(seed=0, **options):
    """Returns a small model in evaluation mode, of FAVOR layers unless told otherwise.

    All its weights are away from what they start as.
    """
    sizes = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "ffn_dim": 48, "num_features": 24}
    sizes["attention"] = "positive"
    model = Performer(ModelConfig(**{**sizes, **options}))
    model.reset(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2 and parameter.shape[0] == model.config.conv_width:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bounds(*sizes):
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)


def segments_of(*sizes):
    """Returns the segments of a row of proteins of these sizes."""
    return Segments.from_bounds(bounds(*sizes), sum(sizes))


def proteins(*sizes, seed=0):
    """Returns one tensor of tokens a protein, `<cls>` and `<eos>` included in its size."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for size in sizes:
        tokens = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + 20, (size,), generator=generator)
        tokens[0], tokens[-1] = CLS, EOS
        result.append(tokens)
    return result


def attended(model, tokens, cu_seqlens, monkeypatch, kind="favor_attention"):
    """Returns the q, k and v that the first layer's attention is given, and what it makes of them."""
    seen = []
    original = getattr(attention_module, kind)

    def spy(q, k, v, *arguments, **options):
        seen.append((q, k, v, original(q, k, v, *arguments, **options)))
        return seen[-1][-1]

    monkeypatch.setattr(attention_module, kind, spy)
    with torch.no_grad():
        model(tokens, cu_seqlens)
    return seen[0]
