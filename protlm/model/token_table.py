"""Tokens of data become those of a model and back, on the device of the model; nothing happens where they are equal."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protlm.vocabulary import ModelVocabulary


class TokenTable:
    """The translation of tokens and logits.

    Attributes:
        vocabulary: The vocabulary of the model.
    """

    def __init__(self, vocabulary: ModelVocabulary) -> None:
        self.vocabulary = vocabulary
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}

    def own(self, tokens: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
        """Returns the model's tokens for tokens of data; residues that it lacks become its X or unknown token."""
        if self.vocabulary.is_ours:
            return tokens
        return self._on("ids", tokens.device)[tokens]

    def columns(self, values: Float[Tensor, "*axes model_tokens"]) -> Float[Tensor, "*axes vocab_size"]:
        """Returns logits, or their log-softmax, in a column for each token of data; −∞ if the model lacks it."""
        if self.vocabulary.is_ours:
            return values
        columns = self._on("columns", values.device)
        return values[..., columns.clamp_min(0)].masked_fill(columns < 0, -torch.inf)

    def _on(self, name: str, device: torch.device) -> Tensor:
        """Returns a table of the vocabulary on a device."""
        if (name, device) not in self._tensors:
            numbers: np.ndarray = getattr(self.vocabulary, name)
            # A tensor that is made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                self._tensors[name, device] = torch.from_numpy(numbers).to(device)
        return self._tensors[name, device]
