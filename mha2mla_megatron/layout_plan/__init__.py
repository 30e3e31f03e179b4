"""What a training run takes of each GPU, on paper: memory, messages, and the smallest layout that fits."""
