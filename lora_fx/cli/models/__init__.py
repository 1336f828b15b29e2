"""MODEL on the command line.  The one part of the command line that imports torch."""
