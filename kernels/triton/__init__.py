"""Back end of our own Triton kernels, their launches, block sizes and compilation ahead of time."""
