"""Entry point `torchrun .. -m megatron_ral.evaluate`: see `commands/evaluate.py`."""

from megatron_ral.commands.evaluate import main

if __name__ == "__main__":
    main()
