"""The network: sources, adapters, precision, placement; and its inputs: batches, seeds, ratios."""

import logging

# bitsandbytes asks for an optional package when peft imports it, on CPUs with bfloat16, even if nothing is 4-bit.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "pip install kernels" not in str(record.msg)
)
