"""How long training steps alone take, after warm-up: for `images_per_second` and for the warning of steps gone slow."""

import time
from contextlib import contextmanager

import torch

from data import synchronize
from engine.job import JobState
from engine.pace import Pace


class StepClock:
    """Counts seconds and images of steps into a run's state; validation, checkpoints and the warm-up are left out."""

    def __init__(self, device: torch.device, state: JobState, pace: Pace, warmup: int) -> None:
        """`warmup` is the step at which counting begins."""
        self.device, self.state, self.pace, self.warmup = device, state, pace, warmup
        self.began, self.images = time.perf_counter(), 0
        self.running = False  # from the start of an epoch's steps to their end

    def start_epoch(self) -> None:
        """Steps follow."""
        self.running = True
        self.began, self.images = time.perf_counter(), 0
        self.pace.go_on()

    def end_warmup(self) -> None:
        """Forget the steps so far."""
        synchronize(self.device)
        self.began, self.images = time.perf_counter(), 0
        self.pace.restart()

    def count(self, images: int) -> None:
        """A step has been made on so many images."""
        self.images += images
        self.pace.step(images)

    def end_epoch(self) -> None:
        """No step follows at once: add what was counted, if that was after the warm-up."""
        synchronize(self.device)
        self.running = False
        self.pace.pause()
        if self.state.step > self.warmup:
            self.state.steps_seconds += time.perf_counter() - self.began
            self.state.steps_images += self.images

    @contextmanager
    def stopped(self):
        """The block does not count as training, if this is within an epoch."""
        if not self.running:
            yield
            return
        synchronize(self.device)
        self.pace.pause()
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused
        self.pace.go_on()

    def slow_down(self) -> str | None:
        """A warning where steps have become far slower, once."""
        return self.pace.check() if self.state.step > self.warmup + 1 else None
