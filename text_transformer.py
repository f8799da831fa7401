"""CLIP's text transformer: causal, read at the end of the text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errors import LabError
from transformer_blocks import Encoder, initialise


class TokenEmbeddings(nn.Module):
    """Tokens with learned positions."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, width)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTransformer(nn.Module):
    """Token ids to one vector a text, by names and shapes of transformers' CLIP.

    Args:
        width, num_layers, num_heads, mlp_ratio, dropout: of the blocks.
        vocabulary: how many tokens there are; the last is the end mark.
        context: most tokens of a text.
        activation: a name of transformer_blocks.ACTIVATIONS.
        gradient_checkpointing: less memory, a third more time, the same gradients.
    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        width: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        *,
        vocabulary: int = 49408,
        context: int = 77,
        activation: str = "gelu",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.context, self.end = width, context, vocabulary - 1
        self.embeddings = TokenEmbeddings(vocabulary, context, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Encoder(
            num_layers, width, num_heads, mlp_ratio, dropout, activation, gradient_checkpointing
        )
        self.final_layer_norm = nn.LayerNorm(width)
        initialise(self.encoder, "clip")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, width), at each text's first end mark.

        Padding stands behind the end mark, where a causal encoder never looks; so the mask is not needed.
        Raises: LabError if the texts are longer than `context`.
        """
        if input_ids.shape[1] > self.context:
            raise LabError(f"texts of {input_ids.shape[1]} tokens are too long; at most {self.context}.")
        tokens = self.encoder(self.dropout(self.embeddings(input_ids)), causal=True)  # (B, L, width)
        ends = (input_ids == self.end).int().argmax(dim=1)  # (B,)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.final_layer_norm(tokens[rows, ends])
