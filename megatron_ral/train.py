"""Entry point `torchrun ... -m megatron_ral.train`: see `commands/train.py`."""

from megatron_ral.commands.train import main

if __name__ == "__main__":
    main()
