"""Train, validate and test: `python train.py fit --config configs/classification/repavit_tiny_cifar10.yaml`.

What is wrong with a config, data or a checkpoint is said in one line; `--debug` shows the traceback.
"""

import sys


def reason(error: BaseException) -> str:
    """Return an error's first line, or that of its cause where jsonargparse has wrapped it."""
    while str(error).startswith("Does not validate against") and error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def main() -> int:
    """Run Lightning's command line and return the exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        from lightning.pytorch.cli import LightningCLI
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        import zoo  # noqa: F401  registers the models with timm
    except ImportError as error:
        print(f"error: Training needs {error.name}, which is missing: pip install 'ffn-zoo[train]'.", file=sys.stderr)
        return 2
    try:
        LightningCLI(subclass_mode_model=True, subclass_mode_data=True, save_config_kwargs={"overwrite": False})
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        if debug:
            raise
        print(f"error: {reason(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
