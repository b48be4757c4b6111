"""What an application tells Prometheus: counted at every member, summed by the Coordinator, shown by any gateway."""
