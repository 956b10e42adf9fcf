"""Answers the synthetic tasks by reading the decoded prompt alone: one function a task, written without their code.

Each takes the text of a prompt and returns what a perfect reader would write next, as a list of words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict


def passkey(text: str) -> list[str]:
    return re.findall(r"The pass key is (\d{5})\. Remember it", text)


def niah(text: str) -> list[str]:
    question = text.rpartition("What")[2]
    words = re.findall(r"\w+", re.search(r"special numbers? for (.*?)\?", question)[1].replace(" and ", " "))
    told = defaultdict(list)
    for word, number in re.findall(r"\nThe special number for (\w+) is (\d{5})\.\n", text):
        told[word].append(number)
    return [number for word in words for number in told[word]]


def variable_tracking(text: str) -> list[str]:
    value = re.findall(r"with the value (\d+) are$", text)[0]
    known: dict[str, str] = {}
    for name, of in re.findall(r"\nVAR (\w+) = (?:VAR )?(\w+)\n", text):
        known[name] = known.get(of, of)
    return [name for name, its in known.items() if its == value]


def common_words(text: str) -> list[str]:
    counts = Counter(re.search(r"List of words:(.*?)\n", text)[1].split())
    most = max(counts.values())
    return [word for word, n in counts.items() if n == most]


def frequent_words(text: str) -> list[str]:
    return [word for word, _ in Counter(re.search(r"Coded text:(.*?)\n", text)[1].split()).most_common(3)]


def mqar(text: str) -> list[str]:
    asked = re.search(r"(\w+) is$", text)[1]
    return [dict(re.findall(r"(?m)^(\w+) is (\w+)\.$", text))[asked]]


def selective_copying(text: str) -> list[str]:
    return re.findall(r"\[(\w+)\]", text)


def grammar(text: str) -> list[str]:
    words = re.sub(r"\(\w+\)", "", re.search(r"Sequence:(.*?)\n", text)[1]).split()
    follows = {(a, b): c for a, b, c in zip(words, words[1:], words[2:], strict=False)}
    return [follows[tuple(words[-2:])]]


def babilong(text: str) -> list[str]:
    been, holds = defaultdict(list), defaultdict(set)
    facts = re.findall(r"(?m)^[A-Z]\w+ (?:went|walked|moved|took|picked|dropped|put) .*\.$", text)
    half = len(facts) // 2
    for line in facts[:half] if facts[:half] == facts[half:] else facts:  # a context read twice is one story
        if found := re.fullmatch(r"(\w+) (?:went|walked|moved) to the (\w+)\.", line):
            who, place = found.groups()
            for name in {who} | holds[who]:
                been[name].append(place)
        elif found := re.fullmatch(r"(\w+) (?:took|picked up) the (\w+)\.", line):
            who, thing = found.groups()
            holds[who].add(thing)
            if not been[thing]:
                been[thing].append(been[who][-1])
        elif found := re.fullmatch(r"(\w+) (?:dropped|put down) the (\w+)\.", line):
            holds[found[1]].remove(found[2])
    question = text.rpartition("\n")[2]
    if found := re.match(r"Where was the (\w+) before it was in the (\w+)\?", question):
        return [been[found[1]][been[found[1]].index(found[2]) - 1]]
    return [been[re.match(r"Where is (?:the )?(\w+)\?", question)[1]][-1]]


facts = niah_single = niah_multikey = niah_multivalue = niah_multiquery = niah
