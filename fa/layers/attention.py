"""``nn.MultiheadAttention`` under a learning rule: an equal attention of four linear layers on the same parameters.

No figure of this repository uses this module; it serves networks of your own. PyTorch's attention reads
``in_proj_weight`` and ``out_proj.weight`` directly and calls no layer, so that errors would pass through W unnoticed.
Here the projections of queries, keys, values and output each have feedback of their own; the parameters, their names
and the returned values are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fa.layers.hooks import Converted, Watched


class RowsLinear(Converted, nn.Module):
    """A projection of an attention, ``key`` = q, k or v: a linear layer on rows of a parameter that the attention owns;
    made by ``convert``, never constructed."""

    def __init__(self, owner: nn.MultiheadAttention, key: str) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple: the owner is not a child of its own child
        self.key, self.training = key, owner.training
        i, e, together = "qkv".index(key), owner.embed_dim, owner._qkv_same_embed_dim
        self.parameter = "in_proj_weight" if together else f"{key}_proj_weight"
        self.bias_rows = slice(i * e, (i + 1) * e)
        self.rows = self.bias_rows if together else slice(None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # the owner, whose parameter gets the hook, is not restored yet and does it

    def install(self) -> None:
        """Add this layer to the attention as a child, and make the attention call its projections."""
        owner = self.owner[0]
        owner.__class__ = FeedbackAttention
        owner.__module__ = nn.MultiheadAttention.__module__  # for torch.fx, as in put_on
        owner.add_module(self.key, self)
        owner._modules["out_proj"] = owner._modules.pop("out_proj")  # last, so that layers are listed from the input

    def remove(self) -> None:
        """Give the attention back as it was."""
        self.owner[0].__class__ = nn.MultiheadAttention
        vars(self.owner[0]).pop("__module__", None)
        delattr(self.owner[0], self.key)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """See :class:`fa.layers.hooks.Converted`."""
        return self.owner[0], self.parameter

    @property
    def weight(self) -> Tensor:
        """The layer's rows of the parameter, (embed, in); a view."""
        return self.held[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The layer's entries of the attention's bias, (embed,), a view; or None."""
        bias = self.owner[0].in_proj_bias
        return None if bias is None else bias[self.bias_rows]

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., in) -> (..., embed)."""
        if self.feedback.bypassed(x):
            return F.linear(x, self.weight, self.bias)
        if not (torch.compiler.is_compiling() or self.held._backward_hooks):
            self.rewatch()
        return self.feedback.forward(x, self.weight, self.bias)


class FeedbackAttention(Watched, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of four linear layers, ``q, k, v, out_proj``; made by ``convert`` alone."""

    def rewatch(self) -> None:
        """Watch the projections, whose weights are here."""
        for projection in (self.q, self.k, self.v):
            projection.rewatch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for projection in (self.q, self.k, self.v):
            projection.watch()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: (output, attention weights or None); shapes below for ``batch_first``.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``; a mask that is neither boolean nor floating point.
        """
        if not torch.is_grad_enabled():
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("attention: is_causal is a hint about attn_mask, and there is none")
        batched = query.dim() == 3
        query, key, value = self.q(query), self.k(key), self.v(value)  # (n, tokens, embed), axes as they come
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        n, heads = query.shape[0], self.num_heads
        # (n, tokens, embed) -> (n, heads, tokens, embed / heads)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q.dtype, check_other=False)  # to add to the scores
        padding = F._canonical_mask(key_padding_mask, "key_padding_mask", None, "", q.dtype, check_other=False)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(n, heads, *mask.shape[1:])  # (n * heads, queries, keys) -> (n, heads, queries, keys)
        if padding is not None:
            padding = padding[:, None, None, :]  # (n, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (n, heads, queries, keys)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            out = weights @ v  # (n, heads, queries, embed / heads)
            weights = weights.mean(1) if average_attn_weights else weights  # (n, queries, keys), or for each head
        else:
            out, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        out = out.transpose(1, 2).flatten(2)  # (n, queries, embed)
        if not batched:
            return self.out_proj(out.squeeze(0)), None if weights is None else weights.squeeze(0)
        return self.out_proj(out if self.batch_first else out.transpose(0, 1)), weights
