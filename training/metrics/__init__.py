"""What is measured on heads: cross entropy, accuracy, acceptance."""
