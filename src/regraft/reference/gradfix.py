"""GradFix, entry by entry and image by image (Rinaldi et al., arXiv 2510.09658)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regraft.core.tensors import Tensors


def vote_images(model: nn.Module, theta: Tensors, images: Tensor, labels: Tensor) -> Tensors:
    """Images that raise an entry's loss minus images that lower it, when the entry grows. In evaluation mode."""
    model.eval()
    votes = {name: torch.zeros_like(theta[name]) for name, _ in model.named_parameters()}
    for i in range(len(images)):
        leaves = {name: theta[name].detach().clone().requires_grad_() for name in votes}
        buffers = {name: theta[name] for name, _ in model.named_buffers()}
        logits = torch.func.functional_call(model, {**leaves, **buffers}, (images[i : i + 1],))
        nn.functional.cross_entropy(logits, labels[i : i + 1]).backward()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                votes[name] = votes[name] + (leaf.grad > 0).to(leaf.dtype) - (leaf.grad < 0).to(leaf.dtype)
    return votes


def transport_masked(theta_b: Tensors, tau: Tensors, g: Tensors, alpha: float) -> Tensors:
    """theta_B + alpha m tau, m = [tau g < 0]."""
    moved = {name: tensor.clone() for name, tensor in theta_b.items()}
    for name, tensor in tau.items():
        entries = zip(tensor.flatten().tolist(), g[name].flatten().tolist(), strict=True)
        m = [(t > 0 and s < 0) or (t < 0 and s > 0) for t, s in entries]
        moved[name] = moved[name] + alpha * torch.tensor(m).reshape(tensor.shape) * tensor
    return moved
