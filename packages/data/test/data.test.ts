import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  ChatTemplate,
  type DatasetOptions,
  joinDocuments,
  loadDataset,
  loadTokenizer,
  PackedDataset,
  packSamples,
  type Tokenizer,
} from '../src/index.js';

const model = join(dirname(fileURLToPath(import.meta.url)), '../../../examples/quickstart/tiny-gpt-oss');
let dir: string;
let tokenizer: Tokenizer;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-data-'));
  tokenizer = loadTokenizer(model);
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

const file = (name: string, content: string | Uint8Array): string => {
  const path = join(dir, name);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
  return path;
};
const load = (paths: string[], options: Partial<DatasetOptions> = {}): Promise<PackedDataset> =>
  loadDataset({ paths, tokenizer, maxLength: 64, onNotice: () => {}, ...options });
const failure = async (promise: Promise<unknown>): Promise<{ code: string; message: string }> => {
  try {
    await promise;
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error('expected a failure');
};

describe('loadTokenizer', () => {
  it('encodes and decodes', () => {
    const ids = tokenizer.encode('Fellow-citizens of the Senate');
    expect(tokenizer.decode(ids)).toBe('Fellow-citizens of the Senate');
    expect([tokenizer.eosToken, tokenizer.eosTokenId, tokenizer.bosTokenId, tokenizer.padTokenId]).toEqual(['<|return|>', 5, 0, 1]);
    expect(tokenizer.vocabSize).toBe(4096);
    expect(tokenizer.chatTemplate).toContain('<|start|>');
  });

  it.each([
    ['no folder', 'nowhere', undefined],
    ['broken JSON', 'broken', '{"model": '],
    ['JSON of another kind', 'other', '[1, 2]'],
    ['no tokenizer at all', 'empty', '{}'],
    ['a vocabulary that is none', 'vocab', '{"model":{"type":"BPE","vocab":5,"merges":[]}}'],
  ])('%s is a typed error that names the file', (_, name, content) => {
    const folder = join(dir, name);
    if (content !== undefined) file(`${name}/tokenizer.json`, content);
    expect(() => loadTokenizer(folder)).toThrow(
      expect.objectContaining({ code: 'ERR_LC_TOKENIZER', message: expect.stringContaining('tokenizer.json') }),
    );
  });
});

describe('text', () => {
  it('is one document a file, ended by EOS, packed with boundaries', async () => {
    const a = file('a.txt', 'The state of the Union is strong.');
    const b = file('b.txt', 'We hold these truths.');
    const data = await load([a, b], { shuffle: false });
    expect(data.length()).toBe(1);
    const s = data.next();
    const ends = [...s.inputIds].flatMap((id, i) => (id === 5 ? [i] : []));
    expect(ends).toHaveLength(2);
    const second = (ends[0] as number) + 1;
    expect(s.docStart[second - 1]).toBe(0);
    expect(s.docStart[second]).toBe(second);
    expect([s.labels[0], s.labels[second]]).toEqual([-100, -100]);
    expect(s.supervised).toBe(s.inputIds.length - 2);
  });

  it.each([
    ['an empty file', () => file('empty.txt', ' \n'), /empty/],
    ['a zero-length file', () => file('zero.txt', ''), /empty/],
    ['bytes that are not UTF-8', () => file('latin.txt', Uint8Array.of(0x63, 0xe9, 0x20)), /UTF-8/],
    ['a missing file', () => join(dir, 'missing.txt'), /ENOENT/],
    ['a byte order mark and nothing else', () => file('bom.txt', Uint8Array.of(0xef, 0xbb, 0xbf)), /empty/],
    ['a folder without text', () => dirname(file('bin/x.bin', 'x')), /no \.txt/],
  ])('%s is ERR_LC_DATA', async (_, make, message) => {
    const error = await failure(load([make()]));
    expect(error.code).toBe('ERR_LC_DATA');
    expect(error.message).toMatch(message);
  });
});

describe('JSONL', () => {
  it('reads text and messages', async () => {
    const path = file(
      'mixed.jsonl',
      '{"text":"Peace."}\n\n{"messages":[{"role":"user","content":"Who?"},{"role":"assistant","content":"We."}]}\n',
    );
    const data = await load([path], { shuffle: false, packing: false });
    const [a, b] = [data.next(), data.next()];
    expect(tokenizer.decode(a.inputIds, { skipSpecialTokens: false })).toBe('Peace.<|return|>');
    expect(tokenizer.decode(b.inputIds, { skipSpecialTokens: false })).toBe(
      '<|start|>user<|message|>Who?<|end|><|start|>assistant<|message|>We.<|return|>',
    );
  });

  it.each([
    ['broken JSON', '{"text":"a"}\n{"text": oops}\n', /broken.*:2: not valid JSON/],
    ['an array', '[1]\n', /:1: expected a JSON object/],
    ['other keys', '{"prompt":"a"}\n', /:1: expected "text".*prompt/],
    ['an empty text', '{"text":"  "}\n', /:1: "text" is empty/],
    ['no rows', '\n\n', /no rows/],
    ['a message without a role', '{"messages":[{"content":"x"}]}\n', /:1: expected/],
  ])('%s names the line', async (name, content, message) => {
    const error = await failure(load([file(`broken ${name}.jsonl`, content)]));
    expect(error.code).toBe('ERR_LC_DATA');
    expect(error.message).toMatch(message);
  });

  it('applies a mask', async () => {
    const path = file('mask.jsonl', '{"text":"One two three."}\n');
    const data = await load([path], { mask: (ids) => ids.map((id, i) => (i < 2 ? -100 : id)) });
    const s = data.next();
    expect(s.labels.slice(0, 2)).toEqual(Int32Array.of(-100, -100));
    expect(s.supervised).toBe(s.inputIds.length - 2);
  });
});

describe('chat templates', () => {
  const messages = [{ role: 'user', content: 'x' }];
  it('that loop forever are stopped, and the next render works', async () => {
    await using bad = new ChatTemplate('{%- for a in range(1000000) -%}{%- for b in range(1000000) -%}{%- endfor -%}{%- endfor -%}', {
      timeout: 300,
    });
    const error = await failure(bad.render(messages));
    expect([error.code, error.message]).toEqual(['ERR_LC_TEMPLATE', expect.stringMatching(/300 ms/)]);
    const second = await failure(bad.render(messages));
    expect(second.code).toBe('ERR_LC_TEMPLATE');
  });

  it.each([
    ['that do not parse', '{% for %}'],
    ['that raise', "{{ raise_exception('no system role') }}"],
    ['that call what is not there', '{{ nothing.at.all() }}'],
  ])('%s are typed errors', async (_, template) => {
    await using chat = new ChatTemplate(template);
    expect((await failure(chat.render(messages))).code).toBe('ERR_LC_TEMPLATE');
  });

  it('see a fixed date', async () => {
    await using chat = new ChatTemplate("{{ strftime_now('%Y-%m-%d %B') }}", { date: new Date('2026-03-04T00:00:00Z') });
    expect(await chat.render(messages)).toBe('2026-03-04 March');
  });

  it.each([
    ['%d %b %y, %-d/%-m', '04 Mar 26, 4/3'],
    ['%A %e %I:%M %p, day %j, 100%%', 'Wednesday  4 03:07 PM, day 063, 100%'],
  ])('know the date formats of Python: %s', async (format, text) => {
    await using chat = new ChatTemplate(`{% if strftime_now is defined %}{{ strftime_now('${format}') }}{% endif %}`, {
      date: new Date('2026-03-04T15:07:09Z'),
    });
    expect(await chat.render(messages)).toBe(text);
  });

  it('refuse a date format that they do not know, rather than print it', async () => {
    await using chat = new ChatTemplate("{{ strftime_now('%Q') }}");
    expect(await failure(chat.render(messages))).toMatchObject({ code: 'ERR_LC_TEMPLATE', message: expect.stringContaining('%Q') });
  });

  it('render the same with and without generation tags', async () => {
    await using tagged = new ChatTemplate('{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}');
    expect(await tagged.render(messages)).toBe('x');
  });

  it('see special tokens, tools and further variables', async () => {
    await using chat = new ChatTemplate('{{ bos_token }}{{ tools[0].name }}|{{ effort }}|{{ add_generation_prompt }}', { bosToken: '<s>' });
    expect(await chat.render(messages, { tools: [{ name: 't' }], kwargs: { effort: 'low' }, addGenerationPrompt: true })).toBe(
      '<s>t|low|true',
    );
  });

  it('that loop in a file name its line', async () => {
    const path = file('loop.jsonl', '{"text":"fine"}\n{"messages":[{"role":"user","content":"x"}]}\n');
    const chatTemplate = '{%- for a in range(1000000) -%}{%- for b in range(1000000) -%}{%- endfor -%}{%- endfor -%}';
    const error = await failure(load([path], { chatTemplate, templateTimeout: 300 }));
    expect([error.code, error.message]).toEqual(['ERR_LC_TEMPLATE', expect.stringMatching(/loop\.jsonl:2: .*300 ms/)]);
  });

  it('that give nothing are refused', async () => {
    const path = file('nothing.jsonl', '{"messages":[{"role":"user","content":"x"}]}\n');
    expect(await failure(load([path], { chatTemplate: '{# nothing #}' }))).toMatchObject({
      code: 'ERR_LC_DATA',
      message: expect.stringMatching(/nothing\.jsonl:1: no tokens/),
    });
  });

  it('cannot reach the process', async () => {
    await using chat = new ChatTemplate("{{ messages.constructor }}{{ ''.constructor.constructor }}");
    const text = await chat.render(messages).catch(() => '');
    expect(text).not.toMatch(/function|native/i);
  });
});

describe('over-long documents', () => {
  const long = (): string => file('long.txt', 'word '.repeat(300));
  it('are an error by default, with counts', async () => {
    const error = await failure(load([long(), file('short.txt', 'short')]));
    expect(error.code).toBe('ERR_LC_DATA');
    expect(error.message).toMatch(/1 of 2 samples are longer than 64 tokens.*long\.txt.*'split'/s);
  });

  it.each(['drop', 'truncate', 'split'] as const)('%s reports what it did', async (excessLengthStrategy) => {
    const notices: string[] = [];
    const data = await load([long(), file('short.txt', 'short')], { excessLengthStrategy, onNotice: (n) => notices.push(n) });
    expect(notices).toHaveLength(1);
    const { report } = data;
    if (excessLengthStrategy === 'drop') expect([report.dropped, data.length()]).toEqual([1, 1]);
    if (excessLengthStrategy === 'truncate') expect(report.truncated).toBe(1);
    if (excessLengthStrategy === 'split') expect(data.tokens).toBe(report.tokens);
    for (const s of data.epoch()) expect(s.inputIds.length).toBeLessThanOrEqual(64);
  });

  it('counts what is left out for being too short', async () => {
    const notices: string[] = [];
    const data = await load([file('one.jsonl', '{"text":"a"}\n{"text":"We hold these truths."}\n')], {
      appendEos: false,
      onNotice: (n) => notices.push(n),
    });
    expect(data.report.short).toBe(1);
    expect(notices).toEqual([expect.stringMatching(/left out 1 of a single token/)]);
  });

  it.each([0, 1, 2.5, Number.NaN])('a maxLength of %s is refused', async (maxLength) => {
    expect((await failure(load([file('a.txt', 'some text')], { maxLength }))).code).toBe('ERR_LC_DATA');
  });

  it('an unknown strategy is refused', async () => {
    expect((await failure(load([long()], { excessLengthStrategy: 'shorten' as 'drop' }))).code).toBe('ERR_LC_DATA');
  });
});

describe('packing', () => {
  const sample = (length: number, id: number) => ({
    inputIds: new Int32Array(length).fill(id),
    labels: new Int32Array(length).fill(id),
    source: `${id}`,
  });
  it('keeps every document whole and once', () => {
    const lengths = Array.from({ length: 200 }, (_, i) => 2 + ((i * 37) % 60));
    const bins = packSamples(
      lengths.map((l, i) => sample(l, i)),
      64,
      true,
    );
    expect(
      bins
        .flat()
        .map((s) => Number(s.source))
        .sort((a, b) => a - b),
    ).toEqual(lengths.map((_, i) => i));
    for (const bin of bins) expect(bin.reduce((sum, s) => sum + s.inputIds.length, 0)).toBeLessThanOrEqual(64);
    // Fewer sequences than laying the documents end to end in order (next-fit).
    let nextFit = 1;
    let room = 64;
    for (const l of lengths) {
      if (l > room) {
        nextFit++;
        room = 64;
      }
      room -= l;
    }
    expect(bins.length).toBeLessThan(nextFit);
  });

  it('counts nothing as supervised where everything is masked', () => {
    const s = { inputIds: Int32Array.of(1, 2, 3), labels: Int32Array.of(-100, -100, -100), source: 'x' };
    expect(joinDocuments([s]).supervised).toBe(0);
  });

  it('order depends on seed and epoch alone, and resumes', () => {
    const samples = Array.from({ length: 50 }, (_, i) => sample(10, i));
    const options = { maxLength: 20, packing: true, shuffle: true, seed: 7, excessLengthStrategy: 'raise' as const };
    const make = (seed = 7) => new PackedDataset(samples, { ...options, seed });
    const take = (d: PackedDataset, n: number) => Array.from({ length: n }, () => [...d.next().inputIds].join());
    const whole = take(make(), 60);
    expect(take(make(), 60)).toEqual(whole);
    expect(take(make(8), 25)).not.toEqual(whole.slice(0, 25));
    expect(whole.slice(0, 25)).not.toEqual(whole.slice(25, 50));
    const first = make();
    expect(take(first, 31)).toEqual(whole.slice(0, 31));
    const second = make();
    second.restore(JSON.parse(JSON.stringify(first.state())));
    expect(take(second, 29)).toEqual(whole.slice(31));
    const state = first.state();
    expect(() => make(8).restore(state)).toThrow(
      expect.objectContaining({ code: 'ERR_LC_DATA', message: expect.stringMatching(/not what they were/) }),
    );
    const other = new PackedDataset([...samples.slice(0, -1), sample(10, 999)], options);
    expect(() => other.restore(state)).toThrow(expect.objectContaining({ code: 'ERR_LC_DATA' }));
    expect(() => make().restore({ ...state, index: 99 })).toThrow(expect.objectContaining({ code: 'ERR_LC_DATA' }));
    expect(() => make().restore(null)).toThrow(expect.objectContaining({ code: 'ERR_LC_DATA' }));
  });

  it('splits off an evaluation part that shares no document', () => {
    const data = new PackedDataset(
      Array.from({ length: 20 }, (_, i) => sample(10, i)),
      { maxLength: 20, packing: true, shuffle: true, seed: 1, excessLengthStrategy: 'raise' },
    );
    const { train, test } = data.split(3);
    const ids = (d: PackedDataset) => new Set([...d.epoch()].flatMap((s) => [...s.inputIds]));
    expect([...ids(test)].filter((id) => ids(train).has(id))).toEqual([]);
    expect(ids(test).size + ids(train).size).toBe(20);
    expect(() => data.split(10)).toThrow(expect.objectContaining({ code: 'ERR_LC_DATA' }));
  });
});
