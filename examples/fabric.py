# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own on any device, and on several: the 1,797 handwritten digits that scikit-learn carries.

    python examples/fabric.py                                                    # one process
    LT_DEVICES=2 LT_ACCELERATOR=cpu python examples/fabric.py                    # two processes, the same numbers
    LT_PRECISION=bf16-mixed python examples/fabric.py

The lines that Fabric needs end with `# fabric`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from leyden import Fabric


def main(epochs: int = 8, batch: int = 32) -> None:
    fabric = Fabric()  # fabric
    fabric.launch()  # fabric
    fabric.seed_everything(1, verbose=False)

    images, labels = load_digits(return_X_y=True)
    everything = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, test = random_split(everything, [0.8, 0.2], torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train_loader = DataLoader(train, batch // fabric.world_size, shuffle=True)
    test_loader = DataLoader(test, 256)

    model, optimizer = fabric.setup(model, optimizer)  # fabric
    train_loader = fabric.setup_dataloaders(train_loader)  # fabric
    test_loader = fabric.setup_dataloaders(test_loader, pad=False)  # fabric: each sample counts once

    for epoch in range(epochs):
        model.train()
        for images, labels in train_loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            fabric.backward(loss)  # fabric
            optimizer.step()

        model.eval()
        found = torch.zeros(2, device=fabric.device)  # how many are right, how many there are
        with torch.no_grad():
            for images, labels in test_loader:
                right = (model(images).argmax(1) == labels).sum()
                found += torch.stack([right, torch.tensor(len(labels), device=fabric.device)])
        right, count = fabric.all_reduce(found, reduce_op="sum").tolist()  # fabric
        fabric.print(f"epoch {epoch}: {right:g} of {count:g} right, accuracy {right / count:.3f}")
        fabric.save("digits.ckpt", {"model": model, "optimizer": optimizer, "epoch": epoch})  # fabric


if __name__ == "__main__":
    main()
