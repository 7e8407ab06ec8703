"""What is trained on and where it stands: mixtures, packing, framing. Pure functions of the length table."""

from longspan.data.plans import strategies as strategies
