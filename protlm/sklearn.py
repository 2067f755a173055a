"""A trained model as a scikit-learn transformer: it accepts any column of sequences and reads the model when needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from protlm.errors import ModelError
from protlm.inference.protein_model import ProteinModel, load_model
from protlm.inference.sequences import residues_of

_KINDS = ("mean", "cls")


class ProteinEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turns protein sequences into one vector each, as a step of a scikit-learn pipeline.

    `fit` learns nothing: the vectors are those of the trained model, and a protein's vector does not depend on the
    others. So `GridSearchCV` can compare layers and kinds by the parameters `layer` and `kind`; with a folder as the
    pipeline's `memory`, each combination is computed once.

    Clones share a model that was passed loaded. A model passed as a path is read when it is first needed, and is not
    pickled with the transformer.

    Args:
        model: A path or name that `protlm.load_model` takes, or a model that it returned.
        kind: `mean` over the residues, or `cls`.
        layer: 0 is the embedding, -1 the last layer.
        tokens_per_batch: Budget of one forward pass; a longer protein has a pass of its own. None: a default for the
            device.

    Attributes:
        n_features_out_: Width of a vector.
        model_hash_: Hash of the weights at `fit`; `transform` refuses another model.
    """

    _loaded: tuple[str, ProteinModel] | None = None

    def __init__(
        self,
        model: str | Path | ProteinModel,
        *,
        kind: Literal["mean", "cls"] = "mean",
        layer: int = -1,
        tokens_per_batch: int | None = None,
    ) -> None:
        self.model = model
        self.kind = kind
        self.layer = layer
        self.tokens_per_batch = tokens_per_batch

    # scikit-learn passes X and y by these names.
    def fit(self, X: Sequence[str] | np.ndarray, y: object = None) -> Self:  # noqa: N803
        """Checks the sequences and the settings, and reads the model.

        Args:
            X: Sequences: a list, a NumPy array, a pandas Series or a table of one column.
            y: Ignored.

        Raises:
            ValueError: No sequence, one that cannot be used, or an unknown kind or layer.
            ProtlmError: A model that cannot be read.
        """
        if not _column(X):
            raise ValueError("X: expected at least one sequence, got none")
        if self.kind not in _KINDS:
            raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {self.kind!r}")
        model = self._read_model()
        # Checks the other settings; without sequences nothing is computed.
        model.embed((), (self.kind,), layer=self.layer, tokens_per_batch=self.tokens_per_batch)
        self.n_features_out_ = model.model_dim
        self.model_hash_ = model.description.weights_hash
        return self

    def transform(self, X: Sequence[str] | np.ndarray) -> np.ndarray:  # noqa: N803
        """Returns the vectors of sequences, in order, float32 (sequences, n_features_out_).

        Args:
            X: Sequences: a list, a NumPy array, a pandas Series or a table of one column.

        Raises:
            ValueError: A sequence that cannot be used.
            ProtlmError: The model cannot be read any more, or is another one than at `fit`.
        """
        check_is_fitted(self, "model_hash_")
        sequences = _column(X)
        model = self._read_model()
        if model.description.weights_hash != self.model_hash_:
            raise ModelError(f"{self.model}: another model than in fit; fit again")
        vectors = np.empty((len(sequences), self.n_features_out_), dtype=np.float32)
        embeddings = model.embed(sequences, (self.kind,), layer=self.layer, tokens_per_batch=self.tokens_per_batch)
        for vector, by_kind in zip(vectors, embeddings, strict=True):
            vector[:] = by_kind[self.kind]
        return vectors

    @property
    def _n_features_out(self) -> int:
        """The number of names that `get_feature_names_out` returns."""
        return self.n_features_out_

    def _read_model(self) -> ProteinModel:
        if isinstance(self.model, ProteinModel):
            return self.model
        path = str(self.model)
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = path, load_model(path)
        return self._loaded[1]

    def __sklearn_clone__(self) -> Self:
        # The deep copy that other parameters get would put another model into memory for each fold.
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_loaded"}


def _column(sequences: Any) -> list[str]:
    """Returns the sequences as a list; raises ValueError if they are not a column of usable sequences."""
    # NumPy makes an array without axes of a str and of an unordered object, such as a set or a dictionary.
    column = np.asarray(sequences, dtype=object)
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if column.ndim != 1:
        got = _type_of(sequences, column)
        raise ValueError(f"X: expected a list or a column of sequences, got {got}; put a single one into a list")
    for number, sequence in enumerate(column):
        residues_of(sequence, f"X[{number}]")
    return list(column)


def _type_of(sequences: object, column: np.ndarray) -> str:
    name = type(sequences).__name__
    return f"{name} of shape {column.shape}" if column.ndim else name
