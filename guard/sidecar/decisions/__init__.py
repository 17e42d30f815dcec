"""From a request to a decision: routes, models, screening, evidence and the monitor."""
