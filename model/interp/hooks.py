"""Read and change the activations of a GPT's forward pass from outside, with forward hooks.

The functions return attention weights, the residual stream, the logit lens, and losses or logits with a part ablated or
patched. The model's code knows nothing of this. Each function registers its hooks for one pass and removes them, also
if the pass raises, so that every other pass runs without hooks. Shape letters are those of model/gpt.py. Residual
stream 0 is the input of the first block, and stream L the output of the last one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from torch.utils.hooks import RemovableHandle

from model.gpt import GPT, Attention, Block, Shared, attention_weights, hidden_tokens

PASS_TOKENS = 8_192  # tokens in one pass of many rows, so that memory does not grow with the number of rows

Edit = Callable[[Tensor], Tensor]


# --- Hooks ------------------------------------------------------------------------------------------------------------


def edited_input(module: nn.Module, edit: Edit) -> RemovableHandle:
    """Return a context in which `module` gets edit(x) in place of its first argument x."""
    return module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))


def edited_output(module: nn.Module, edit: Edit) -> RemovableHandle:
    """Return a context in which edit(y) is in place of the output y of `module`."""
    return module.register_forward_hook(lambda _, __, y: edit(y))


class Parts(NamedTuple):
    """The attention and the MLP of one block, with their types."""

    attention: Attention
    mlp: nn.Module


def parts_of(model: GPT, layer: int) -> Parts:
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return Parts(block.attn, block.mlp)


def stream_readers(model: GPT) -> list[nn.Module]:
    """Return the modules that read residual streams 0, 1, ..., L: each block, then the norm before the output head."""
    return [*model.blocks, model.transformer["ln_f"]]


def inputs_of(model: GPT, modules: Sequence[nn.Module], tokens_BT: Tensor) -> Tensor:
    """Return the input of each module, [len(modules), B, T, D]. The modules are in the order in which they run."""
    inputs: list[Tensor] = []

    def keep(x_BTD: Tensor) -> Tensor:
        inputs.append(x_BTD)
        return x_BTD

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(edited_input(module, keep))
        model.hidden_states(tokens_BT)
    return torch.stack(inputs)


# --- Read -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_attention(model: GPT, tokens_BT: Tensor, on_weights: Callable[[int, Tensor], None]) -> Tensor:
    """Return the logits of a pass, [B, T, vocabulary]; call on_weights(layer, weights_BHTT) for each layer in turn.

    The weights are computed beside the pass from its queries and keys, in fp32 and with all scores in memory. Each row
    adds up to 1.
    """

    def hook(layer: int, attention: Attention, args: tuple[Tensor, Shared]) -> None:
        x_BTD, shared = args
        q_BHTK, k_BHTK, _ = attention.queries_keys_values(x_BTD, shared)
        on_weights(layer, attention_weights(q_BHTK.float(), k_BHTK.float(), _masked(x_BTD, attention, shared)))

    with ExitStack() as stack:
        for layer in range(len(model.blocks)):
            stack.enter_context(parts_of(model, layer).attention.register_forward_pre_hook(partial(hook, layer)))
        return vocab_logits(model, model.hidden_states(tokens_BT))


def _masked(x_BTD: Tensor, attention: Attention, shared: Shared) -> Tensor:
    """Return where attention is masked, with flex in other documents too: bool, [T, T] or [B, 1, T, T]."""
    B, T, _ = x_BTD.shape
    if shared.mask is None:
        return hidden_tokens(T, attention.window, x_BTD.device)
    return ~create_mask(shared.mask.mask_mod, B, None, T, T, device=str(x_BTD.device))


def vocab_logits(model: GPT, x: Tensor) -> Tensor:
    """Return the fp32 logits of hidden states [..., D], without the vocabulary's padding."""
    return model.logits(x)[..., : model.config.vocab_size].float()


@torch.no_grad()
def residual_streams(model: GPT, tokens_BT: Tensor) -> Tensor:
    """Return residual streams 0 to L: [L + 1, B, T, D]."""
    return inputs_of(model, stream_readers(model), tokens_BT)


@torch.no_grad()
def lens_logits(model: GPT, x: Tensor) -> Tensor:
    """Return the logits that the model would have if its blocks ended with this residual stream [..., D].

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens". A post-norm model has no norm before the output
    head, so none is applied here.
    """
    return vocab_logits(model, model.transformer["ln_f"](x))


@torch.no_grad()
def losses(model: GPT, sequences_BS: Tensor) -> Tensor:
    """Return the loss of every token except each row's first, in nats: [B, S - 1]."""
    losses_of_passes = []
    for pass_BS in sequences_BS.split(rows_per_pass(sequences_BS.shape[1])):
        logits_BTV = vocab_logits(model, model.hidden_states(pass_BS[:, :-1]))
        losses_of_passes.append(F.cross_entropy(logits_BTV.transpose(1, 2), pass_BS[:, 1:], reduction="none"))
    return torch.cat(losses_of_passes)


def rows_per_pass(num_tokens: int) -> int:
    """Return how many rows of `num_tokens` tokens fit into one pass."""
    return max(1, PASS_TOKENS // num_tokens)


# --- Ablate -----------------------------------------------------------------------------------------------------------


class Replacements(NamedTuple):
    """The outputs that ablated parts get: of all heads of a layer side by side, and of its MLP."""

    heads_LD: Tensor
    mlp_LD: Tensor


def zero_replacements(model: GPT) -> Replacements:
    zeros_LD = torch.zeros(len(model.blocks), model.config.width, device=model.lm_head.weight.device)
    return Replacements(zeros_LD, zeros_LD)


@torch.no_grad()
def mean_replacements(model: GPT, sequences_BS: Tensor) -> Replacements:
    """Return the mean output of each part over all tokens that `losses(model, sequences_BS)` gives to the model."""
    shape = (len(model.blocks), model.config.width)
    heads_LD, mlp_LD = torch.zeros(2, *shape, dtype=torch.float64, device=model.lm_head.weight.device)

    def add_to(sum_D: Tensor) -> Edit:
        def add(y_BTD: Tensor) -> Tensor:
            sum_D.add_(y_BTD.double().sum(dim=(0, 1)))
            return y_BTD

        return add

    with ExitStack() as stack:
        for layer in range(len(model.blocks)):
            attention, mlp = parts_of(model, layer)
            stack.enter_context(edited_input(attention.c_proj, add_to(heads_LD[layer])))
            stack.enter_context(edited_output(mlp, add_to(mlp_LD[layer])))
        losses(model, sequences_BS)
    num_tokens = sequences_BS[:, 1:].numel()
    return Replacements((heads_LD / num_tokens).float(), (mlp_LD / num_tokens).float())


def without_head(model: GPT, layer: int, head: int, replacements: Replacements) -> RemovableHandle:
    """Return a context in which the head's output is replaced at every token.

    With zeros this equals zeroing the columns of c_proj that read the head.
    """
    columns = slice(head * model.config.head_size, (head + 1) * model.config.head_size)

    def edit(y_BTD: Tensor) -> Tensor:
        y_BTD = y_BTD.clone()
        y_BTD[..., columns] = replacements.heads_LD[layer, columns].to(y_BTD.dtype)
        return y_BTD

    return edited_input(parts_of(model, layer).attention.c_proj, edit)


def without_mlp(model: GPT, layer: int, replacements: Replacements) -> RemovableHandle:
    """Return a context in which the output of the layer's MLP, with its last bias, is replaced at every token."""
    return edited_output(parts_of(model, layer).mlp, lambda y: replacements.mlp_LD[layer].to(y.dtype).expand_as(y))


def losses_without_each(
    model: GPT, sequences_BS: Tensor, replacements: Replacements, *, mlps: bool = True
) -> Iterator[tuple[int, int | None, Tensor]]:
    """Yield (layer, head, losses without that head) for every head, and with head None for every MLP."""
    for layer in range(len(model.blocks)):
        for head in range(model.config.num_heads):
            with without_head(model, layer, head, replacements):
                losses_BT = losses(model, sequences_BS)
            yield layer, head, losses_BT
        if mlps:
            with without_mlp(model, layer, replacements):
                losses_BT = losses(model, sequences_BS)
            yield layer, None, losses_BT


# --- Patch ------------------------------------------------------------------------------------------------------------


def patch_stream(model: GPT, clean_T: Tensor, corrupt_T: Tensor, answers: Sequence[int]) -> Tensor:
    """Return the corrupt prompt's last logits of the answers, with each residual stream patched: [L + 1, T, answers].

    At [l, t] stream l of token t comes from the clean prompt: activation patching (Meng et al. 2022, "causal tracing";
    Zhang & Nanda 2023). Some switches let blocks read more than the stream, and what they read so is not patched. With
    --model.value-residual these are the first block's values, with --model.skips outputs of earlier blocks, which are
    the clean prompt's only at l = 0. With --model.embedding-shortcut and --model.value-embeddings these are the corrupt
    prompt's own embedding and rows, also at l = 0.
    """
    is_patched_NTD = torch.eye(len(clean_T), dtype=torch.bool)[:, :, None]
    return _patched_logits(model, stream_readers(model), is_patched_NTD, clean_T, corrupt_T, answers)


def patch_heads(model: GPT, clean_T: Tensor, corrupt_T: Tensor, answers: Sequence[int]) -> Tensor:
    """Return the same logits with one head's outputs at all tokens from the clean prompt: [L, H, answers]."""
    projections = [parts_of(model, layer).attention.c_proj for layer in range(len(model.blocks))]
    is_head_ND = torch.eye(model.config.num_heads, dtype=torch.bool).repeat_interleave(model.config.head_size, dim=1)
    return _patched_logits(model, projections, is_head_ND[:, None], clean_T, corrupt_T, answers)


@torch.no_grad()
def _patched_logits(
    model: GPT,
    modules: Sequence[nn.Module],
    is_patched_NTD: Tensor,
    clean_T: Tensor,
    corrupt_T: Tensor,
    answers: Sequence[int],
) -> Tensor:
    """Return the logits with each of N parts of each module's input from the clean prompt, [modules, N, answers]."""
    is_patched_NTD = is_patched_NTD.to(clean_T.device)
    logits = []
    for module, clean_1TD in zip(modules, inputs_of(model, modules, clean_T[None]), strict=True):
        for is_patched_RTD in is_patched_NTD.split(rows_per_pass(len(clean_T))):

            def edit(x_RTD: Tensor, is_patched: Tensor = is_patched_RTD, clean: Tensor = clean_1TD) -> Tensor:
                return torch.where(is_patched, clean, x_RTD)

            with edited_input(module, edit):
                logits.append(last_logits(model, corrupt_T.expand(len(is_patched_RTD), -1))[:, list(answers)])
    return torch.cat(logits).view(len(modules), len(is_patched_NTD), len(answers))


@torch.no_grad()
def last_logits(model: GPT, tokens_BT: Tensor) -> Tensor:
    """Return the logits after the last token of each row: [B, vocabulary]."""
    return vocab_logits(model, model.hidden_states(tokens_BT)[:, -1])
