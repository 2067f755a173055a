"""The A of `oprf` from the data: hides how the mean ‖x + y‖² of every segment is found piece by piece."""

import torch
from torch import Tensor

from protlm.ops.inputs import AttentionInputs
from protlm.ops.pieces import cut_into_blocks
from protlm.ops.random_features import oprf_parameter

_PIECE_TOKENS = 512


def oprf_a_from_data(inputs: AttentionInputs) -> Tensor:
    """Returns A (segments, heads), in float64: the mean is taken over all pairs of real tokens of a segment."""
    q, k = inputs.q, inputs.k
    heads, head_dim = q.shape[1], q.shape[-1]
    mean_square = torch.zeros((inputs.num_segments, heads), dtype=torch.float64, device=q.device)
    for block in cut_into_blocks(q, inputs.token_mask, inputs.cu_seqlens, _PIECE_TOKENS, _PIECE_TOKENS):
        squares = torch.zeros((heads, len(block.segments)), dtype=torch.float64, device=q.device)
        q_sums = torch.zeros((*squares.shape, head_dim), dtype=torch.float64, device=q.device)
        k_sums, counts = torch.zeros_like(q_sums), torch.zeros_like(squares)
        for piece in block.pieces:
            q_piece, k_piece = (piece.take(x, inputs.compute_dtype, only_valid=True) for x in (q, k))
            squares += (q_piece.square().sum((2, 3)) + k_piece.square().sum((2, 3))).double()
            q_sums += q_piece.sum(2).double()
            k_sums += k_piece.sum(2).double()
            counts += piece.length if piece.valid is None else piece.valid.sum(-1)
        # Σ over pairs of ‖q + k‖² is counts · Σ(‖q‖² + ‖k‖²) + 2 Σq·Σk; a segment without a token keeps 0.
        counts.clamp_(min=1)
        means = squares / counts + 2 * (q_sums * k_sums).sum(-1) / counts.square()
        mean_square[block.segments] = means.T
    return oprf_parameter(mean_square * head_dim**-0.5, head_dim)
