"""Sites and rules in, a Plan out, and everything that a Plan is shown as.  No torch here."""
