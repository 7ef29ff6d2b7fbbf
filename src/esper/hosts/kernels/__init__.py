"""Triton kernels for stacks of small convolutional networks: every array carries a leading host axis.

Libraries run a stack of tiny convolutions either host by host or as one grouped convolution, far from what the card can
do. Partial sums are written and then added in a fixed order, so results do not depend on scheduling. Numbers that vary
with the stack are never specialised: a new size must not compile a new kernel.
"""

from esper.hosts.kernels.convolution import conv, conv_input_grad, conv_weight_grad
from esper.hosts.kernels.normalisation import (
    activate,
    activate_grad,
    fits_group_norm,
    group_norm,
    group_norm_grad,
    moments,
    spatial_mean,
)

__all__ = [
    "activate",
    "activate_grad",
    "conv",
    "conv_input_grad",
    "conv_weight_grad",
    "fits_group_norm",
    "group_norm",
    "group_norm_grad",
    "moments",
    "spatial_mean",
]
