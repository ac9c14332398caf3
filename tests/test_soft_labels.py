import torch
import torch.nn.functional as F

from peco_ds.objectives.soft_labels import soft_label_cross_entropy


def test_hard_and_smoothed_labels_give_torchs_cross_entropy():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    hard = F.one_hot(labels, 5).float()
    torch.testing.assert_close(soft_label_cross_entropy(logits, hard)[0], F.cross_entropy(logits, labels))
    torch.testing.assert_close(
        soft_label_cross_entropy(logits, 0.9 * hard + 0.1 / 5)[0], F.cross_entropy(logits, labels, label_smoothing=0.1)
    )


def test_logits_in_16_bit_are_judged_in_32():
    logits = (torch.randn(4, 1000) * 20).bfloat16()
    targets = F.one_hot(torch.arange(4), 1000).float()
    loss, stats = soft_label_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), torch.arange(4)))
    assert float(stats["train_top1"]) == 100 * float((logits.argmax(1) == torch.arange(4)).float().mean())
