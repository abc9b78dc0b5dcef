"""Train one network, move its training onto another start, and compare with training that one too."""

import torch

import regraft
from regraft.data import load
from regraft.networks import papers as networks
from regraft.training.evaluation import accuracy
from regraft.training.loop import Recipe, train

data = load("digits")
model = networks.digits_conv(data.num_classes)  # any classifier: timm's, torchvision's, your own
seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]

theta_1_start = networks.initialise(model, seeds[0])
theta_1_end = train(model, theta_1_start, data, Recipe(epochs=15, lr=0.05), generator=seeds[1]).tensors
theta_2_start = networks.initialise(model, seeds[2])

path = regraft.Trajectory.linear(theta_1_start, theta_1_end, steps=10)
moved = regraft.transfer(
    model,
    path,
    theta_2_start,
    data.train.batches(128, generator=seeds[3], drop_last=True),
    method="fgmt",
    validation=data.validation.batches(500),
)

test = data.test.batches(500)
print(f"source, trained:              {accuracy(model, theta_1_end, test):.3f}")
print(f"second network, as it starts: {accuracy(model, theta_2_start, test):.3f}")
print(f"second network, transferred:  {accuracy(model, moved.params, test):.3f} in {moved.cost.cpu:.1f} CPU seconds")
