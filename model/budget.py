"""This command has moved to model/cost.py, which takes the same arguments."""

raise SystemExit("model/budget.py is now called model/cost.py; give it the same arguments")
