"""The loss as a sum, without padding."""

import torch

from train.losses import IGNORED, summed_cross_entropy


def test_padding_columns_do_not_exist() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BTV = torch.randn(2, 3, 8, generator=generator)
    targets_BT = torch.tensor([[0, 4, 2], [1, IGNORED, 3]])
    expected = sum(
        -logits_BTV[b, t, :5].log_softmax(0)[targets_BT[b, t]] for b in range(2) for t in range(3) if (b, t) != (1, 1)
    )
    with_huge_padding = logits_BTV.clone()
    with_huge_padding[..., 5:] = 1e4
    torch.testing.assert_close(summed_cross_entropy(with_huge_padding, targets_BT, 5), torch.as_tensor(expected))


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits_BTV = torch.randn(4, 64, 40).bfloat16()
    targets_BT = torch.randint(40, (4, 64))
    loss = summed_cross_entropy(logits_BTV, targets_BT, 40)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, summed_cross_entropy(logits_BTV.float(), targets_BT, 40))
