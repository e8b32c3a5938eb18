"""A GPT's passes, read and changed from outside: what a head looks at, what each layer would say, what a part is for.

The model's code knows nothing of this. Each function registers forward hooks for one pass and removes them, also when
the pass raises; before and after it the model is as it was, and a pass that nobody looks into has none. Letters as in
model/gpt.py. The residual stream is counted from 0, what the first block reads, to L, what the last one leaves.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from model.gpt import GPT, Attention, Block, Shared, attention_weights

PASS_TOKENS = 8_192  # at most in one pass of many rows, so that memory does not grow with their number

Edit = Callable[[Tensor], Tensor]


# --- Hooks ------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Within it, `module` reads edit(x) for its first argument x."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (edit(args[0]), *args[1:])

    with module.register_forward_pre_hook(hook):
        yield


@contextmanager
def giving(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Within it, `module` gives edit(y) for its result y."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return edit(y)

    with module.register_forward_hook(hook):
        yield


class Parts(NamedTuple):
    """Of a block, typed."""

    attention: Attention
    mlp: nn.Module


def parts_of(model: GPT, layer: int) -> Parts:
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return Parts(block.attn, block.mlp)


def stream_readers(model: GPT) -> list[nn.Module]:
    """What reads the residual stream at 0, 1, ..., L: each block, and what stands before the head."""
    return [*model.blocks, model.transformer["ln_f"]]


def head_columns(model: GPT, head: int) -> slice:
    """Where a head's result stands among those that c_proj reads."""
    return slice(head * model.config.head_size, (head + 1) * model.config.head_size)


def inputs_of(model: GPT, modules: Sequence[nn.Module], tokens_BT: Tensor) -> Tensor:
    """What each of these modules, in the order of the pass, reads of [B, T, D]: [len(modules), B, T, D]."""
    found: list[Tensor] = []

    def keep(x_BTD: Tensor) -> Tensor:
        found.append(x_BTD)
        return x_BTD

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(reading(module, keep))
        model.hidden_states(tokens_BT)
    return torch.stack(found)


# --- Read -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def see_attention(model: GPT, tokens_BT: Tensor, see: Callable[[int, Tensor], None]) -> Tensor:
    """A pass, [B, T, vocabulary], in which see(layer, weights_BHTT) has the attention weights of each layer in turn.

    They are computed beside the pass, in fp32 and with all scores in memory, of the queries and keys that it makes;
    rows add up to 1.
    """

    def hook_of(layer: int) -> Callable[[Attention, tuple[Tensor, Shared]], None]:
        def hook(attention: Attention, args: tuple[Tensor, Shared]) -> None:
            x_BTD, shared = args
            q_BHTK, k_BHTK, _ = attention.queries_keys_values(x_BTD, shared)
            see(layer, attention_weights(q_BHTK.float(), k_BHTK.float(), _hidden(x_BTD, shared)))

        return hook

    with ExitStack() as stack:
        for layer in range(len(model.blocks)):
            stack.enter_context(parts_of(model, layer).attention.register_forward_pre_hook(hook_of(layer)))
        return scored(model, model.hidden_states(tokens_BT))


def _hidden(x_BTD: Tensor, shared: Shared) -> Tensor:
    """What a token does not see: the future, and with flex other documents. Bool, [T, T] or [B, 1, T, T]."""
    B, T, _ = x_BTD.shape
    if shared.mask is None:
        return torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).triu(1)
    return ~create_mask(shared.mask.mask_mod, B, None, T, T, device=str(x_BTD.device))


def scored(model: GPT, x: Tensor) -> Tensor:
    """The head's logits of features [..., D], fp32, without the vocabulary's padding."""
    return model.logits(x)[..., : model.config.vocab_size].float()


@torch.no_grad()
def streams(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The residual stream at 0 to L: [L + 1, B, T, D]."""
    return inputs_of(model, stream_readers(model), tokens_BT)


@torch.no_grad()
def lens_logits(model: GPT, x: Tensor) -> Tensor:
    """What the model would say if its blocks ended with this stream [..., D]: nostalgebraist 2020, "interpreting GPT:
    the logit lens". Where norms stand after the additions there is none before the head, nor here."""
    return scored(model, model.transformer["ln_f"](x))


@torch.no_grad()
def losses(model: GPT, windows_BS: Tensor) -> Tensor:
    """Of each token but a row's first, given those before it, in nats: [B, S - 1]."""
    found = []
    for some_BS in windows_BS.split(rows_per_pass(windows_BS.shape[1])):
        logits_BTV = scored(model, model.hidden_states(some_BS[:, :-1]))
        found.append(F.cross_entropy(logits_BTV.transpose(1, 2), some_BS[:, 1:], reduction="none"))
    return torch.cat(found)


def rows_per_pass(num_tokens: int) -> int:
    return max(1, PASS_TOKENS // num_tokens)


# --- Leave out --------------------------------------------------------------------------------------------------------


class Replacements(NamedTuple):
    """What stands for the results of parts that are left out: of all heads side by side, and of the MLP."""

    heads_LD: Tensor
    mlp_LD: Tensor


def zeros(model: GPT) -> Replacements:
    found = torch.zeros(len(model.blocks), model.config.width, device=model.lm_head.weight.device)
    return Replacements(found, found)


@torch.no_grad()
def means(model: GPT, windows_BS: Tensor) -> Replacements:
    """Of each part's results over all tokens that `losses` of these windows gives to the model."""
    shape = (len(model.blocks), model.config.width)
    heads_LD, mlp_LD = torch.zeros(2, *shape, dtype=torch.float64, device=model.lm_head.weight.device)

    def adding_to(sum_D: Tensor) -> Edit:
        def add(y_BTD: Tensor) -> Tensor:
            sum_D.add_(y_BTD.double().sum(dim=(0, 1)))
            return y_BTD

        return add

    with ExitStack() as stack:
        for layer in range(len(model.blocks)):
            attention, mlp = parts_of(model, layer)
            stack.enter_context(reading(attention.c_proj, adding_to(heads_LD[layer])))
            stack.enter_context(giving(mlp, adding_to(mlp_LD[layer])))
        losses(model, windows_BS)
    num_tokens = windows_BS[:, 1:].numel()
    return Replacements((heads_LD / num_tokens).float(), (mlp_LD / num_tokens).float())


@contextmanager
def without_head(model: GPT, layer: int, head: int, instead: Replacements) -> Iterator[None]:
    """Within it the head gives the same, `instead`, everywhere. With zeros that is the model in which the columns of
    c_proj that read it are 0."""
    columns = head_columns(model, head)

    def edit(y_BTD: Tensor) -> Tensor:
        y_BTD = y_BTD.clone()
        y_BTD[..., columns] = instead.heads_LD[layer, columns].to(y_BTD.dtype)
        return y_BTD

    with reading(parts_of(model, layer).attention.c_proj, edit):
        yield


@contextmanager
def without_mlp(model: GPT, layer: int, instead: Replacements) -> Iterator[None]:
    """Within it the layer's MLP, its last bias too, gives the same, `instead`, everywhere."""

    def edit(y_BTD: Tensor) -> Tensor:
        return instead.mlp_LD[layer].to(y_BTD.dtype).expand_as(y_BTD)

    with giving(parts_of(model, layer).mlp, edit):
        yield


def losses_without_each(
    model: GPT, windows_BS: Tensor, instead: Replacements, *, mlps: bool = True
) -> Iterator[tuple[int, int | None, Tensor]]:
    """(layer, head, `losses` without it) of every head, and (layer, None, ...) of every MLP."""
    for layer in range(len(model.blocks)):
        for head in range(model.config.num_heads):
            with without_head(model, layer, head, instead):
                found_BT = losses(model, windows_BS)
            yield layer, head, found_BT
        if mlps:
            with without_mlp(model, layer, instead):
                found_BT = losses(model, windows_BS)
            yield layer, None, found_BT


# --- Patch ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_stream(model: GPT, clean_T: Tensor, corrupt_T: Tensor, answers: Sequence[int]) -> Tensor:
    """The corrupt prompt's last logits of some ids, [L + 1, T, answers], when the stream at l of token t is the clean
    prompt's: activation patching (Meng et al. 2022, "causal tracing"; Zhang & Nanda 2023). The first block's values,
    which --model.value-residual hands to the others beside the stream, are the clean prompt's at l = 0 alone."""
    T = len(clean_T)
    clean_LTD = streams(model, clean_T[None])[:, 0]
    found = []
    for module, clean_TD in zip(stream_readers(model), clean_LTD, strict=True):
        by_place = []
        for positions in torch.arange(T, device=clean_T.device).split(rows_per_pass(T)):
            logits_RV = _last_logits(model, corrupt_T, module, positions, _patch_places(clean_TD, positions))
            by_place.append(logits_RV[:, list(answers)])
        found.append(torch.cat(by_place))
    return torch.stack(found)


def _patch_places(clean_TD: Tensor, positions: Tensor) -> Edit:
    def edit(x_RTD: Tensor) -> Tensor:
        x_RTD = x_RTD.clone()
        x_RTD[torch.arange(len(positions), device=positions.device), positions] = clean_TD[positions]
        return x_RTD

    return edit


@torch.no_grad()
def patch_heads(model: GPT, clean_T: Tensor, corrupt_T: Tensor, answers: Sequence[int]) -> Tensor:
    """The same, [L, H, answers], when a head's results at all tokens are the clean prompt's."""
    projections = [parts_of(model, layer).attention.c_proj for layer in range(len(model.blocks))]
    clean_LTD = inputs_of(model, projections, clean_T[None])[:, 0]
    found = []
    for module, clean_TD in zip(projections, clean_LTD, strict=True):
        by_head = []
        for heads in torch.arange(model.config.num_heads).split(rows_per_pass(len(clean_T))):
            logits_RV = _last_logits(model, corrupt_T, module, heads, _patch_columns(model, clean_TD, heads))
            by_head.append(logits_RV[:, list(answers)])
        found.append(torch.cat(by_head))
    return torch.stack(found)


def _patch_columns(model: GPT, clean_TD: Tensor, heads: Tensor) -> Edit:
    def edit(y_RTD: Tensor) -> Tensor:
        y_RTD = y_RTD.clone()
        for row, head in enumerate(heads.tolist()):
            columns = head_columns(model, head)
            y_RTD[row, :, columns] = clean_TD[:, columns]
        return y_RTD

    return edit


def _last_logits(model: GPT, tokens_T: Tensor, module: nn.Module, rows: Tensor, edit: Edit) -> Tensor:
    """Of a pass in which `module` reads edit(x), with a row of the tokens for each of `rows`."""
    with reading(module, edit):
        return last_logits(model, tokens_T.expand(len(rows), -1))


@torch.no_grad()
def last_logits(model: GPT, tokens_BT: Tensor) -> Tensor:
    """What follows each row: [B, vocabulary]."""
    return scored(model, model.hidden_states(tokens_BT)[:, -1])
