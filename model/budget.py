"""What a model costs: parameters, FLOPs and bytes, counted structurally, matrix by matrix.

One source for the run card, the meters and every plan. Matmul FLOPs equal torch.utils.flop_counter's.
"""

from dataclasses import dataclass

from model.config import ModelConfig

FP32_BYTES = 4


@dataclass(frozen=True)
class Budget:
    """num_parameters: without vocabulary padding. flops_per_token: forward and backward, at full context."""

    num_parameters: int
    num_padding_parameters: int
    flops_per_token: int
    gradient_bytes: int
    state_bytes: int
    checkpoint_bytes: int


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Trained parameters by component, vocabulary padding left out, the tied head counted once."""
    D, F, L = config.width, config.hidden_size, config.num_layers
    return {
        "token embedding": config.vocab_size * D,
        "position embedding": config.context_len * D,
        "attention": L * ((D * 3 * D + 3 * D) + (D * D + D)),
        "mlp": L * ((D * F + F) + (F * D + D)),
        "norms": (2 * L + 1) * 2 * D,
    }


def count_forward_flops(config: ModelConfig, *, batch: int, seq_len: int) -> dict[str, int]:
    """Floating-point operations of the matrix products of one forward pass, 2 per multiply-add.

    Attention scores are counted in full, not halved for the causal mask, as in Chowdhery et al. 2022 (PaLM),
    appendix B, and as flop_counter counts them. The head is counted with its padding, which is computed.
    """
    D, F, L, T = config.width, config.hidden_size, config.num_layers, seq_len
    tokens = batch * seq_len
    return {
        "attention projections": 2 * tokens * L * (D * 3 * D + D * D),
        "attention scores": 2 * tokens * L * T * D,
        "attention values": 2 * tokens * L * T * D,
        "mlp": 2 * tokens * L * 2 * D * F,
        "head": 2 * tokens * D * config.padded_vocab_size,
    }


def budget(config: ModelConfig) -> Budget:
    """The totals. The backward pass is two forward passes' FLOPs: one product per operand."""
    parameters = sum(count_parameters(config).values())
    padding = (config.padded_vocab_size - config.vocab_size) * config.width
    forward = sum(count_forward_flops(config, batch=1, seq_len=config.context_len).values())
    held = parameters + padding
    return Budget(
        num_parameters=parameters,
        num_padding_parameters=padding,
        flops_per_token=3 * forward // config.context_len,
        gradient_bytes=FP32_BYTES * held,
        state_bytes=4 * FP32_BYTES * held,  # weights, gradients, AdamW's two moments
        checkpoint_bytes=3 * FP32_BYTES * held,  # all of these but the gradients
    )
