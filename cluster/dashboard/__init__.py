"""The dashboard: one page that any gateway serves, and the one JSON it polls."""
