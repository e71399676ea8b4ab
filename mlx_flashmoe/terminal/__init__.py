"""Drawing on a terminal: answers as they come, and progress bars."""
