"""Text towers, attacked and not, to measure the examination of text towers on."""
