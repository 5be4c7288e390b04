"""How long training steps alone take: for `images_per_second`."""

import time

import torch

from data import synchronize
from engine.job import JobState


class StepClock:
    """Counts seconds and images of the steps after the warm-up into a run's state; nothing of what is done between them."""

    def __init__(self, device: torch.device, state: JobState, warmup: int) -> None:
        """`warmup` is the step at which counting begins."""
        self.device, self.state, self.warmup = device, state, warmup
        self.began: float | None = None  # while the clock runs
        self.images = 0  # since then

    def start(self) -> None:
        """Steps follow. What was not stopped is forgotten."""
        synchronize(self.device)
        self.began, self.images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """A step has been made on so many images."""
        self.images += images

    def stop(self) -> None:
        """No step follows at once: add what was counted, if that was after the warm-up."""
        if self.began is None:
            return
        synchronize(self.device)
        if self.state.step > self.warmup:
            self.state.steps_seconds += time.perf_counter() - self.began
            self.state.steps_images += self.images
        self.began = None
