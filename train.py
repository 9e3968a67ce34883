"""Train, validate and test: `python train.py fit --config configs/classification/repavit_tiny_cifar10.yaml`.

`zoo train` is the same, from anywhere.
"""

import sys

from zoo.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
