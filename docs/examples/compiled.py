"""torch.compile: attach to the compiled model before its first call; steps stay the same.

    python docs/examples/compiled.py --backend aot_eager

Needs regrad-xgrad and regrad-clipping. The backend aot_eager traces as torch.compile does
and is quick; leave it out for the kernels that are meant, which on CPUs takes a C++
compiler and half a minute.
"""

import argparse

import regrad
import torch
from torch import nn

# AGC leaves the classifier's weights alone. In a compiled model it cannot see which they are, so
# the layer is named.
CORRECTIONS = ["xgrad", "agc:max_ratio=0.02,head=2"]


def train(backend: str | None) -> tuple[nn.Module, regrad.Attachment]:
    """Train for ten steps; return the network and what was attached to it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    model = torch.compile(network, backend=backend) if backend else network
    attachment = regrad.attach(model, optimizer, CORRECTIONS)
    inputs = torch.randn(64, 20)
    targets = inputs[:, :5].argmax(dim=1)
    for _ in range(10):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return network, attachment


def main() -> None:
    """Compare the compiled training with the plain one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    (plain, _), (compiled, attachment) = train(None), train(parser.parse_args().backend)
    pairs = zip(plain.parameters(), compiled.parameters(), strict=True)
    difference = max((one - other).abs().max().item() for one, other in pairs)
    numbers = attachment.metrics()
    print(attachment)
    print(f"steps: {numbers['steps_applied']:.0f}")
    print(
        f"xgrad moved the weights by {numbers['xgrad/weights/relative_change']:.1e} of their norm"
    )
    print(f"agc clipped {numbers['agc/share_clipped']:.0%} of the units")
    print(f"compiled against plain: largest difference {difference:.0e}")
    if difference > 1e-5:
        raise SystemExit("the two should agree to rounding")


if __name__ == "__main__":
    main()
