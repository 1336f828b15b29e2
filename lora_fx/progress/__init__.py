"""How far a call is: `steps` is told by what takes its time, `terminal` shows it to who waits."""
