"""Services of one process of a job: progress, heartbeats and watchdog, rendezvous, stopping, random state."""
