"""One process of a job: its progress, heartbeats and watchdog, rendezvous with the other ranks, stopping, random state."""
