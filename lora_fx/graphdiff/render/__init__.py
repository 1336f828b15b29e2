"""A GraphDiff as text, page, picture and graph.  No torch here."""
