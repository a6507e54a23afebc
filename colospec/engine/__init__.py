"""What runs the target model and captures its hidden states."""
