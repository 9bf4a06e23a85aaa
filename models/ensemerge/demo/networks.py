"""The networks: one small architecture, trained from different starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ensemerge.demo.digits import Distortion, Images
from ensemerge.measures.scores import accuracy
from ensemerge.progress import Notify

BATCH_ROWS = 64
# Below this the rest of the demo would show nothing.
REQUIRED_ACCURACY = 0.95


class DigitNet(nn.Module):
    """Three convolutions with batch normalisation, a mean over positions, a linear head."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        few, many = 16 * width, 32 * width
        self.features = nn.Sequential(*_block(1, few), *_block(few, many), nn.MaxPool2d(2), *_block(many, many))
        self.head = nn.Linear(many, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, 10)` of images `(batch, 1, 8, 8)`."""
        features: torch.Tensor = self.features(image)
        logits: torch.Tensor = self.head(features.mean((2, 3)))
        return logits


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


@dataclass(frozen=True)
class Training:
    """How a network is trained. `start` is a trained network to go on from, by name; empty for a fresh one."""

    seed: int
    epochs: int
    learning_rate: float
    distortion: Distortion
    start: str = ""
    width: int = 1


MILD = Distortion(shift=0.4, rotation=6.0, noise=0.05)

# The seeds were fixed before anything was measured.
TRAININGS: dict[str, Training] = {
    "digits-base": Training(seed=1, epochs=25, learning_rate=3e-3, distortion=MILD),
    "digits-a": Training(11, 15, 2e-3, Distortion(shift=0.9, rotation=5.0, noise=0.05), start="digits-base"),
    "digits-b": Training(12, 15, 2e-3, Distortion(shift=0.3, rotation=20.0, noise=0.05), start="digits-base"),
    "digits-c": Training(13, 15, 2e-3, Distortion(shift=0.3, rotation=5.0, noise=0.2), start="digits-base"),
    # Wider: the more units there are, the nearer are the best partners of two networks that never met.
    "digits-x": Training(seed=21, epochs=30, learning_rate=3e-3, distortion=MILD, width=3),
    "digits-y": Training(seed=22, epochs=30, learning_rate=3e-3, distortion=MILD, width=3),
}


def train(name: str, images: Images, start: DigitNet | None, notify: Notify) -> DigitNet:
    """Train the network `name` as `TRAININGS` says, every image distorted anew in every epoch."""
    training = TRAININGS[name]
    torch.manual_seed(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    network = DigitNet(training.width)
    if start is not None:
        network.load_state_dict(start.state_dict())
    optimiser = torch.optim.Adam(network.parameters(), lr=training.learning_rate, weight_decay=1e-4)
    batches = -(-len(images) // BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, training.learning_rate, total_steps=training.epochs * batches
    )
    network.train()
    for epoch in range(training.epochs):
        pixels = training.distortion(images.pixels, generator)
        for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH_ROWS):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(network(pixels[batch]), images.digits[batch])
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        notify(f"train {name}", epoch + 1, training.epochs)
    return network.eval()


def held_out_accuracy(network: DigitNet, images: Images) -> float:
    """Share of `images` that the network names rightly."""
    with torch.no_grad():
        return accuracy(network(images.pixels).numpy(), images.digits.numpy())
