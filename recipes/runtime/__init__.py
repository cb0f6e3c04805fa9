"""Runtime services of a run: atomic files, ranks, heartbeat and watchdog, memory, progress."""
