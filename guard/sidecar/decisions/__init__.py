"""From a request to a decision: routes, models, checks, evidence and the stream monitor."""
