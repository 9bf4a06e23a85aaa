"""The data: 1,797 handwritten digits of 8×8 pixels (UCI, in scikit-learn), and a stream of traffic drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

SIDE = 8
CLASSES = tuple(str(digit) for digit in range(10))
TEST_IMAGES = 540
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Images `(rows, 1, 8, 8) float32` in 0..1 and their digits `(rows,) int64`."""

    pixels: torch.Tensor
    digits: torch.Tensor

    def __len__(self) -> int:
        return len(self.digits)


@dataclass(frozen=True)
class Distortion:
    """How far an image is changed: shift in pixels and rotation in degrees (standard deviations), noise on 0..1."""

    shift: float = 0.0
    rotation: float = 0.0
    noise: float = 0.0

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Every image of `pixels` `(rows, 1, 8, 8)`, moved, turned and blurred by noise of its own."""
        rows = len(pixels)
        angle = torch.randn(rows, generator=generator) * (self.rotation * torch.pi / 180)
        move = torch.randn(rows, 2, generator=generator) * (self.shift * 2 / SIDE)
        cos, sin = angle.cos(), angle.sin()
        affine = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], dim=1).reshape(rows, 2, 3)
        grid = functional.affine_grid(affine, list(pixels.shape), align_corners=False)
        moved = functional.grid_sample(pixels, grid, align_corners=False)
        return moved + torch.randn(moved.shape, generator=generator) * self.noise


TRAFFIC = Distortion(shift=0.7, rotation=14.0, noise=0.14)


def load() -> tuple[Images, Images]:
    """The digits, split once and for all into those to train on (1,257) and those held out (540)."""
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    parts = train_test_split(images, digits, test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=digits)
    train_pixels, test_pixels, train_digits, test_digits = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    return Images(train_pixels, train_digits.long()), Images(test_pixels, test_digits.long())


def traffic(held_out: Images, rows: int, seed: int) -> Images:
    """`rows` requests as they might come in: held-out digits drawn with replacement, each distorted afresh."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(held_out), (rows,), generator=generator)
    return Images(TRAFFIC(held_out.pixels[drawn], generator), held_out.digits[drawn])
