"""Search: what every option costs, and which options to take under an exact budget."""
