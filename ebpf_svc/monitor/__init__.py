"""What happens to flows of services, with names and reasons, as it happens."""
