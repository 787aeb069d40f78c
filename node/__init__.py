"""The shell that both roles stand in: identity, registration, heartbeat, drain, health, engine."""
