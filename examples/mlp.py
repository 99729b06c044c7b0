"""The smallest DEQ classifier: one layer, its equilibrium, the exact gradient. Run: python examples/mlp.py"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import deqcore


class Classifier(nn.Module):
    """z* = tanh(W z* + U x), classified by a linear layer."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.inject = nn.Linear(inputs, hidden)
        self.cell = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, classes)
        self.deq = deqcore.get_deq(solver="anderson", gradient="implicit")
        deqcore.apply_norm(self.cell, "spectral_norm", learn_scale=False, target_norm=0.9)  # keeps f a contraction

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(x)
        z_out, _ = self.deq(lambda z: torch.tanh(self.cell(z) + injected), torch.zeros_like(injected))
        return self.head(z_out[-1])


def main(steps: int = 200) -> float:
    """Train on two interleaved spirals; returns the accuracy."""
    torch.manual_seed(0)
    angle = torch.linspace(0.5, 7.0, 200)
    arm = torch.stack((angle.cos(), angle.sin()), 1) * angle[:, None] / 7
    x, y = torch.cat((arm, -arm)), torch.arange(2).repeat_interleave(200)
    model = Classifier(2, 32, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print(f"accuracy {main():.1%}")
