"""Who runs what, and the front door: Serve application, coordinator, gateway, APIs and the command line."""
