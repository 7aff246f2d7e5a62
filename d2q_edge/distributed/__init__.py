"""Several processes that share a conversion: how they are started, and what they exchange."""
