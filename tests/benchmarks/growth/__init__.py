"""What a decode step costs as batch, context, layers, experts and hosts grow, each against the law it should follow."""
