# SPDX-License-Identifier: Apache-2.0
"""What a tiny step costs by Leyden's names and by Lightning's, answered by Leyden: microseconds, in turns, medians.

python benchmarks/clients/overhead.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
import warnings

STEPS = 8000


def step(names: str) -> float:
    """Train and return the microseconds of a step."""
    if names == "lightning":
        import leyden.compat

        leyden.compat.install()
        import lightning.pytorch as L
    else:
        import leyden as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    class Tiny(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = DataLoader(TensorDataset(torch.randn(2 * STEPS, 32)), 2)
    L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=200, **quiet).fit(Tiny(), data)
    trainer, model = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet), Tiny()
    gc.collect()  # or the one collection of everything, 60 ms, falls into the time of one of the two and not of the other
    began = time.perf_counter()
    trainer.fit(model, data)
    return (time.perf_counter() - began) / STEPS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--names", choices=("leyden", "lightning"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.names:
        print(step(options.names))
        return
    found: dict[str, list[float]] = {"leyden": [], "lightning": []}
    for _ in range(options.rounds):
        for names, times in found.items():
            done = subprocess.run(
                [sys.executable, __file__, "--names", names], capture_output=True, text=True, check=True
            )
            times.append(float(done.stdout.splitlines()[-1]))
    leyden, lightning = (statistics.median(times) for times in found.values())
    print(f"leyden {leyden:.1f} us, lightning's names {lightning:.1f} us, ratio {lightning / leyden:.3f}")


if __name__ == "__main__":
    main()
