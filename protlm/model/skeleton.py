"""A network without numbers, for its shapes or to be given the tensors of a file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from protlm.config import ModelConfig
from protlm.model.performer import Performer


def skeleton(config: ModelConfig) -> Performer:
    """Returns a network on the meta device, whose tensors have shapes and no memory.

    Raises:
        RuntimeError: A tensor has too many entries for torch.
    """
    with torch.device("meta"), _WithoutDraws():
        return Performer(config)


class _WithoutDraws(TorchFunctionMode):
    """Leaves out the draws of torch's layers, which on the meta device would load its compiler, for seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
