"""Fine-tuning on Megatron-core: settings, optimizer and schedule, the loop, saving and resuming."""
