"""What is drawn on a terminal: answers as they come, and progress bars."""
