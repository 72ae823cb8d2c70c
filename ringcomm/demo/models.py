"""The two models. Small, but shaped as people shape them."""

import torch
from torch import nn
from torch.nn import functional

from ringcomm.demo.data import VOCABULARY

__all__ = ["CONTEXT", "CharTransformer", "DigitsNet", "num_parameters"]

CONTEXT = 64
"""Characters that the transformer sees."""


class DigitsNet(nn.Module):
    """Two convolutions and two linear layers on 8x8 images; 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8)."""
        logits: torch.Tensor = self.layers(images)
        return logits


class _Block(nn.Module):
    """Attention and feed-forward, each behind a normalisation, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.shrink = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x))
        heads = heads.view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        fed: torch.Tensor = self.shrink(functional.gelu(self.expand(self.feed_norm(x))))
        return x + fed


class CharTransformer(nn.Module):
    """A causal transformer over characters, 2.0 million parameters.

    Without biases: one-dimensional parameters travel exactly, whatever the codec, and the
    normalisations that are left make 0.1 % of all.
    """

    def __init__(self, width: int = 200, num_heads: int = 4, num_layers: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual_output = name.endswith(("project.weight", "shrink.weight"))
                deviation = 0.02 / (2 * num_layers) ** 0.5 if residual_output else 0.02
                nn.init.normal_(parameter, std=deviation)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Logits (n, length, 128) of characters (n, length), length at most :data:`CONTEXT`."""
        x = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def num_parameters(model: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())
