"""Our model behind lm-evaluation-harness's interface; importing this module registers it as `gpt-ladder`.

Prompts, splitting and metrics are the harness's own. Tokens, cuts and prefixes are those of its `hf` model on the
exported Hugging Face folder: contexts are cut on the left, and the end-of-text token stands for an empty context.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.errors import InputError
from model.checkpoint import check_device, find_checkpoint, load_model
from model.generate import DTYPES
from model.generation.decoding import CachedPasses, Row, WholePasses, generate_rows
from model.generation.sampling import Sampling
from model.generation.text_stream import Continuation
from model.gpt import GPT
from model.hf.folder import is_hugging_face
from train.losses import token_losses
from train.processes.group import ProcessGroup

DEFAULT_MAX_TOKENS = 256  # lm-eval's own default for a task that sets no limit
KNOWN_SETTINGS = {"do_sample", "temperature", "top_k", "top_p", "min_p"}

_group = ProcessGroup(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def use(group: ProcessGroup) -> None:
    """Set the processes that share the harness's requests; each holds the whole model."""
    global _group
    _group = group


@register_model("gpt-ladder")
class LadderLM(TemplateLM):
    """A run, checkpoint or Hugging Face folder (`path`) in fp32 or bf16; the other arguments are lm-eval's flags."""

    def __init__(
        self,
        path: str,
        dtype: str = "fp32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"--dtype {dtype!r} must be {' or '.join(DTYPES)}")
        size = str(batch_size or 1)
        if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size) >= 1):
            raise InputError(
                f"--batch_size {batch_size} must be a number of at least 1; automatic batch sizes do not exist here"
            )
        if max_batch_size is not None:
            raise InputError(f"--max_batch_size {max_batch_size} is for --batch_size auto, which does not exist here")
        check_device(device or "cpu")
        self._group = _group
        self._rank, self._world_size = _group.rank, _group.world
        self._device = torch.device(device) if device is not None else _group.device
        name = self._group.on_main(lambda: path if is_hugging_face(Path(path)) else str(find_checkpoint(path)))
        self.trained = load_model(name, device=self._device, dtype=DTYPES[dtype])
        self.batch_size = int(size)
        self._seeds = itertools.count(_group.rank, _group.world)  # of samples: different for each, on all ranks

    @property
    def max_length(self) -> int:
        return self.trained.model.config.context_len

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name in the harness's cache of requests."""
        return str(self.trained.tokenizer.describe()["sha256"])

    @property
    def eot_token_id(self) -> int:
        eot_id = self.trained.tokenizer.eot_id
        if eot_id is None:
            kind = self.trained.tokenizer.describe()["kind"]
            raise InputError(
                f"this task has text without a context, but the tokenizer ({kind}) has no end-of-text token"
            )
        return eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the text's ids; nothing is added, and special tokens are plain text."""
        ids: list[int] = self.trained.tokenizer.encode(string).tolist()
        return ids

    def _progress(self, num_requests: int, label: str, disable: bool) -> "tqdm[None]":
        return tqdm(total=num_requests, desc=label, disable=disable or self.rank != 0 or None)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether all its tokens are the likeliest.

        The longest go first, so that a lack of memory shows at once.
        """
        scores: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with self._progress(len(requests), "loglikelihood", disable_tqdm) as progress:
            for numbers in _batches(order, self.batch_size):
                scores |= zip(numbers, self._scored([requests[i][1:] for i in numbers]), strict=True)
                progress.update(len(numbers))
                for i in numbers:
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
        return [scores[i] for i in range(len(requests))]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        model = self.trained.model
        for _, after in pairs:
            if len(after) > self.max_length:
                raise InputError(f"a continuation takes {len(after)} tokens, more than the context, {self.max_length}")
        rows = [torch.tensor((before + after)[-(self.max_length + 1) :]) for before, after in pairs]
        inputs_BT = pad_sequence([row[:-1] for row in rows], batch_first=True)
        targets_BT = pad_sequence([row[1:] for row in rows], batch_first=True)
        is_scored_BT = torch.zeros_like(targets_BT, dtype=torch.bool)
        for b, (row, (_, after)) in enumerate(zip(rows, pairs, strict=True)):
            is_scored_BT[b, len(row) - 1 - len(after) : len(row) - 1] = True
        x_ND = model.hidden_states(inputs_BT.to(self._device))[is_scored_BT.to(self._device)]
        targets_N = targets_BT[is_scored_BT].to(self._device)
        logits_NV = model.lm_head(x_ND)
        vocab_size = model.config.vocab_size
        losses_N = token_losses(logits_NV, targets_N, vocab_size, model.config.softcap)
        is_likeliest_N = logits_NV[:, :vocab_size].argmax(dim=1) == targets_N
        lengths = [len(after) for _, after in pairs]
        parts = zip(losses_N.double().cpu().split(lengths), is_likeliest_N.cpu().split(lengths), strict=True)
        return [(-losses.sum().item(), bool(is_likeliest.all())) for losses, is_likeliest in parts]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in windows of the context; the first token follows end of text."""
        totals = []
        with self._progress(len(requests), "loglikelihood_rolling", disable_tqdm) as progress:
            for request in requests:
                (text,) = request.args
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = [(None, *make_disjoint_window(window)) for window in windows]
                scores = self._loglikelihood_tokens(pairs, disable_tqdm=True)
                totals.append(sum(loglikelihood for loglikelihood, _ in scores))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
                progress.update()
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to end of text, a stop string of the task, or its number of tokens."""
        texts: list[str] = []
        with self._progress(len(requests), "generate_until", disable_tqdm) as progress:
            for settings, group in itertools.groupby(requests, key=lambda request: request.args[1]):
                for batch in _batches(list(group), self.batch_size):
                    batch_texts = self._continued([request.args[0] for request in batch], settings)
                    for request, text in zip(batch, batch_texts, strict=True):
                        self.cache_hook.add_partial("generate_until", request.args, text)
                    texts += batch_texts
                    progress.update(len(batch))
        return texts

    def _continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(settings, DEFAULT_MAX_TOKENS)
        stop_strings, max_tokens = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        unknown = options.keys() - KNOWN_SETTINGS
        if unknown:
            raise InputError(f"this task generates with {', '.join(sorted(unknown))}, which this model does not have")
        room = self.max_length - max_tokens
        if room < 1:
            raise InputError(
                f"this task generates {max_tokens} tokens, which the context of {self.max_length} has no room for; "
                "set --gen_kwargs max_gen_toks=N"
            )
        rows, continuations = [], []
        for context in contexts:
            tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            rows.append(Row(tokens, torch.Generator().manual_seed(next(self._seeds))))
            continuations.append(Continuation(self.trained.tokenizer, max_tokens=max_tokens, stop_strings=stop_strings))
        model = self.trained.model
        passes = CachedPasses(model, num_rows=len(rows)) if isinstance(model, GPT) else WholePasses(model)
        temperature = options.get("temperature", 1.0 if options["do_sample"] else 0.0)
        sampling = Sampling(temperature, options.get("top_k"), options.get("top_p"), options.get("min_p"))
        for tokens_B in generate_rows(passes, rows, sampling=sampling):
            for row, continuation, token in zip(rows, continuations, tokens_B, strict=True):
                if token is not None:
                    continuation.add(token)
                    row.is_done = continuation.stopped_by is not None
        return [continuation.text for continuation in continuations]

    # The harness gathers its ranks' results through these three.

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._group.gather(tensor.cpu()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        gathered = self._group.gather(obj)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        self._group.barrier()


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
