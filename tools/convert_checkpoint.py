"""Convert checkpoints between Hugging Face and Megatron folders.

Same as `megatron-ral convert`. See `megatron_ral/commands/convert.py`.
"""

import sys

from megatron_ral.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
