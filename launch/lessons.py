"""The first lesson: gradient descent on mean(w^2), where nothing is hidden but the learning rate."""

import torch

RATES = (10.0, 100.0, 1000.0)
NUM_STEPS = 6


def descend(rate: float, num_steps: int = NUM_STEPS) -> list[float]:
    """The loss before each step t of rate / sqrt(t + 1), from 5 x normal numbers in a 10 x 10 matrix.

    The gradient is 2 w / 100, so the step multiplies every weight by 1 - 0.02 rate / sqrt(t + 1): below -1 the weights
    grow, until the decay has made the step small enough.
    """
    torch.manual_seed(42)
    weights = torch.nn.Parameter(5 * torch.randn(10, 10))
    losses = []
    for step in range(num_steps):
        loss = weights.square().mean()
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights.sub_(rate / (step + 1) ** 0.5 * gradient)
    return losses


def descent() -> str:
    """Markdown: a row for each learning rate, a column for each step."""
    header = "| rate | " + " | ".join(f"step {step}" for step in range(NUM_STEPS)) + " |"
    rows = [f"| {rate:g} | " + " | ".join(f"{loss:,.2f}" for loss in descend(rate)) + " |" for rate in RATES]
    return "\n".join([header, "|" + "---|" * (NUM_STEPS + 1), *rows]) + "\n"
