"""One request, two readings: what a real MLServer answers when it sees another picture than guard."""
