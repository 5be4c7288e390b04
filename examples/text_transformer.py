"""A small text classifier without BatchNorm: do the rare sequences of a training set pull with or against the others?

    python examples/text_transformer.py

Each sequence of tokens names its class by a token that comes twice; of a minority (one in five) the rule is another one.
The two groups are those of the meter: its mask need not mean wrong labels.
"""

import torch
from torch import Tensor, nn

from gradsplit import Meter

CLASSES, LENGTH, STEPS, BATCH = 4, 12, 150, 64


class Classifier(nn.Module):
    """Logits (B, CLASSES) of tokens (B, T) int64 and their positions (T,)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, width), nn.Embedding(LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(tokens) + self.positions(positions)).mean(1))


def draw(size: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T), classes (B,) and who is of the minority (B,), whose marks stand for the next class."""
    tokens = torch.randint(CLASSES, 20, (size, LENGTH), generator=g)
    marks = torch.randint(CLASSES, (size,), generator=g)
    tokens[:, ::4] = marks[:, None]
    rare = torch.rand(size, generator=g) < 0.2
    tokens[rare, -1] = 19  # what tells them apart
    return tokens, (marks + rare) % CLASSES, rare


def main() -> list[dict]:
    torch.manual_seed(0)
    g, model = torch.Generator().manual_seed(0), Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    meter, positions, seen = Meter(model, masks=2), torch.arange(LENGTH).expand(BATCH, LENGTH), []
    for step in range(STEPS):
        tokens, y, rare = draw(BATCH, g)
        optimizer.zero_grad()
        seen.append(meter.step((tokens, positions), y, rare))
        optimizer.step()
        if step % 25 == 0:
            cosine, null, loss = (
                float(seen[-1][t]) for t in ("grad/cos_clean_noisy", "null/permuted_cos_clean_noisy", "train/loss")
            )
            print(f"step {step}: loss {loss:.2f}, cos(majority, minority) {cosine:+.2f}, of random parts {null:+.2f}")
    return seen


if __name__ == "__main__":
    main()
