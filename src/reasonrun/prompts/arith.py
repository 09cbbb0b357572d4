"""The words of the ``arith`` task: stories, operations and the four prompt formats (decision note 0001).

The carried model was trained on exactly these words. A change here is a new task version and a new model.
"""

from __future__ import annotations

VERSION = 1

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max")
OPENINGS = (
    "{name} has a two-digit counter that shows {start}.",
    "The two-digit counter of {name} stands at {start}.",
    "{name} sets a two-digit counter to {start}.",
)
MULTIPLY = ("It is multiplied by {n}.", "{name} makes it {n} times as large.", "Then it grows {n} times.")
ADD = ("Then {n} is added.", "{name} adds {n}.", "It goes up by {n}.")
SUBTRACT = ("Then {n} is taken away.", "{name} takes away {n}.", "It goes down by {n}.")
QUESTIONS = ("What does it show?", "Where does it stand now?", "Which number is left?")

DIRECT = "{question} Give only the answer."
HINTED = "{question} (The answer is {answer}.)"
CORRECTION = (
    "There may be an error in the solution above. Check every step and write the whole solution again,"
    " with any error corrected."
)
JUDGE = (
    "###Task: Check every step of the solution, then give a score from 1 to 5 after [RESULT].\n"
    "###Problem: {question}\n"
    "###Solution:\n{solution}\n"
    "###Rubric: The score is 1 with no right step, 5 with only right steps, and rises with the share of right steps.\n"
    "###Feedback:"
)
