"""Does a repair remove the attacker's own trigger, and what does it cost?"""
