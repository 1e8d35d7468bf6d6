"""
A real model fine-tuned on GSM8K by every method, at equal trained tokens: makes gsm8k.md and gsm8k.png.

    python -m bench.runs.gsm8k --model=path/to/SmolLM2-135M-Instruct --input=my/gsm8k         # train.jsonl, test.jsonl
    python -m bench.runs.gsm8k --model=... --input=... --steps=360 --jobs=2                   # an epoch
    python -m bench.runs.gsm8k --model=... --input=... --steps=360 --finished                 # the table so far

Finished runs are kept in out/gsm8k/, so that it can be stopped at any time and go on. --steps=24, the default, is half
an hour a run on one CPU core; on an H100, where seven at a time fill it, 200 steps are one to five minutes.
"""

from bench import parser

if __name__ == '__main__':
    asked = parser()
    asked.add_argument('--model', required=True, help='a Hugging Face folder, or a name on the hub')
    asked.add_argument('--input', required=True, help='folder with the train.jsonl and test.jsonl of GSM8K')
    asked.add_argument('--steps', type=int, default=24, choices=range(2, 10**6), metavar='N', help='of a run (24)')
    asked.add_argument('--answers', type=int, default=64, metavar='N', help='questions to answer; 0: none (64)')
    asked.add_argument('--at_once', type=int, default=16, metavar='N', help='answers generated at a time (16)')
    asked.add_argument('--rates', type=int, default=2, choices=[1, 2, 3], help='learning rates of each method (2)')
    asked.add_argument('--jobs', type=int, default=1, choices=range(1, 65), metavar='N', help='runs at a time (1)')
    asked.add_argument('--finished', action='store_true', help='start nothing, make the table of what is there')
    args = asked.parse_args()

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from bench import plot
from bench.runs import jobs
from plumbing.build import ROOT

OUT = os.path.join('out', 'gsm8k')
RUNS = {  # name: (config, learning rates, flags)
    'AdamW': ('adamw', ('5e-5', '1e-4', '2e-4'), []),
    'GaLore, 8-bit, per layer': ('galore', ('5e-5', '1e-4', '2e-4'), []),
    'LoQT': ('loqt', ('4e-4', '1e-3', '2e-3'), []),
    'LoRA': ('lora', ('5e-4', '1e-3', '2e-3'), []),
    'QLoRA': ('qlora', ('5e-4', '1e-3', '2e-3'), []),
    'LoRA, 21 of 84 by CoLM': ('colm', ('5e-4', '1e-3', '2e-3'), []),
    'LoRA, 21 of 84 at random': ('colm', ('5e-4', '1e-3', '2e-3'), ['--coreset=random']),
}


def do(words, log):
    return jobs.do(words, log, args.finished)


def score(folder, data, log):
    """-> test loss over all test answers, and the row of eval.py's answers, {} for none."""
    words = ['eval.py', folder, '--json', f'--batch_size={args.at_once}']
    loss = do([*words, f'--data={data}'], f'{log}_loss.json')
    test = f'gsm8k:{os.path.abspath(args.input)}/test.jsonl'
    more = ['--score=answers', f'--data={test}', f'--limit={args.answers}', '--tokens=256']
    answers = do([*words, *more], f'{log}_{args.answers}.json') if args.answers else None
    return loss and json.loads(loss)[0]['loss'], json.loads(answers)[0] if answers else {}


def run(data, name, rate):
    """-> the final lines of a run as a dict, with its scores; None for one that is not finished."""
    config, _, flags = RUNS[name]
    folder = os.path.join(OUT, f'{config}{"_random" * bool(flags)}_{rate}_{args.steps}')
    words = ['train.py', f'config/smollm2_math_{config}.py', f'--init_from={args.model}', f'--dataset={data}', *flags]
    words += [f'--learning_rate={rate}', f'--max_iters={args.steps}', f'--warmup_iters={max(args.steps // 8, 1)}']
    words += [f'--eval_interval={args.steps}', '--eval_tokens=8192', '--log_interval=1', '--sample_tokens=0']
    log = do([*words, f'--out_dir={folder}', '--overwrite'], os.path.join(folder, 'log.txt'))
    loss, answers = score(folder, data, os.path.join(folder, 'eval')) if log else (None, {})
    if not loss:
        return None
    found = dict(line.split(': ', 1) for line in log.splitlines()[-14:] if ': ' in line)
    return found | {'loss': loss, 'answers': answers, 'name': name, 'rate': rate, 'folder': os.path.join(ROOT, folder)}


def share(answers):
    if not answers:
        return ''
    low, high = (100 * answers[end] for end in ('low', 'high'))
    return f'{answers["right"]} of {answers["questions"]} ({low:.1f} to {high:.1f} %)'


def main():
    data = os.path.join(OUT, 'data')
    source = ['--tokenizer=' + args.model, '--input', os.path.abspath(args.input), f'--out_dir={data}']
    do(['data/gsm8k/prepare.py', *source], os.path.join(OUT, 'prepared.txt'))
    asked = [(name, rates[i]) for i in range(args.rates) for name, (_, rates, _) in RUNS.items()]
    with ThreadPoolExecutor(args.jobs) as pool:
        before = pool.submit(score, args.model, data, os.path.join(OUT, 'base'))
        runs = [found for found in pool.map(lambda one: run(data, *one), asked) if found]
    loss, answers = before.result()
    if not runs or not loss:
        sys.exit(f'error: nothing is finished in {OUT} yet: leave out --finished')
    tokens = {found['name']: int(found['tokens']) for found in runs}
    lines = [
        '# SmolLM2-135M-Instruct on GSM8K',
        '',
        f'Made by `python -m bench.runs.gsm8k --steps={args.steps} --rates={args.rates} --answers={args.answers} '
        f'--jobs={args.jobs}` on {runs[0]["device"]}, in bf16:',
        f'{args.steps} steps of 8 packed windows of 576 tokens; CoLM and its control take 21 examples a step '
        'instead. In all: ' + ', '.join(f'{name} {n:,} tokens' for name, n in tokens.items()) + '.',
        'Loss: nats a trained token over all 1,319 test answers. Right: exact match of greedy answers of at most 256 '
        'tokens, the same questions for all, with the 95 % interval; nothing where it was not run. Planned '
        'and measured: peak of tensors. Seconds are those of a machine that had the other jobs beside.',
        '',
        '| method | learning rate | test loss | right | planned GB | measured GB | seconds |',
        '|---|---|---|---|---|---|---|',
        f'| before | | {loss:.4f} | {share(answers)} | | | |',
    ]
    for name in RUNS:
        tried = [r for r in runs if r['name'] == name]
        for r in tried:
            shown = f'**{r["loss"]:.4f}**' if r is min(tried, key=lambda r: r['loss']) else f'{r["loss"]:.4f}'
            planned, measured = (int(r[f'peak_bytes_{what}']) / 1e9 for what in ('planned', 'measured'))
            row = f'| {name} | {r["rate"]} | {shown} | {share(r["answers"])} | {planned:.3f} | {measured:.3f} |'
            lines.append(f'{row} {float(r["seconds"]):.0f} |')
    lines += ['', '![training loss](gsm8k.png)', '']
    with open(os.path.join(ROOT, 'results', 'gsm8k.md'), 'w') as f:
        f.write('\n'.join(lines))
    best = [min((r for r in runs if r['name'] == name), key=lambda r: r['loss']) for name in tokens]
    labels = [f'{r["name"]}, lr {r["rate"]}' for r in best]
    png = os.path.join(ROOT, 'results', 'gsm8k.png')
    few = max(args.steps // 8, 1)
    plot.draw([r['folder'] for r in best], png, 'tokens', 'train_loss', labels, f'mean loss of {few} steps', few)
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
