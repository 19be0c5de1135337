"""The small default family: how its base, its data and its experts are made.

Start reading at `family.py` (which skills there are), then `train.py` (how an
expert is trained) and `base.py` (where the base comes from). Data packages are
needed for retraining and testing only; serving uses the committed `factors/`
and `prompts/`. May import `experts.checkpoint` and `experts.evaluation`.
"""
