"""FAST in a plain training loop: a zero classifier, two learning rates, and what the network is worth at any time."""

import torch

import regraft
from regraft.core.tensors import fill_
from regraft.data import DIGITS_HIGH, DIGITS_LOW, load
from regraft.networks import papers as networks
from regraft.training.loop import Recipe, train

source, target = load("digits", classes=DIGITS_LOW), load("digits", classes=DIGITS_HIGH)
model = networks.digits_conv(source.num_classes)
generator = torch.Generator().manual_seed(0)
start = networks.initialise(model, generator)
fill_(model, train(model, start, source, Recipe(epochs=15, lr=0.05), generator=generator).tensors)

adopted = regraft.fast.adopt(model, target.num_classes)
groups = regraft.fast.param_groups(model, head_lr=0.3, body_lr=0.01, head=adopted.head)
optimiser = torch.optim.SGD(groups, momentum=0.9)
recorder = regraft.fast.Recorder(
    model,
    validation=target.validation.batches(500),
    test=target.test.batches(500),
    head=adopted.name,
    source=regraft.fast.Source(adopted.source_head, source.test.batches(500)),
)
for _ in range(5):
    for images, labels in target.train.batches(64, generator=generator):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        recorder.after_step()

record = recorder.finish()
last = record.deployments[-1]
print(f"new task: {last.scores.top1:.3f} (area {record.area():.3f}); of the old one is left: {last.source.top1:.3f}")
