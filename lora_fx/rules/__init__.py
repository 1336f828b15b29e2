"""From YAML to a RuleSet.  No torch here."""
