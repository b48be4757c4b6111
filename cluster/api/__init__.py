"""The front door: one text service, spoken over HTTP (OpenAI's API) and gRPC (shoal.v1). Knows no Ray."""
