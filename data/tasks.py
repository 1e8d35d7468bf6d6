r"""
Rules that find an answer in a text and compare it with the right one: GSM8K's and MATH's. Pure functions of text, which
never run what a model wrote.

    extract_number('... so she has 9 * 2 = $18.\n#### 18')     # '18': GSM8K's
    extract_math('Thus $x = \boxed{\frac{1}{2}}$.')             # '\\frac{1}{2}': MATH's
    equal('0.5', r'\frac{1}{2}')                                # True: as numbers; None equals nothing
    gsm8k(text, reference)     # {'exact': True, 'strict': None, 'flexible': True}: ours, and lm-evaluation-harness' two

An answer stands after the last "####", else after the last "The answer is", else in the last \boxed{}, else it is the
last number.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

GROUPED = r'\d{1,3}(?:[, ]\d{2,3})*[, ]\d{3}(?!\d)'  # 1,234  1 000  1,00,000
DECIMAL = rf'(?:(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)'
# A minus after a digit or a bracket is a subtraction, and a digit after a letter is part of a name.
NUMBER = re.compile(rf'(?:(?<![\w)\]])-\s?)?(?<![A-Za-z_])\$?{DECIMAL}(?:\s?/\s?{DECIMAL})?')
LATEX_FRACTION = re.compile(r'(-?)(\d*)\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}')
LONGEST = 200  # characters of a number; Python refuses to read one of more than 4,300 digits


def number(text):
    r"""The Fraction that a whole text stands for; None if it is no number.

    1,234  $70  3/4  -5  18.00  50%  1 000  \frac{1}{2}  1\frac{1}{10}"""
    text = re.sub(r'\\[$%!,; ]|[$%]', '', text.replace('\u2212', '-')).strip().rstrip('.')
    if len(text) > LONGEST:
        return None
    try:
        if match := LATEX_FRACTION.fullmatch(text.replace(' ', '')):
            sign, whole, above, below = match.groups()
            return (-1 if sign else 1) * (int(whole or 0) + Fraction(above) / Fraction(below))
        if NUMBER.fullmatch(text):
            above, _, below = re.sub(r'[, ]', '', text).partition('/')
            return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):  # 1.2.3, 3/0
        pass
    return None


def numbers(text):
    """All numbers in a text, as they stand there."""
    return [match[0] for match in NUMBER.finditer(text.replace('\u2212', '-'))]


def boxed(text):
    r"""What the last \boxed{...} of a text holds, its braces matched; None without one that closes."""
    opened, last = [], (-1, None)
    for match in re.finditer(r'\\f?boxed\s*\{|\\.|[{}]', text):
        if match[0] == '}' and opened:
            begin, is_box = opened.pop()
            last = max(last, (begin, text[begin : match.start()].strip())) if is_box else last
        elif match[0].endswith('{') and match[0] != r'\{':
            opened.append((match.end(), match[0] != '{'))
    return last[1]


def after(text, marker):
    """What follows the last `marker`, a regular expression, case ignored, that something follows; '' without one."""
    ends = [match.end() for match in re.finditer(marker, text, re.IGNORECASE)]
    return next((rest for end in reversed(ends) if (rest := text[end:].strip())), '')


MARKERS = ('####', r'answer is\b:?')


def extract_number(text):
    """The number that a text gives as its answer, as it stands there; None if it holds none."""
    text = text.replace('{,}', ',')
    for rest in (after(text, marker) for marker in MARKERS):
        line = rest.split('\n')[0]
        for part in (line.rpartition('=')[2], line):  # 9 * 2 = 18
            if found := numbers(part):
                return found[0]
    inside = boxed(text) or ''
    if number(normalise_math(inside)) is not None:
        return inside
    return next(iter(numbers(inside)), None) or next(reversed(numbers(text)), None)


def extract_math(text):
    """The expression that a text gives as its answer; None if it has neither one that is marked nor a number."""
    for rest in (after(text, marker) for marker in MARKERS):
        if (inside := boxed(rest)) is not None:
            return inside
        line = rest.split('\n')[0].split('. ')[0].strip().rstrip('.')
        if line:
            return line
    inside = boxed(text)
    return inside if inside is not None else next(reversed(numbers(text)), None)


# From and to, in this order: spellings of one thing. Each unit of \text{ cm} is dropped with what follows it.
SPELLINGS = [
    (r'\n|\\[!,;:]|\\q?quad\b', ''),
    (r'\\(left|right)(?![a-z])', ''),
    (r'\\[td]frac', r'\\frac'),
    (r'\^\{?\\circ\}?|\\degree', ''),
    (r'\\?\$|\\?%', ''),
    (r'\{,\}', ','),
    (r'(?<=.)\\(?:text|mbox|mathrm)\{\s.*', ''),
    (r'\\(?:text|textbf|textit|mathrm|mathbf|mbox|boxed)\{([^{}]*)\}', r'\1'),
    (r'\s+', ''),
    (r'^[A-Za-z]{1,2}=', ''),
    (r'\\sqrt([^{\\])', r'\\sqrt{\1}'),
    (r'\\frac(\d)(\d)', r'\\frac{\1}{\2}'),
    (r'\\frac(\d)\{', r'\\frac{\1}{'),
    (r'\\frac\{([^{}]*)\}(\d)', r'\\frac{\1}{\2}'),
    (r'^(-?)(\w+)/(\w+)$', r'\1\\frac{\2}{\3}'),
    (r'(?<![\d.])\.(?=\d)', '0.'),
    (r'(?<=\d)\.0+(?!\d)', ''),
    (r'^\(([A-Z])\)$', r'\1'),
]


def normalise_math(text):
    r"""One spelling of an expression: \dfrac12 cm, $\frac{1}{2}$ and 1/2 become \frac{1}{2}."""
    text = text.strip().rstrip('.')
    for pattern, instead in SPELLINGS:
        text = re.sub(pattern, instead, text)
    return text


def equal(answer, reference):
    """Whether two answers are the same, as text or as numbers, part by part where they are lists: (1, 0.5) is (1, 1/2).
    None, no answer, equals nothing."""
    if answer is None or reference is None:
        return False
    a, b = normalise_math(answer), normalise_math(reference)
    if a == b:
        return a != ''
    x, y = number(a), number(b)
    if x is not None or y is not None:
        return x == y
    (open_a, parts_a, close_a), (open_b, parts_b, close_b) = parts(a), parts(b)
    if len(parts_a) != len(parts_b) or len(parts_a) < 2 or (open_a, close_a) != (open_b, close_b):
        return False
    if not open_a:  # several solutions, in any order
        parts_a, parts_b = (sorted(part, key=lambda t: (number(t) or 0, t)) for part in (parts_a, parts_b))
    return all(map(equal, parts_a, parts_b))


def parts(text):
    """(opening bracket, what the commas part, closing bracket) of a tuple, an interval or a list."""
    opening, inside, closing = re.fullmatch(r'(\\\{|[(\[]|)(.*?)(\\\}|[)\]]|)', text, re.DOTALL).groups()
    return opening, inside.split(','), closing


# ---- what lm-evaluation-harness does, so that its figures can be compared ----------------------------------------


def bare(text):
    """As lm-eval compares two answers to GSM8K: as text, without commas, $, all up to "#### " and one final dot."""
    text = re.sub(r'(?s).*#### ', '', text).replace(',', '').replace('$', '').lower()
    return text[:-1] if text.endswith('.') else text


def strict_number(text):
    match = re.search(r'#### (-?[0-9.,]+)', text)
    return match and bare(match[1])


def flexible_number(text):
    """It takes "..." for an answer, and 000 of 1 000."""
    found = re.findall(r'-?[$0-9.,]{2,}|-?[0-9]+', text)
    return bare(found[-1]) if found else None


def strict_math(text):
    """Of `minerva_math`, without its comparison by sympy."""
    match = re.search(r'(?s)Final Answer: The final answer is(.*?)\. I hope it is correct\.', text)
    return match and normalise_math(match[1])


def flexible_math(text):
    """Of `hendrycks_math`: between the first and the last $, else all of it."""
    first, last = text.find('$'), text.rfind('$')
    return normalise_math(text[first + 1 : last] if first < last else text)


def gsm8k(text, reference):
    """-> what each rule says of an answer: right, wrong, or None: it finds none."""
    right = bare(reference)
    return {
        'exact': verdict(extract_number(text), extract_number(reference), equal),
        'strict': verdict(strict_number(text), right),
        'flexible': verdict(flexible_number(text), right),
    }


def math(text, reference):
    right = normalise_math(boxed(reference) or extract_math(reference) or '')
    return {
        'exact': verdict(extract_math(text), extract_math(reference), equal),
        'strict': verdict(strict_math(text), right),
        'flexible': verdict(flexible_math(text), right),
    }


def verdict(answer, right, same=str.__eq__):
    return None if answer is None else bool(same(answer, right))


@dataclass(frozen=True)
class Task:
    extract: Callable  # text -> its answer or None
    judge: Callable  # text, reference -> {rule: right, wrong or None}


TASKS = {'gsm8k': Task(extract_number, gsm8k), 'math': Task(extract_math, math)}


def wilson(k, n, z=1.959964):
    """Wilson's 95 % interval of a share: k of n (Wilson 1927; z: the normal distribution's quantile)."""
    if not n:
        return 0.0, 1.0
    p, middle = k / n, (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * p * (1 - p) + z * z / 4) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)
