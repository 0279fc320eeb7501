"""What a run takes before it starts: `plan` traces a step without weights, `cards` are what it may run on."""
