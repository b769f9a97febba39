"""What a run will need, told before it starts: memory, disk and time of every stage."""
