"""The parts of ``crossbit analyze``: what is observed, what is changed, what is counted."""
