"""What all tests share: Triton's interpreter, which is chosen before anything imports the kernels."""

import os

os.environ["TRITON_INTERPRET"] = "1"
