# SPDX-License-Identifier: Apache-2.0
"""BYOL as a Lightning module: the losses and the moving average are ordinary modules.

    python examples/lightning_byol.py

What to expect (20 epochs, half a minute on two cores): the loss of both views falls from about 4 to
0.6, and feature_std stays near 0.11 (at most 1 / sqrt(64) = 0.125), so the network has not collapsed.
The average is in the checkpoint, with its step.
"""

import argparse
import logging
import tempfile

import torch
from torch import Tensor, nn

import sslkernels
from sslkernels.metrics import feature_std

try:
    import pytorch_lightning as lightning
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"lightning_byol.py needs {missing.name}: pip install pytorch-lightning scikit-learn"
    ) from None


class BYOL(lightning.LightningModule):
    """Bootstrap Your Own Latent, arXiv:2006.07733."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)
        )
        self.predictor = nn.Sequential(
            nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64)
        )
        decay = sslkernels.cosine_decay(0.97, total_steps)
        self.target = sslkernels.EMA(self.online, decay)  # requires no gradient

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Two noisy views predict each other."""
        views = [batch[0] + 0.2 * torch.randn_like(batch[0]) for _ in range(2)]
        p1, p2 = (self.predictor(self.online(view)) for view in views)
        with torch.no_grad():
            t1, t2 = (self.target(view) for view in views)
        loss = sslkernels.byol_loss_symmetric(p1, t2, p2, t1)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        """Move the target after the optimiser's step."""
        self.target.update(self.online)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of what learns; the target does not."""
        learning = [*self.online.parameters(), *self.predictor.parameters()]
        return torch.optim.AdamW(learning, lr=1e-3)


def main() -> None:
    """Train, save, load, and look for a collapse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    lightning.seed_everything(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    data = torch.utils.data.TensorDataset(images)
    loader = torch.utils.data.DataLoader(data, 256, shuffle=True, drop_last=True)
    model = BYOL(args.epochs * len(loader))
    trainer = lightning.Trainer(
        max_epochs=args.epochs, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    loss = trainer.callback_metrics["loss"]
    print(f"loss of both views after {args.epochs} epochs: {loss.item():.3f}")
    with torch.no_grad():
        print(f"feature_std {feature_std(model.eval().target(images)).item():.3f} (collapsed: 0)")
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(f"{folder}/byol.ckpt")
        loaded = BYOL.load_from_checkpoint(f"{folder}/byol.ckpt", total_steps=model.target.step)
    print(f"updates of the average: {model.target.step}, in the checkpoint: {loaded.target.step}")


if __name__ == "__main__":
    main()
