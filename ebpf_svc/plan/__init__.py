"""Pure functions from Snapshot to DesiredState."""
