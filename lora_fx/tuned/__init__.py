"""The adapted model: made from a Plan, reported on, merged, undone, extracted."""
