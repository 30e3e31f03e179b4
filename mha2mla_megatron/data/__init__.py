"""Text files -> documents -> tokens -> Megatron's .bin/.idx."""
