"""A small convolutional DEQ, the handwritten digits it learns, and the loop that trains it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import deqcore
from deqcore import MissingExtraError, Solution

__all__ = ["BATCH", "DigitCell", "DigitsDEQ", "Epoch", "Split", "augment", "evaluate", "fit", "load_digits_split"]


class DigitCell(nn.Module):
    """f(z, u) = relu(GroupNorm(conv(z) + u)), the map whose equilibrium is the features of an image.

    The injection `u` comes before the GroupNorm, so every evaluation of f weighs state and image anew.

    Args:
        channels: channels of z and u.
        groups: groups of the GroupNorm; they must divide `channels`.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """f(z, u); `z`, `u` and the result have shape (B, channels, 8, 8)."""
        return functional.relu(self.norm(self.conv(z) + u))


class DigitsDEQ(nn.Module):
    """Classifies 8 x 8 images by the equilibrium of one convolutional layer.

    An image is embedded once, ``u = inject(x)``; its features are z* = cell(z*, u), found from z = 0; a pooled linear
    layer reads the class off them. The cell's convolution carries the norm of the configuration (weight_norm where it
    names none).

    Args:
        config: anything :func:`deqcore.get_deq` takes.
        channels: width of the state. 32 is enough for 99 % on the digits.
        groups: groups of the GroupNorms; they must divide `channels`.
        classes: how many classes there are.
        dropout: rate before the linear layer.
        keywords: further settings for :func:`deqcore.get_deq`; they win over `config`.

    Raises:
        DEQError: what :func:`deqcore.get_deq` refuses.
    """

    def __init__(
        self,
        config: Any = None,
        *,
        channels: int = 32,
        groups: int = 8,
        classes: int = 10,
        dropout: float = 0.2,
        **keywords: Any,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.deq = deqcore.get_deq(config, **keywords)
        self.inject = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GroupNorm(groups, channels))
        self.cell = DigitCell(channels, groups)
        self.deq.apply_norm(self.cell)
        self.head = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16 * channels, classes),
        )

    def forward(self, images: Tensor, **call: Any) -> tuple[Tensor, Solution]:
        """Logits of shape (B, classes), and how the solve went.

        Args:
            images: shape (B, 1, H, W), H and W at least 4, values in [0, 1].
            call: keywords of :meth:`deqcore.DEQ.forward`: ``solver_kwargs``, ``warm_start``, ``sradius_mode``, ...
        """
        u = self.inject(images)
        z_out, info = self.deq(self.cell, torch.zeros_like(u), args=(u,), **call)
        return self.head(z_out[-1]), info


# ---- data


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8) in [0, 1], float32, and labels (N,), int64: 1,437 to train with and 360 to test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split() -> Split:
    """The 1,797 digits that scikit-learn ships, always split the same way, every class in proportion.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("the digits data set", "scikit-learn", "demo") from error
    pixels, labels = load_digits(return_X_y=True)
    a, b, c, d = train_test_split(pixels / 16.0, labels, test_size=360, stratify=labels, random_state=0)
    images = [torch.as_tensor(part, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in (a, b)]
    classes = [torch.as_tensor(part, dtype=torch.int64) for part in (c, d)]
    return Split(images[0], classes[0], images[1], classes[1])


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`images`, each turned by up to 10 degrees, scaled by up to 10 % and moved by up to 0.8 pixels, at random.

    Args:
        images: shape (B, 1, H, W).
        generator: source of the random numbers.
    """
    angle, scale, dx, dy = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle, scale = 0.175 * angle, 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, 0.2 * dx, sin, cos, 0.2 * dy], 1).view(-1, 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


# ---- training

#: Images a training step.
BATCH = 48


@dataclass(frozen=True)
class Epoch:
    """One row of the training table.

    Attributes:
        epoch: counted from 1.
        loss: mean cross entropy over the epoch's batches.
        accuracy: share of the test images that are classified right.
        steps: solver steps of the test solve, mean over its samples.
        nfe: evaluations of f in the test solve.
        residual: relative residual ||f(z) - z|| / ||f(z)|| of the test solve, median over its samples.
        converged: share of the test samples that reached their tolerance.
        seconds: time since training began.
    """

    epoch: int
    loss: float
    accuracy: float
    steps: float
    nfe: int
    residual: float
    converged: float
    seconds: float


def evaluate(model: DigitsDEQ, images: Tensor, labels: Tensor) -> tuple[float, Solution]:
    """The share of `images` that `model` classifies right, and how the solve went; leaves the model in eval mode."""
    model.eval()
    with torch.no_grad():
        logits, info = model(images)
    return (logits.argmax(1) == labels).double().mean().item(), info


def fit(
    model: DigitsDEQ,
    data: Split,
    epochs: int,
    generator: torch.Generator,
    *,
    batch: int = BATCH,
    lr: float = 1e-2,
    weight_decay: float = 1e-2,
) -> Iterator[Epoch | None]:
    """Train `model` with AdamW, one learning-rate cycle and augmented images.

    Args:
        model: changed in place.
        data: what to train and test with.
        epochs: passes over the training images.
        generator: source of the order of the images and of their augmentation.
        batch: images a step; the last few of a pass that don't fill a batch wait for the next.
        lr: largest learning rate of the cycle.
        weight_decay: of AdamW.

    Yields:
        None after every step but a pass's last, an :class:`Epoch` after each pass.
    """
    count = len(data.train_images)
    each = count // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * each)
    begin = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for k, rows in enumerate(torch.randperm(count, generator=generator)[: each * batch].split(batch), 1):
            logits, info = model(augment(data.train_images[rows], generator))
            loss = functional.cross_entropy(logits, data.train_labels[rows])
            optimizer.zero_grad()
            (loss + info.get("regularization", 0.0)).backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            if k < each:
                yield None
        accuracy, info = evaluate(model, data.test_images, data.test_labels)
        yield Epoch(
            epoch=epoch,
            loss=total / each,
            accuracy=accuracy,
            steps=info["steps"].double().mean().item(),
            nfe=info["nfe"],
            residual=info["rel_lowest"].median().item(),
            converged=info.converged.double().mean().item(),
            seconds=time.perf_counter() - begin,
        )
