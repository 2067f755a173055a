import numpy as np
import pytest
import torch

from protlm.config import ModelConfig
from protlm.data.batching.batches import pack_row
from protlm.data.embeddings.layouts import columns_of
from protlm.inference.memory import is_out_of_memory
from protlm.inference.row_embeddings import RowEmbedder, merge_windows
from protlm.model.performer import Performer

KINDS = ("per-residue", "mean", "cls", "logits")


@pytest.fixture(scope="module")
def model():
    model = Performer(
        ModelConfig(attention="positive", num_layers=2, model_dim=16, num_heads=2, ffn_dim=32, num_features=8)
    )
    model.reset(0)
    return model.eval()


@pytest.fixture(scope="module")
def proteins():
    generator = np.random.default_rng(0)
    return [generator.integers(4, 24, size=size).astype(np.uint8) for size in (5, 1, 30, 12, 9)]


def test_what_a_protein_gives_is_what_its_states_say(model, proteins):
    by_protein = RowEmbedder(model, KINDS, (0, 2))(proteins)
    for protein, sums in zip(proteins, by_protein, strict=True):
        tokens, bounds = pack_row([protein])
        with torch.inference_mode():
            states = {layer: x.numpy() for layer, x in model.hidden_states(tokens, bounds, (0, 2)).items()}
            logits = model(tokens, bounds).numpy()
        one = merge_windows([sums], len(protein))
        for layer in (0, 2):
            np.testing.assert_allclose(one["per-residue", layer], states[layer][1:-1], atol=1e-5)
            np.testing.assert_allclose(one["mean", layer], states[layer][1:-1].mean(0), atol=1e-5)
            np.testing.assert_allclose(one["cls", layer], states[layer][0], atol=1e-5)
        np.testing.assert_allclose(one["logits", 2], logits[1:-1], atol=1e-5)
        assert len(one) == 7
        assert {array.dtype for array in one.values()} == {np.dtype(np.float32)}


def test_logits_are_there_once_whatever_the_layers():
    assert columns_of(("mean", "logits"), (0, 1), 6) == (("mean", 0), ("mean", 1), ("logits", 6))


def test_the_core_of_a_protein_is_what_is_kept_of_it(model, proteins):
    embedder = RowEmbedder(model, KINDS, (2,))
    (whole,) = embedder([proteins[2]])
    cores = [slice(0, 7), slice(7, 20), slice(20, 30)]
    windows = embedder([proteins[2]] * 3, cores)
    together = merge_windows(windows, 30)
    for key, expected in merge_windows([whole], 30).items():
        np.testing.assert_allclose(together[key], expected, atol=1e-5)
    np.testing.assert_allclose(windows[1]["per-residue", 2], whole["per-residue", 2][7:20], atol=1e-5)


def test_the_cls_of_several_windows_is_their_mean(model, proteins):
    windows = RowEmbedder(model, ("cls",), (2,))(proteins[:2])
    expected = (windows[0]["cls", 2] + windows[1]["cls", 2]) / 2
    np.testing.assert_allclose(merge_windows(windows, 6)["cls", 2], expected, rtol=1e-6)


class Scarce(RowEmbedder):
    """Has memory for rows of at most so many residues."""

    limit = 20

    def __call__(self, proteins, cores=None):
        if sum(map(len, proteins)) > self.limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory")
        return super().__call__(proteins, cores)


def test_rows_are_halved_until_they_fit_and_what_never_fits_is_none(model, proteins):
    cores = [slice(0, len(protein)) for protein in proteins]
    results = list(Scarce(model, ("mean",), (2,)).compute_by_halves(proteins, cores))
    assert [result is None for result in results] == [False, False, True, False, False]
    expected = RowEmbedder(model, ("mean",), (2,))(proteins)
    for result, whole in zip(results, expected, strict=True):
        if result is not None:
            np.testing.assert_allclose(result["mean", 2], whole["mean", 2], atol=1e-4)


def test_other_errors_are_no_lack_of_memory(model, proteins):
    class Broken(RowEmbedder):
        def __call__(self, proteins, cores=None):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(Broken(model, ("mean",), (2,)).compute_by_halves(proteins[:1], [slice(0, 5)]))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_a_real_failed_allocation_counts_as_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
