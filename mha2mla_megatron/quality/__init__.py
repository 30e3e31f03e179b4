"""What a conversion costs in quality: one model, original and converted, before and after fine-tuning."""
