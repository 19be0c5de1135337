"""The skills of the embedded family, one file a skill (three languages share one).

Each file builds a `Skill`: deterministic (prompt, answer) pairs read from a data
package, split by the hash of the underlying word. Nothing here knows models or
training. Start reading at `skill.py`; `family.py` beside this folder lists them.
"""
