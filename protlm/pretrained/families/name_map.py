"""The strict map from the tensors of a checkpoint to those of a model: each is used, known to be needless, or an error.

A family makes the map; nothing is read until the map is complete and leaves no tensor over.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from protlm.config import ModelConfig
from protlm.errors import ModelError, validation_fault
from protlm.model.performer import Performer
from protlm.model.shapes import tensor_shapes
from protlm.model.skeleton import skeleton
from protlm.pretrained.checkpoint_files import Tensors, check_fits
from protlm.vocabulary import TOKENS

MOST_LAYERS, WIDEST = 1024, 1 << 16
"""More layers, or a wider layer, than any model known has."""
_FLOAT_BYTES = 4

_Section = TypeVar("_Section", bound="SourceConfig")


class SourceConfig(BaseModel):
    """The keys of a foreign config.json that a family reads; others are of no influence on the numbers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """The settings of a foreign model, beside the map of its tensors.

    Attributes:
        config: The settings.
        trained_residues: Length of the longest protein that it was trained on; None if the source does not say.
    """

    config: ModelConfig
    trained_residues: int | None = None


@dataclass(frozen=True)
class _Step:
    """Tensors of the model, and how they are made of some of the checkpoint's."""

    targets: tuple[str, ...]
    names: tuple[str, ...]
    make: Callable[..., tuple[Tensor, ...]]
    ties: tuple[str, ...] = ()


class NameMap:
    """The map of one checkpoint, to which a family adds a step for every tensor."""

    def __init__(self, tensors: Tensors, family: str) -> None:
        self._tensors, self._family = tensors, family
        # Some versions of transformers write the parameters of norms under the names that TensorFlow had for them.
        self._stored = {re.sub(r"\.(gamma|beta)$", _of_norm, name): name for name in tensors.shapes}
        self._left = set(self._stored)
        self._steps: list[_Step] = []

    def has(self, name: str) -> bool:
        """Returns whether the checkpoint has a tensor that is not in the map yet."""
        return name in self._left

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor of the checkpoint.

        Raises:
            ModelError: There is no such tensor.
        """
        if name not in self._stored:
            raise self._missing(name)
        return self._tensors.shapes[self._stored[name]]

    def put(
        self,
        target: str,
        *names: str,
        by: Callable[..., Tensor] = lambda tensor: tensor,
        ties: Sequence[str] = (),
    ) -> None:
        """Makes a tensor of the model of one or several of the checkpoint.

        Args:
            target: The tensor of the model.
            names: The tensors of the checkpoint.
            by: Makes the one of the others.
            ties: Further copies of the first one, which must be equal to it where the checkpoint has them.
        """
        found = tuple(tie for tie in ties if tie in self._left)
        self._add((target,), names, lambda *tensors: (by(*tensors),), found)

    def split(self, targets: Sequence[str], name: str) -> None:
        """Makes tensors of the model of the equal parts, along the first axis, of one of the checkpoint."""
        self._add(tuple(targets), (name,), lambda tensor: tuple(x.clone() for x in tensor.chunk(len(targets))))

    def zeros(self, target: str, size: int) -> None:
        """Makes a vector of zeros, for a bias that the checkpoint does not have."""
        self._add((target,), (), lambda: (torch.zeros(size),))

    def linear(self, target: str, source: str, *, by: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Maps weight and bias; a bias that the checkpoint does not have is zero."""
        self.put(f"{target}.weight", f"{source}.weight", by=by)
        if f"{source}.bias" in self._left:
            self.put(f"{target}.bias", f"{source}.bias", by=by)
        else:
            self.zeros(f"{target}.bias", self.shape(f"{source}.weight")[0])

    def pairs(self, target: str, source: str, names: Mapping[str, str]) -> None:
        """Maps weight and bias of several modules: our name under `target`, and its name under `source`."""
        for ours, theirs in names.items():
            self.norm(f"{target}.{ours}", f"{source}.{theirs}")

    def norm(self, target: str, source: str) -> None:
        """Maps weight and bias of a norm, or of any module that has both."""
        for part in ("weight", "bias"):
            self.put(f"{target}.{part}", f"{source}.{part}")

    def equal(self, target: str, names: Sequence[str]) -> None:
        """Maps a tensor that the checkpoint has several times, each equal to the others."""
        self.put(target, names[0], ties=names[1:])

    def drop(self, pattern: str) -> None:
        """Drops the tensors whose whole name matches: known, and of no influence on logits and hidden states."""
        self._left -= {name for name in self._left if re.fullmatch(pattern, name)}

    def matching(self, pattern: str) -> list[str]:
        """Returns the names, not in the map yet, that match as a whole."""
        return sorted(name for name in self._left if re.fullmatch(pattern, name))

    def check(self, config: ModelConfig) -> None:
        """Checks that no tensor of the checkpoint is left over, and that the model fits into memory; reads none.

        Raises:
            ModelError: It does not.
        """
        if self._left:
            raise ModelError(
                f"{self._tensors.path}: tensor {min(self._left)!r} has no place in a model of the family {self._family}"
            )
        check_fits(self._tensors.path, _FLOAT_BYTES * sum(tensor.size for tensor in tensor_shapes(config).values()))

    def build(self, config: ModelConfig) -> Performer:
        """Returns the model with the tensors of the checkpoint, in evaluation mode.

        Raises:
            ModelError: A tensor is left over, has another shape than the settings ask for, is not finite, or differs
                from a copy of it; or the model does not fit into memory.
        """
        self.check(config)
        model = skeleton(config)
        expected = model.state_dict()
        assert sorted(expected) == sorted(target for step in self._steps for target in step.targets)
        state: dict[str, Tensor] = {}
        try:
            for step in self._steps:
                state.update(self._make(step, expected))
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"{self._tensors.path}: cannot be read: {str(error)[:200] or 'not enough memory'}"
            ) from None
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _add(
        self,
        targets: tuple[str, ...],
        names: tuple[str, ...],
        make: Callable[..., tuple[Tensor, ...]],
        ties: tuple[str, ...] = (),
    ) -> None:
        for name in names:
            if name not in self._left:
                raise self._missing(name)
        self._left -= {*names, *ties}
        self._steps.append(_Step(targets, names, make, ties))

    def _make(self, step: _Step, expected: dict[str, Any]) -> dict[str, Tensor]:
        path, shown = self._tensors.path, step.names[0] if step.names else step.targets[0]
        tensors = [self._tensors.read(self._stored[name]) for name in step.names]
        for name, tensor in zip(step.names, tensors, strict=True):
            if not _is_finite(tensor):
                raise ModelError(f"{path}: tensor {name!r} holds numbers that are not finite; the model is of no use")
        for tie in step.ties:
            if not torch.equal(self._tensors.read(self._stored[tie]), tensors[0]):
                raise ModelError(f"{path}: tensor {tie!r} differs from {shown!r}, of which it should be a copy")
        try:
            made = step.make(*tensors)
        except (RuntimeError, IndexError):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ModelError(f"{path}: tensor {shown!r}: got an unexpected shape: {shapes}") from None
        for target, tensor in zip(step.targets, made, strict=True):
            if tensor.shape != expected[target].shape:
                raise ModelError(
                    f"{path}: tensor {shown!r}: expected shape {tuple(expected[target].shape)} as {target} of these "
                    f"settings, got {tuple(tensor.shape)}"
                )
        return {target: tensor.contiguous() for target, tensor in zip(step.targets, made, strict=True)}

    def _missing(self, name: str) -> ModelError:
        return ModelError(f"{self._tensors.path}: tensor {name!r} is missing; no whole model of family {self._family}")


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all numbers are finite, in one pass and without memory."""
    flat = tensor.view(-1)
    # The sum of squares is several times faster than any comparison; it may overflow, but not hide anything.
    return bool(torch.dot(flat, flat).isfinite()) or bool(torch.isfinite(flat).all())


def _of_norm(found: re.Match[str]) -> str:
    return ".weight" if found[1] == "gamma" else ".bias"


def parse(kind: type[_Section], content: dict[str, Any], where: str) -> _Section:
    """Returns the checked keys of a foreign config.json.

    Raises:
        ModelError: A key that is missing, or has a value that the family does not know.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"{where}: {validation_fault(error)}") from None


def settings(where: str, **values: Any) -> ModelConfig:
    """Returns the settings of a model with exact attention and none of what protlm adds to its own.

    Raises:
        ModelError: Settings that do not fit together.
    """
    tokens = tuple(values.pop("vocabulary", ()))
    try:
        return ModelConfig(
            attention=("softmax",), qk_norm=False, conv_width=0, vocabulary=() if tokens == TOKENS else tokens, **values
        )
    except ValidationError as error:
        raise ModelError(f"{where}: {validation_fault(error)}") from None
