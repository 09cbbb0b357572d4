"""Taking a whole judge prompt in the Prometheus layout apart: the form in which some benchmarks publish their items.

The response may hold titles of its own: of titles that occur again, the first counts before the response and the last
behind it.
"""

from __future__ import annotations

import re

from reasonrun.prompts.judge import Rubric

_INSTRUCTION = re.compile(r"^###\s*(?:The )?instruction to evaluate:[^\S\n]*\n?", re.IGNORECASE | re.MULTILINE)
_RESPONSE = re.compile(r"^###\s*(?:The )?response to evaluate:[^\S\n]*\n?", re.IGNORECASE | re.MULTILINE)
_REFERENCE = re.compile(r"^###\s*Reference answer[^\n:]*:[^\S\n]*\n?", re.IGNORECASE | re.MULTILINE)
_RUBRIC = re.compile(r"^###\s*Score rubrics?:[^\S\n]*\n?", re.IGNORECASE | re.MULTILINE)
_CUE = re.compile(r"^###\s*Feedback:\s*\Z", re.IGNORECASE | re.MULTILINE)
_CRITERIA = re.compile(r"\s*\[(.*?)\]\s*(?=^Score 1:)", re.DOTALL | re.MULTILINE)
_SCORE_LINE = re.compile(r"^Score ([1-5]):", re.MULTILINE)


def looks_like_prompt(text: str) -> bool:
    """Whether ``text`` begins like a whole judge prompt."""
    return bool(re.match(r"\s*###\s*Task description:", text, re.IGNORECASE))


def parts_of(text: str) -> dict[str, str]:
    """The blocks ``instruction``, ``response``, ``reference`` (empty when there is none) and ``rubric`` of a prompt.

    Raises:
        ValueError: a block is missing; the message says which.
    """
    instruction = _INSTRUCTION.search(text)
    if instruction is None:
        raise ValueError("the prompt has no block '###The instruction to evaluate:'")
    response = _RESPONSE.search(text, instruction.end())
    if response is None:
        raise ValueError("the prompt has no block '###Response to evaluate:' after the instruction")
    rubrics = list(_RUBRIC.finditer(text, response.end()))
    if not rubrics:
        raise ValueError("the prompt has no block '###Score Rubrics:' after the response")
    rubric = rubrics[-1]
    references = list(_REFERENCE.finditer(text, response.end(), rubric.start()))
    cue = _CUE.search(text, rubric.end())
    answer_end, reference = rubric.start(), ""
    if references:
        answer_end, reference = references[-1].start(), text[references[-1].end() : rubric.start()]
    return {
        "instruction": text[instruction.end() : response.start()],
        "response": text[response.end() : answer_end],
        "reference": reference,
        "rubric": text[rubric.end() : cue.start() if cue else len(text)],
    }


def rubric_of(text: str) -> Rubric:
    """The rubric of a block of a bracketed criterion and one line for each score.

    Raises:
        ValueError: the criterion or a score is missing, empty or out of order.
    """
    criteria = _CRITERIA.match(text)
    if criteria is None or not criteria[1].strip():
        raise ValueError("the rubric does not begin with a criterion in brackets and a line 'Score 1:'")
    lines = list(_SCORE_LINE.finditer(text, criteria.end()))
    if [line[1] for line in lines] != list("12345"):
        raise ValueError(f"the rubric must describe the scores 1 to 5, it has {', '.join(line[1] for line in lines)}")
    ends = [*(line.start() for line in lines[1:]), len(text)]
    one, two, three, four, five = (text[line.end() : end].strip() for line, end in zip(lines, ends, strict=True))
    descriptions = (one, two, three, four, five)
    if "" in descriptions:
        raise ValueError(f"the rubric's description of score {descriptions.index('') + 1} is empty")
    return Rubric(criteria=criteria[1].strip(), descriptions=descriptions)
