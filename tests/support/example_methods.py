"""Small methods that the engine's tests put through its hooks."""

import torch
from torch import nn

from coloss.train import Method


class ExtraHead(Method):
    """A second classifier on tapped features, a counter in a buffer, its own noise, and a JSON state."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.head = nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.term_weights = {"extra": weight}
        self.epochs = []

    def get_extra_state(self):
        return {"epochs": self.epochs}

    def set_extra_state(self, state):
        self.epochs = state["epochs"]

    def setup(self, state):
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=state.generator) * 0.1)
        state.tap("hidden", "3:input")

    def terms(self, state):
        hidden = state.features["hidden"]
        noise = torch.randn(hidden.shape, generator=state.local_generator, dtype=hidden.dtype)
        return {"extra": nn.functional.cross_entropy(self.head(hidden + 0.1 * noise), state.batch.targets)}

    def on_step(self, state):
        self.seen += len(state.batch)

    def on_epoch(self, state):
        self.epochs.append(state.step)


class Shrink(Method):
    """Decays weights after each step, and edits gradients before it."""

    def on_gradients(self, state):
        for parameter in state.trainable:
            if parameter.grad is not None:
                parameter.grad *= 0.5

    def on_step(self, state):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter *= 0.999
