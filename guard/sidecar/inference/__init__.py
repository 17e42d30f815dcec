"""The inference service: embedded, or in front of an upstream server, with unary calls and streams."""
