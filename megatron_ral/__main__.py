"""Entry point `python -m megatron_ral COMMAND ...`: see `commands/main.py`."""

import sys

from megatron_ral.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
