"""What a model is worth after conversion: perplexity, tasks, and what its cache weighs."""
