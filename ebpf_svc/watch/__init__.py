"""The outside world, turned into Snapshots."""
