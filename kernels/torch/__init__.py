"""Back ends in plain torch, and the torch operators that the fused back ends run through."""
