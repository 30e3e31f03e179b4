"""What flows through the original model: statistics over a text, and what conversion makes of them."""
