#!/usr/bin/env python3
"""What does LongBench's own code score these predictions? Writes the table that the eval crate's scores are held to.

usage: longbench_reference.py OFFICIAL [--out JSONL]

OFFICIAL is a folder with metrics.py and eval.py of github.com/THUDM/LongBench (folder LongBench/ there). They need
    pip install rouge==1.0.1 fuzzywuzzy==0.18.0 jieba numpy
and no python-Levenshtein: LongBench's requirements.txt does not name it, and with it fuzz.ratio gives other numbers.

Every row is one line: task, prediction, answers, classes, score. The score is that of eval.py's `scorer` before it
rounds: the first-line rule, then the best of dataset2metric over the answers. Each is checked against what `scorer`
itself returns. Predictions and answers were written for this table, or are made from those by the edits below.
"""

import argparse
import importlib.util
import json
import pathlib
import random
import sys
import warnings

HERE = pathlib.Path(__file__).resolve().parent
TABLE = HERE.parent / "crates/eval/tests/data/longbench_scores.jsonl"
FIRST_LINE = ["trec", "triviaqa", "samsum", "lsht"]  # as in eval.py

QA_TASKS = ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"]
QA = [
    ("", ["Lisbon"]),
    ("Lisbon", ["Lisbon"]),
    ("lisbon.", ["Lisbon"]),
    ("The Lisbon", ["Lisbon"]),
    ("the", ["a"]),
    ("The, an; a!", ["the"]),
    ("the", ["the house"]),
    ("Answer: Lisbon, the capital of Portugal", ["Lisbon", "Porto"]),
    ("Lisbon Lisbon Lisbon", ["Lisbon"]),
    ("Lisbon Lisbon", ["Lisbon Lisbon Porto"]),
    ("\n\nLisbon\nQuestion: where?", ["Lisbon"]),
    (" \nLisbon", ["Lisbon"]),
    ("\r\nLisbon\r\nPorto", ["Lisbon"]),
    ("Lisbon\u2028Porto", ["Lisbon"]),
    ("Lisbon\x1cPorto\x1dBraga", ["Lisbon Porto"]),
    ("Lisbon\u00a0Porto\u3000Braga\u200bFaro", ["Porto", "Braga"]),
    ("Lisbon\u0085Porto", ["Porto"]),
    ("U.S.A.", ["USA"]),
    ("a.m. on the first day", ["am first day"]),
    ("state-of-the-art", ["state of the art"]),
    ("stateoftheart", ["state-of-the-art"]),
    ("it's 'the' one", ["its one"]),
    ("_the_ end", ["end"]),
    ("the\u203fend", ["end"]),
    ("the\u2013end", ["the end", "end"]),
    ("the\u2019s end", ["s end", "\u2019s end"]),
    ("a\u0301", ["\u0301"]),
    ("a\u0301n the\u0301 end", ["\u0301n", "end"]),
    ("\u00e1n th\u00e9 end", ["an", "end"]),
    ("a\u00b2 + b\u00b2", ["\u00b2 \u00b2", "a\u00b2 b\u00b2"]),
    ("the\u2460 one", ["\u2460 one"]),
    ("the\u24b6 one", ["\u24d0 one"]),
    ("an\u0661 the\u0967", ["\u0661"]),
    ("\u4e00the\u4e8c", ["\u4e00 \u4e8c"]),
    ("\u4e1c\u4eac", ["\u4e1c\u4eac"]),
    ("\u4e1c\u4eac\u3002", ["\u4e1c\u4eac"]),
    ("\u0130STANBUL", ["istanbul", "i\u0307stanbul"]),
    ("\u039f\u0394\u039f\u03a3 \u03a3\u0399\u03a3\u03a5\u03a6\u039f\u03a3", ["\u03bf\u03b4\u03bf\u03c2", "\u03c3\u03b9\u03c3\u03c5\u03c6\u03bf\u03c2"]),
    ("STRASSE", ["stra\u00dfe"]),
    ("\u1e9e", ["\u00df"]),
    ("\U0001f600 the \U0001f600", ["\U0001f600"]),
    ("THE END OF THE LINE", ["end line"]),
    ("unanswerable", ["Unanswerable", "yes"]),
    ("Yes, they were both built in 1912 by the same shipyard.", ["Yes"]),
    ("No", ["Yes", "No.", "not stated"]),
    ("1,234.5", ["1234.5", "12345"]),
    ("$5 million", ["5 million dollars"]),
    ("(b) the second, of the two", ["b", "second of two"]),
    ("!!!", ["!!!"]),
    ("   ", ["x"]),
    ("x", []),
    ("x", [""]),
    ("", [""]),
    ("an apple and a pear and an apple", ["apple pear apple", "and and"]),
    ("word " * 40 + "other", ["word other", "word " * 7]),
    ("He opened the blue door, took the letter, and left before noon.", ["He took the letter", "the blue door was opened before noon"]),
]

RIVER = (
    "The council voted on Tuesday to rebuild the old stone bridge. Engineers say the work will take two years and cost"
    " about 4.5 million euros. Shops along the river fear they will lose customers. The mayor promised a free ferry"
    " until the bridge opens again."
)
MEETING = (
    "The team agreed to keep the remote control small and to drop the touch screen because of its price. Marketing will"
    " test two colours with young users. The industrial designer asked for rubber buttons, but the decision was put off"
    " to the next meeting."
)
AUDIT = (
    "The agency spent $1.2 billion on repairs between 2011 and 2015. It could not say how many of the 340 sites were"
    " inspected. GAO recommended that it keep one list of sites, set dates for inspections, and report each year. The"
    " agency agreed with 2 of the 3 recommendations."
)
DIALOGUE = "Nora will bring the tent on Friday. Omar forgot his boots, so they leave an hour later."
SUMMARIES = [("gov_report", AUDIT), ("qmsum", MEETING), ("multi_news", RIVER), ("samsum", DIALOGUE)]
ROUGE = [
    ("", "a b c"),
    (".", "a b c"),
    ("...", "..."),
    ("a b c", ""),
    ("a b c", "..."),
    (" . . ", "a. .b"),
    (" ", "a . b"),
    ("\n", "\n"),
    ("\n\n \n", "x. y"),
    ("a", "a"),
    ("a", "A"),
    ("a.", "a"),
    ("a . b . c", "a b c"),
    ("a b c. d e f", "d e f. a b c"),
    ("c b a", "a b c"),
    ("a b a b a b", "b a b a b a"),
    ("a a a a", "a"),
    ("a a b b", "b b a a"),
    ("x a y b z", "a x b y z"),
    ("a x b x c. x", "x a x b. c"),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"),
    ("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5"),
    ("version 1.2.3 is out", "version 1.2 is not out"),
    ("one, two; three", "one two three"),
    ("one\ttwo\u00a0three\u2003four\x1ffive", "one two three four five"),
    ("na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301 caf\u00e9"),
    ("\u7ea2 \u4e86\u3002 \u7eff", "\u7eff \u4e86\u3002 \u7ea2"),
    ("\n\nNora brings the tent.\nDialogue:\nOmar: hi", DIALOGUE),
    ("- Nora: tent\n- Omar: no boots\n- they leave later", DIALOGUE),
    ("the " * 60, RIVER),
    ("The bridge. " * 30, RIVER),
    (AUDIT, RIVER),
    (RIVER, MEETING + " " + RIVER + " " + AUDIT),
    (MEETING.replace(".", ","), MEETING),
    (MEETING.replace(". ", ".\n\n"), MEETING),
    (MEETING.upper(), MEETING),
    (" ".join(reversed(RIVER.split())), RIVER),
    (RIVER[: len(RIVER) // 2], RIVER),
    (RIVER[len(RIVER) // 2 :], RIVER),
]

CLASSES = ["Food", "Date", "Order, rank", "Speed", "Other entity", "Other location", "Other number", "Country", "City"]
CLASSES += ["Description of a person", "Description of something", "Definition of something", "Number of something"]
CLASSES += ["Title of a person", "Individual", "Group or organization of person", "Lasting time of somethin", "State"]
NESTED = ["of", "Number", "Number of", "Number of something", "Number of something else", "something", "Number"]
TREC = [
    ("Food", ["Food"], CLASSES),
    ("\n\nFood\nQuestion: What?\nType: Date", ["Food"], CLASSES),
    ("Question: What?\nType: Food", ["Food"], CLASSES),
    ("food", ["Food"], CLASSES),
    ("Food or Date", ["Food"], CLASSES),
    ("Food or Date or City, in some Country", ["Date"], CLASSES),
    ("Type: Description of a person.", ["Description of a person"], CLASSES),
    ("Description of", ["Description of a person"], CLASSES),
    ("Lasting time of something", ["Lasting time of somethin"], CLASSES),
    ("Order, rank", ["Order, rank"], CLASSES),
    ("Order", ["Order, rank"], CLASSES),
    ("", ["Food"], CLASSES),
    ("Datebook Statement", ["State"], CLASSES),
    ("Food", ["Drink"], CLASSES),
    ("Food", [], CLASSES),
    ("Food", ["Date", "Food"], CLASSES),
    ("Food", ["Food"], []),
    ("Food", [""], ["", "Food"]),
    ("x", [""], ["", "Food"]),
    ("Number of something", ["Number of something"], NESTED),
    ("Number of something else", ["Number of something"], NESTED),
    ("Number of something else", ["Number of something else"], NESTED),
    ("Number of", ["Number of something"], NESTED),
    ("Number of something", ["Number of something"], NESTED[::-1]),
    ("Number of something else", ["Number of something else"], NESTED[::-1]),
    ("Number", ["Number"], NESTED),
    ("something of Number", ["Number"], NESTED),
    ("abc", ["abc"], ["a", "ab", "abc"]),
    ("abc", ["abc"], ["a", "abc", "ab"]),
    ("abc", ["abc"], ["abc", "ab", "a", "b", "c", "bc"]),
    ("abc", ["abc"], ["a", "a", "b", "a", "abc"]),
    ("abcd", ["abc"], ["abcd", "abc", "ab", "bcd"]),
    ("Stra\u00dfe \u5927", ["\u5927"], ["Stra\u00dfe", "\u5927", "\u5927\u5b66"]),
]

COUNT = [
    ("7", ["7"]),
    (" 7\n", ["7"]),
    ("", ["7"]),
    ("seven", ["7"]),
    ("07", ["7"]),
    ("7.0", ["7"]),
    ("7 7 7", ["7"]),
    ("7, or 8, or 7", ["7"]),
    ("17", ["7"]),
    ("1 7", ["7", "17"]),
    ("There are 30 paragraphs, 23 of them repeated, so 7.", ["7"]),
    ("-7", ["7"]),
    ("\u0667", ["7"]),
    ("\u0667 7", ["\u0667"]),
    ("\uff17 7", ["7"]),
    ("7\u00b2 \u2466 7", ["7"]),
    ("7a7b7", ["7"]),
    ("1\n2\n3\n4\n5\n6\n7\n8", ["7"]),
    ("The final answer is: 12\n\nThe final answer is: 12\n\n13", ["12"]),
    ("12", []),
    ("999999999999999999999999999999", ["999999999999999999999999999999"]),
    ("\U0001d7d5 7", ["7"]),
    ("1,000", ["1000", "000"]),
]

RETRIEVAL = [
    ("Paragraph 12", ["Paragraph 12"]),
    ("12", ["Paragraph 12"]),
    ("paragraph twelve", ["Paragraph 12"]),
    ("", ["Paragraph 12"]),
    ("Paragraph 1", ["Paragraph 12"]),
    ("Paragraph 12.\n\nParagraph 3", ["Paragraph 12"]),
    ("Paragraph 3, 12 and 12", ["Paragraph 12"]),
    ("Paragraph 012", ["Paragraph 12"]),
    ("Paragraph \u0661\u0662", ["Paragraph 12"]),
    ("\u0661\u0662 12", ["Paragraph \u0661\u0662"]),
    ("Paragraph 12 (of 30)", ["Paragraph 12"]),
    ("Paragraph 5", ["see Paragraph 5 or Paragraph 6"]),
    ("Paragraph 6", ["see Paragraph 5 or Paragraph 6"]),
    ("Paragraph 6", ["Paragraph 5", "Paragraph 6"]),
    ("P1 P2 P3 P4 P5 P6 P7", ["Paragraph 7"]),
    ("The abstract is from Paragraph 9 because 1932 is named in it.", ["Paragraph 9"]),
]

LONG = "    results = " + " + ".join(f"compute_{i % 7}(values[{i}], weight={i * 3})" for i in range(9)) + ";"
CODE_TASKS = ["lcc", "repobench-p"]
CODE_LINES = [
    "        return self.cache.get(key, None)",
    "\t\tif (count > limit && !closed) {",
    "    public static void main(String[] args) throws IOException {",
    "    for index, value in enumerate(sorted(names)):",
    "            Console.WriteLine(\"total: {0}\", total);",
    "    assert_eq!(left.len(), right.len());",
    LONG,
]
CODE = [
    ("", "x = 1"),
    ("x = 1", ""),
    ("", ""),
    ("\n\n\n", "x = 1"),
    ("x = 1", "x = 1"),
    ("x = 1\n", "x = 1"),
    ("\nx = 1\ny = 2", "x = 1"),
    (" \nx = 1", "x = 1"),
    ("```python\nx = 1\n```", "x = 1"),
    ("```\n```", "x = 1"),
    ("# set x\n// set x\n/* `x` */\nx = 1", "x = 1"),
    ("x = 1  # one", "x = 1"),
    ("x = 1 // one\nx = 2", "x = 1"),
    ("#include <map>\nint x;", "#include <map>"),
    ("url = \"http://x\"", "url = \"http://x\""),
    ("    x = 1", "x = 1"),
    ("\tx = 1", "    x = 1"),
    ("x = 1\r\ny", "x = 1"),
    ("x=1;", "x = 1;"),
    ("X = 1", "x = 1"),
    ("tide", "diet"),
    ("diet", "tide"),
    ("A L I E N S", "A S A L"),
    ("A S A L", "A L I E N S"),
    ("ab", "acab"),
    ("aqqqqqqq", "azzzzzzz"),
    ("abcqqqqq", "abczzzzz"),
    ("name = '\u540d\u524d'", "name = '\u524d\u540d'"),
    ("s = '\U0001f600\U0001f601'", "s = '\U0001f601'"),
    ("e\u0301", "\u00e9"),
    ("(((((((((())))))))))", "()()()()()()()()()()"),
    ("return a + b", "return b + a"),
    ("if (a == b) { return c; }", "if (b == a) { return d; }"),
    (LONG, LONG),
    (LONG.replace("compute", "calc"), LONG),
    (LONG, LONG.replace("compute", "calc")),
    (LONG[: len(LONG) // 2], LONG),
    (LONG, LONG[: len(LONG) // 2]),
    (LONG[::-1], LONG),
    ("a" * 300, "a" * 301),
    ("a" * 199, "a" * 198 + "b"),
    ("b" + "a" * 199, "a" * 199 + "b"),
    ("ab" * 150, "ba" * 150),
    ("    " + "x" * 10, " " * 250),
]


def edited(text, rng):
    """`text` with a few words dropped, doubled, swapped, put in upper case or left without their full stop."""
    words = text.split(" ")
    for _ in range(rng.randint(1, max(2, len(words) // 2))):
        at = rng.randrange(len(words))
        match rng.randrange(6):
            case 0 if len(words) > 1:
                del words[at]
            case 1:
                words.insert(at, words[rng.randrange(len(words))])
            case 2:
                other = rng.randrange(len(words))
                words[at], words[other] = words[other], words[at]
            case 3:
                words[at] = words[at].upper()
            case 4:
                words[at] = words[at].rstrip(".")
            case _:
                words[at] += rng.choice([".", ",", "\n", ". ", " .", "'s"])
    return " ".join(words)


def scratched(line, rng):
    """`line` with some characters removed, replaced, doubled or moved."""
    marks = list(line)
    for _ in range(rng.randint(1, max(2, len(marks) // 3))):
        at = rng.randrange(len(marks))
        match rng.randrange(5):
            case 0 if len(marks) > 1:
                del marks[at]
            case 1:
                marks[at] = rng.choice("abcxyz_()[]{};:=+-*<>\"' 0123456789")
            case 2:
                marks.insert(at, marks[at])
            case 3:
                to = rng.randrange(len(marks))
                marks.insert(to, marks.pop(at))
            case _ if len(marks) > 6:
                tail = marks[at:]
                del marks[at:]
                marks[:0] = tail
    return "".join(marks)


def rows(rng):
    """(task, prediction, answers, classes) of the whole table."""
    for number, (prediction, answers) in enumerate(QA):
        for task in (QA_TASKS[number % 6], "triviaqa"):  # the second reads the first line alone
            yield task, prediction, answers, None
    for number in range(24):
        answers = [answer for _, some in rng.sample(QA, 3) for answer in some]
        prediction = edited(" ".join(answers), rng)
        yield QA_TASKS[number % 7] + ("_e" if number % 7 in (1, 2, 3, 4, 6) else ""), prediction, answers, None
    for number, (prediction, answer) in enumerate(ROUGE):
        yield ["gov_report", "qmsum", "multi_news"][number % 3], prediction, [answer], None
        if "\n" in prediction:
            yield "samsum", prediction, [answer], None
    for task, text in SUMMARIES:
        for _ in range(8):
            yield task, edited(text, rng), [text], None
        letters = "abcd"
        for _ in range(12):  # few words, so that there are many longest common subsequences
            sides = ["".join(rng.choice(letters + ".") + " " for _ in range(rng.randint(3, 25))) for _ in range(3)]
            yield task, sides[0], sides[1:], None
    for prediction, answers, classes in TREC:
        yield "trec", prediction, answers, classes
    for number in range(12):
        right = rng.choice(CLASSES)
        said = rng.sample(CLASSES, 3) + [right]
        yield "trec_e", " / ".join(said[rng.randrange(4) :]), [right], CLASSES
    for prediction, answers in COUNT:
        yield "passage_count", prediction, answers, None
    for prediction, answers in RETRIEVAL:
        yield "passage_retrieval_en", prediction, answers, None
    for number, (prediction, answer) in enumerate(CODE):
        yield CODE_TASKS[number % 2], prediction, [answer], None
    for line in CODE_LINES:
        for number in range(6):
            yield CODE_TASKS[number % 2] + "_e", scratched(line, rng), [line], None
        yield "lcc", scratched(line, rng) + "\n" + line, [scratched(line, rng), scratched(line, rng)], None
    for _ in range(20):
        sides = ["".join(rng.choice("ab (") for _ in range(rng.randint(150, 260))) for _ in range(2)]
        yield "repobench-p", sides[0], sides[1:], None


def official(folder):
    """eval.py as a module."""
    try:
        import Levenshtein  # noqa: F401
    except ImportError:
        pass
    else:
        sys.exit("python-Levenshtein is installed, which changes fuzz.ratio; see --help")
    warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("longbench_eval", folder / "eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score(module, task, prediction, answers, classes):
    dataset = task.removesuffix("_e")
    counted = prediction.lstrip("\n").split("\n")[0] if dataset in FIRST_LINE else prediction
    metric = module.dataset2metric[dataset]
    best = max([0.0] + [metric(counted, answer, all_classes=classes) for answer in answers])
    rounded = module.scorer(dataset, [prediction], [answers], classes)
    assert rounded == round(100 * best / 1, 2), (task, prediction, best, rounded)
    return float(best)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=TABLE)
    arguments = parser.parse_args()
    module = official(arguments.official)
    count = 0
    with open(arguments.out, "w", encoding="ascii") as table:
        for task, prediction, answers, classes in rows(random.Random(20230828)):
            row = {"task": task, "prediction": prediction, "answers": answers, "classes": classes}
            row["score"] = score(module, task, prediction, answers, classes)
            table.write(json.dumps(row) + "\n")
            count += 1
    print(f"{count} rows in {arguments.out}")


if __name__ == "__main__":
    main()
