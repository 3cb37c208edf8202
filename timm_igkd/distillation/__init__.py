"""What the student learns from: losses, the live teacher, the task that joins them."""
