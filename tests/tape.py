"What a training step does to its networks, recorded instead of done."
import torch


class Tape:
    "An optimizer that moves nothing and keeps the gradients of each step."
    def __init__(self, name, net, log): self.name, self.net, self.log = name, net, log
    def zero_grad(self): self.net.zero_grad()
    def step(self):
        parameters = self.net.named_parameters()
        self.log.append((self.name, {k: p.grad.clone() for k, p in parameters if p.grad is not None}))


def slopes(loss, net):
    "{parameter: gradient of `loss`}, of those that learn and that it depends on."
    named = {k: p for k, p in net.named_parameters() if p.requires_grad}
    found = zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True))
    return {k: g for k, g in found if g is not None}
