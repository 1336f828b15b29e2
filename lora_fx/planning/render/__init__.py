"""What plans and their differences look like as pages and pictures.  No torch here."""
