"""One's own network, data and loop: the cosine of right and wrong labels' gradients beside its null, printed and drawn.

python examples/plain_loop.py
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradsplit import Meter  # pip install ., or copy the file

torch.manual_seed(0)
x = torch.randn(2048, 20)
true = (x @ torch.randn(20, 5)).argmax(1)
noisy = torch.rand(2048) < 0.4  # any mask: wrong labels here
y = torch.where(noisy, torch.randint(5, (2048,)), true)
loader = DataLoader(TensorDataset(x, y, y != true), batch_size=128, shuffle=True)
model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

meter, measured = Meter(model, masks=2), []
for epoch in range(12):
    for batch in loader:
        optimizer.zero_grad()
        values = meter.step(*batch)  # in place of loss = ...; loss.backward()
        optimizer.step()
        measured.append((float(values["grad/cos_clean_noisy"]), float(values["null/permuted_cos_clean_noisy"])))
    cosine, null = torch.tensor(measured[-len(loader) :]).mean(0).tolist()
    print(
        f"epoch {epoch}: loss {float(values['train/loss']):.2f}, cos(clean, noisy) {cosine:+.2f}, of random parts {null:+.2f}"
    )

figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.subplots()
axes.plot(measured, label=["cos(clean, noisy)", "of random parts"])
axes.set_xlabel("step")
axes.legend()
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "cosine.png")
