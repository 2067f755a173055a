"""The law that padding has no influence, for any attention that tests differentiate."""

import torch


def assert_padding_changes_nothing(differentiate, q, k, v, projection, out_grad, content, *, token_mask, **options):
    """Fills padding with a content: no output and no gradient changes a bit, and those of padding are zero."""
    is_padding = ~token_mask[:, None, :, None]
    plain = differentiate(q, k, v, projection, out_grad, token_mask=token_mask, **options)
    q, k, v, out_grad = (tensor.masked_fill(is_padding, content) for tensor in (q, k, v, out_grad))
    padded = differentiate(q, k, v, projection, out_grad, token_mask=token_mask, **options)
    for a, b in zip(padded, plain, strict=True):
        assert torch.equal(a, b)
        assert not a.masked_select(is_padding).any()
