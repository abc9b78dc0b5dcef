"""Match two layers with the kernels alone: nothing of regraft but `regraft_kernels` is imported."""

import torch

import regraft_kernels as rk

shapes = {"fc1.weight": (64, 32), "fc1.bias": (64,), "fc2.weight": (10, 64)}
axes = {"fc1.weight": ("hidden", None), "fc1.bias": ("hidden",), "fc2.weight": (None, "hidden")}
packing = rk.Packing.build(shapes=shapes, axes=axes)

a = {name: torch.randn(shape) for name, shape in shapes.items()}
secret = {"hidden": torch.randperm(64)}
b = rk.permute(a, secret, packing)  # the same function, its units in another order

terms = [rk.Term(a[name][None], b[name][None], axes[name].index("hidden")) for name in shapes]
found = rk.assign(rk.similarity(terms))
back = rk.permute(b, {"hidden": torch.as_tensor(found.perm)}, packing)
mean = rk.combine([a, back], [[0.5, 0.5]])

print("all units found:", all(torch.equal(a[name], back[name]) for name in a))
print("the mean is the network:", all(torch.allclose(mean[name][0], a[name]) for name in a))
