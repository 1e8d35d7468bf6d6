"""
Chat templates by name, for a base model that brings none, and the jinja that they and a model's own run in.

    python data/instruct/prepare.py --template=NAME ...

Each is jinja, as a model's own chat_template.jinja is, and is written into the prepared folder under that name, so that
transformers, vLLM and sample.py read the tuned model as it was trained. NEEDS says which special tokens a tokenizer
must have for it: a name that is none would be written out in ordinary letters, and never end a turn.
"""

import json
import re
from datetime import datetime

NO_TOOLS = """{% if message.role not in ['system', 'user', 'assistant'] %}\
{{ raise_exception('this template has no place for a turn of ' + message.role) }}{% endif %}"""

# Qwen's, SmolLM2's, Hermes'. Tools as Hermes and Qwen write them.
CHATML = """{% if tools %}{{ '<|im_start|>system\\n' }}\
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}\
{{ '# Tools\\n\\nYou may call these functions:\\n<tools>' }}\
{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\
{{ '\\n</tools>\\n\\nTo call one, write its name and its arguments as JSON:\\n<tool_call>\\n' }}\
{{ '{"name": NAME, "arguments": ARGUMENTS}\\n</tool_call><|im_end|>\\n' }}{% endif %}\
{% for message in messages %}{% if not (tools and loop.first and message.role == 'system') %}\
{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}\
{% for call in message.tool_calls or [] %}{% set call = call.function or call %}\
{{ '\\n' if message.content or not loop.first }}{{ '<tool_call>\\n{"name": ' + (call.name | tojson) }}\
{{ ', "arguments": ' + (call.arguments if call.arguments is string else call.arguments | tojson) }}\
{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{% for message in messages %}\
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content | trim) + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Each question begins a text of its own, with its BOS, but for the first, whose BOS stands before all templates.
LLAMA2 = (
    """{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'user' %}{{ bos_token if loop.previtem and loop.previtem.role == 'assistant' }}{{ '[INST] ' }}\
{% if loop.previtem and loop.previtem.role == 'system' and loop.previtem.content %}\
{{ '<<SYS>>\\n' + loop.previtem.content + '\\n<</SYS>>\\n\\n' }}{% endif %}{{ (message.content | trim) + ' [/INST]' }}\
{% elif message.role == 'assistant' %}{{ ' ' + (message.content | trim) + ' ' + eos_token }}{% endif %}{% endfor %}"""
)

# No system message: it goes before the first question, as for every template that has no place for it.
MISTRAL = (
    """{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'system' %}{{ raise_exception('no system message') }}\
{% elif message.role == 'user' %}{{ '[INST] ' + message.content + '[/INST]' }}\
{% else %}{{ ' ' + (message.content | trim) + eos_token }}{% endif %}{% endfor %}"""
)

GEMMA = (
    """{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}\
{{ (message.content | trim) + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
)

PHI3 = """{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Of Zephyr-7B and of StableLM-Zephyr: the roles are ordinary letters, only the end of a turn is a token.
ZEPHYR = """{% for message in messages %}\
{{ '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

VICUNA = (
    """{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'system' %}{{ message.content + ' ' if message.content }}\
{% elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ASSISTANT:' }}\
{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
)

# Stanford's, with which MAmmoTH and CoLM train: no newline after "### Response:". `instruction` and `input` are of
# alpaca's rows; every other row has them together in `content`.
ALPACA = (
    """{% if messages[0].role != 'system' or not messages[0].content %}\
{{ 'Below is an instruction that describes a task' }}\
{% if messages[0].input %}{{ ', paired with an input that provides further context' }}{% endif %}\
{{ '. Write a response that appropriately completes the request.\\n\\n' }}{% endif %}\
{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'system' %}{{ message.content + '\\n\\n' if message.content }}\
{% elif message.role == 'user' %}{{ '\\n\\n' if loop.previtem and loop.previtem.role != 'system' }}\
{{ '### Instruction:\\n' + (message.instruction if message.input else message.content) + '\\n\\n' }}\
{% if message.input %}{{ '### Input:\\n' + message.input + '\\n\\n' }}{% endif %}{{ '### Response:' }}\
{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"""
)

# As lm-evaluation-harness asks GSM8K.
QA = (
    """{% for message in messages %}"""
    + NO_TOOLS
    + """\
{% if message.role == 'system' %}{{ message.content + '\\n\\n' if message.content }}\
{% elif message.role == 'user' %}{{ '\\n\\n' if loop.previtem and loop.previtem.role != 'system' }}\
{{ 'Question: ' + message.content + '\\nAnswer:' }}\
{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
)

# Prompt and completion just as they are; a space between them belongs to the completion.
PLAIN = """{% for message in messages %}{{ message.content + (eos_token if message.role == 'assistant' else '') }}\
{% endfor %}"""

TEMPLATES = {
    'chatml': CHATML,
    'llama3': LLAMA3,
    'llama2': LLAMA2,
    'mistral': MISTRAL,
    'gemma': GEMMA,
    'phi3': PHI3,
    'zephyr': ZEPHYR,
    'vicuna': VICUNA,
    'alpaca': ALPACA,
    'qa': QA,
    'plain': PLAIN,
}
NEEDS = {
    'chatml': ('<|im_start|>', '<|im_end|>'),
    'llama3': ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
    'gemma': ('<start_of_turn>', '<end_of_turn>'),
    'phi3': ('<|user|>', '<|assistant|>', '<|end|>'),
}
DATE = datetime(2024, 7, 26)  # what a template is told is today, as Llama 3's own falls back to: runs must not differ


def environment():
    """jinja as transformers sets it up. What it gives a template cannot change what it is given, nor leave jinja."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what stands between them comes out between two signs."""

        tags = frozenset({'generation'})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method('marked'), [], [], body).set_lineno(line)

        def marked(self, caller):
            begin, end = self.environment.generation_signs
            return begin + caller() + end

    class Namespace(jinja2.utils.Namespace):
        """A place for a template's variables: under no name that Python keeps something of its own."""

        def __init__(*args, **named):
            for name in named:
                check(name)
            jinja2.utils.Namespace.__init__(*args, **named)

        def __setitem__(self, name, value):
            check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def check(name):
        if name.startswith('_'):
            raise jinja2.exceptions.SecurityError(f'a variable named {name}')

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return re.sub(r'\\u(fd[de][0-9a-f])', lambda m: chr(int(m[1], 16)), text) if ensure_ascii else text  # our signs

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols']
    )
    found.generation_signs = ('', '')
    found.filters['tojson'] = to_json
    found.globals |= {
        'raise_exception': refuse,
        'strftime_now': lambda form: DATE.strftime(form),
        'namespace': Namespace,
        'dict': lambda *args, **named: dict(*args, **named),
    }
    return found
