"""Rehearse a launch of many ranks without GPUs.

Same as `megatron-ral rehearse`. See `megatron_ral/commands/rehearse.py`.
"""

import sys

from megatron_ral.commands.rehearse import main

if __name__ == "__main__":
    sys.exit(main())
