"""data/tasks.py: which answer a text gives, which two are the same, and how sure a share is."""

from fractions import Fraction

import pytest

from data import tasks

BOX = '\\boxed'


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        ('so it is 18.00\n#### 18.00', '18.00'),
        ('#### 1,234', '1,234'),
        ('#### $70', '$70'),
        ('#### 3/4', '3/4'),
        ('#### -5', '-5'),
        ('#### \u22125', '-5'),
        ('#### 18.', '18'),
        ('#### 18 dollars', '18'),
        ('#### 9 * 2 = 18', '18'),
        ('#### 3\nwait.\n#### 4', '4'),  # two answers
        ('The answer is 3. No: the answer is: 4 apples.', '4'),
        ('the answer is 4\n#### 5', '5'),
        ('#### 5\nQuestion: 7', '5'),
        ('####', None),
        ('', None),
        ('...', None),
        ('I do not know...', None),
        ('She has 3 apples ...', '3'),
        ('3 of them, then 16-3=13', '13'),
        ('1 000', '1 000'),
        (f'then {BOX}{{42}} or 43', '42'),
        (f'{BOX}{{\\$1{{,}}000}}', '\\$1,000'),
        (f'{BOX}{{\\frac{{1}}{{2}}}}', r'\frac{1}{2}'),
        (f'{BOX}{{5 apples}} of 7', '5'),
        ('H2O and x2', None),
        ('5kg, the 6th', '6'),
        ('9' * 5000, '9' * 5000),
    ],
)
def test_the_number_that_a_text_gives(text, answer):
    assert tasks.extract_number(text) == answer


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        (f'so ${BOX}{{\\frac{{1}}{{2}}}}$.', r'\frac{1}{2}'),
        (f'{BOX}{{1}}, no: {BOX}{{\\sqrt{{\\frac{{a}}{{{{b}}}}}}}}', r'\sqrt{\frac{a}{{b}}}'),
        (f'{BOX}{{\\{{1, 2\\}}}}', r'\{1, 2\}'),
        (f'The answer is ${BOX}{{7}}$. I hope', '7'),
        ('The answer is $\\frac12$. I hope it is correct.', '$\\frac12$'),
        (f'{BOX}{{3}} is not the last: {BOX}{{4', '3'),  # cut at the limit
        (f'{BOX}{{', None),
        (f'{BOX}{{}}', ''),
        ('hence 12 and 13', '13'),
        ('', None),
    ],
)
def test_the_expression_that_a_text_gives(text, answer):
    assert tasks.extract_math(text) == answer


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('18.00', 18),
        ('1,234', 1234),
        ('1,00,000', 100000),
        ('1 000', 1000),
        ('$70', 70),
        ('-$70', -70),
        ('3/4', Fraction(3, 4)),
        ('-5', -5),
        ('.5', Fraction(1, 2)),
        ('50%', 50),
        ('18.', 18),
        (r'-\frac{1}{2}', Fraction(-1, 2)),
        (r'1\frac{1}{10}', Fraction(11, 10)),
        ('...', None),
        ('', None),
        ('3/0', None),
        (r'\frac{1}{0}', None),
        ('1.2.3', None),
        ('1,2', None),  # two numbers
        ('x', None),
        ('9' * 5000, None),  # more digits than Python reads
    ],
)
def test_the_number_that_a_text_is(text, value):
    assert tasks.number(text) == value


@pytest.mark.parametrize(
    ('a', 'b', 'same'),
    [
        ('18.00', '18', True),
        ('3/4', '0.75', True),
        (r'\frac{1}{2}', '0.5', True),
        (r'\dfrac12', r'$\frac{1}{2}$', True),
        (r'\sqrt2', r'\sqrt{2}', True),
        (r'5\text{ cm}', '5', True),
        (r'\text{Monday}', 'Monday', True),
        (r'90^\circ', '90', True),
        (r'1{,}000', '1,000', True),
        ('x=3', '3', True),
        ('(A)', 'A', True),
        (r'\left(1, 0.5\right)', r'(1,\frac{1}{2})', True),
        ('1, -2', '-2,1', True),  # several solutions
        ('(1,-2)', '(-2,1)', False),
        ('(0,1]', '(0,1)', False),
        ('12', '1,2', False),
        ('5x+1', '5', False),
        ('...', '...', False),
        ('', '', False),
        (None, None, False),
        ('9' * 5000, '9' * 4999, False),
    ],
)
def test_which_answers_are_the_same(a, b, same):
    assert tasks.equal(a, b) is tasks.equal(b, a) is same


@pytest.mark.parametrize(
    ('text', 'exact', 'strict', 'flexible'),
    [
        ('...\n#### 1234', True, True, True),
        ('...\n#### 1,234.', True, True, True),
        ('...\n#### $1,234', True, None, True),
        ('...\n#### 1234.00', True, False, False),
        ('The answer is 1234...', True, None, False),  # flexible: 1234 with two dots of three
        ('1234 is what remains ...', True, None, False),
        ('#### 1 234', True, False, False),
        ('#### 1234\nQuestion: 5?\n#### 6', False, True, False),
        ('I cannot say', None, None, None),
    ],
)
def test_gsm8k_by_our_rule_and_by_those_of_lm_eval(text, exact, strict, flexible):
    reference = '600 + 634 = <<600+634=1234>>1234\n#### 1,234'
    assert tasks.gsm8k(text, reference) == {'exact': exact, 'strict': strict, 'flexible': flexible}


@pytest.mark.parametrize(
    ('text', 'exact', 'strict', 'flexible'),
    [
        (f'so ${BOX}{{\\frac12}}$', True, None, True),
        ('Final Answer: The final answer is $0.5$. I hope it is correct.', True, False, False),
        ('Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.', True, True, True),
        (f'so {BOX}{{0.5}}', True, None, False),
        ('', None, None, False),
    ],
)
def test_math_by_our_rule_and_by_those_of_lm_eval(text, exact, strict, flexible):
    reference = f'Half of it, ${BOX}{{\\frac{{1}}{{2}}}}$.'
    assert tasks.math(text, reference) == {'exact': exact, 'strict': strict, 'flexible': flexible}


@pytest.mark.parametrize('piece', ['\\boxed{', '1,', '#### ', '$', '\\frac', '=', '1 ', '-1', 'answer is '])
def test_no_text_takes_long_or_raises(piece):
    bad = piece * 5000
    for text in (bad, 'The answer is ' + bad):
        tasks.gsm8k(text, '#### 1')
        tasks.math(text, 'so $\\boxed{1}$')


def test_wilsons_interval_is_one_worked_by_hand_and_solves_its_equation():
    # 3 of 10: (0.3 + 0.19207) / 1.38415 = 0.35550; half: sqrt(0.021 + 0.0096036) / 1.38415 * 1.95996 = 0.24772
    low, high = tasks.wilson(3, 10)
    assert abs(low - 0.10779) < 2e-5 and abs(high - 0.60322) < 2e-5
    for k, n in ((0, 5), (5, 5), (1, 1319), (463, 1319), (7, 8)):
        for p in tasks.wilson(k, n):  # the shares whose own error bar just reaches k / n
            assert (k / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)
    assert tasks.wilson(0, 0) == (0.0, 1.0)
