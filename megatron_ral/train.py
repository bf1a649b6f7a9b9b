"""Entry point `torchrun .. -m megatron_ral.train`: see `commands/train.py`."""

from megatron_ral.commands.common import leave
from megatron_ral.commands.train import main

if __name__ == "__main__":
    main()
    leave(0)  # without waiting for threads that decode samples of a step that will not come
