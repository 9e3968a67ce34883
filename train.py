"""Train, validate and test: `python train.py fit --config configs/classification/repavit_tiny_cifar10.yaml`."""

from lightning.pytorch.cli import LightningCLI

import zoo  # noqa: F401  registers the models with timm


def main() -> None:
    LightningCLI(subclass_mode_model=True, subclass_mode_data=True, save_config_kwargs={"overwrite": False})


if __name__ == "__main__":
    main()
